"""How a recipe is run, who is told what happens, and what became of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adaptkit.arguments import optional
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import Signer
from adaptkit.pipeline.recipe import Recipe, Source, Step
from adaptkit.pipeline.steps._kind import Facts


@dataclass(frozen=True)
class RunOptions:
    """How to run a recipe.

    Attributes:
        work: folder for what steps make; ``.adaptkit`` beside the recipe if None.
        locked: fail if anything differs from what the lock says, and leave the lock as it is.
        offline: do without the Hub: repositories have to be in its cache, and nothing is published.
        verify: read every byte of sources and of what is kept, instead of trusting sizes and times.
        until: name of the step to end with; None is all of them.
        signer: who signs where a step asks for it; the identity of this CI job, or of whoever logs in, if None.
    """

    work: Path | None = None
    locked: bool = False
    offline: bool = False
    verify: bool = False
    until: str | None = None
    signer: Signer | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "work", optional(self.work))


@dataclass(frozen=True)
class SourceReport:
    """A source that was found.

    Attributes:
        name: in the recipe.
        what: its path, or org/name@revision.
        commit: of a repository.
        digest: sha256 of a file, or of a folder's manifest or its list of files; None if that is not known yet.
        bytes: in it.
        is_here: whether it is on this machine; always, but for a dry run.
    """

    name: str
    what: str
    commit: str | None
    digest: str | None
    bytes: int
    is_here: bool


@dataclass(frozen=True)
class OutputReport:
    """An artifact that a step made.

    Attributes:
        name: in the recipe.
        path: folder.
        bytes: in its files.
        manifest_sha256: names it.
    """

    name: str
    path: str
    bytes: int
    manifest_sha256: str


@dataclass(frozen=True)
class StepReport:
    """What became of a step.

    Attributes:
        name: in the recipe.
        kind: of step.
        inputs: names of what goes into it.
        needs: names of the steps that it waited for besides.
        makes: names of its artifacts.
        state: done; kept from an earlier run; failed, of a gate; and in a dry run ``to do``, or ``may follow`` if that
            hangs on what comes before it.
        seconds: that it took.
        figure: the one that matters, in a few words.
        key: hash of all that decides about it; None if that is not known yet.
        outputs: what it made.
        facts: more figures.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    state: str
    seconds: float = 0.0
    figure: str = ""
    key: str | None = None
    outputs: tuple[OutputReport, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class RunReport:
    """What became of a recipe.

    Attributes:
        recipe: file.
        name: of the release.
        lock: file.
        lock_state: written, unchanged, or as it was (``kept``: with ``locked``, or in a dry run).
        sources: what it is made from.
        steps: in the order in which they ran.
        seconds: that all of it took.
    """

    recipe: str
    name: str
    lock: str
    lock_state: str
    sources: tuple[SourceReport, ...]
    steps: tuple[StepReport, ...]
    seconds: float


@dataclass(frozen=True)
class Listener:
    """Who is told what a run does.

    Attributes:
        begun: with what recipe.
        sought: a source that is looked for.
        source_progress: how many bytes of it have arrived, and then were hashed, of how many.
        found: a source.
        started: a step that is going to be done: name and kind.
        progress: how much of it is done, of how much.
        note: what people should know, in a line.
        ended: a step that was done, or kept.
    """

    begun: Callable[[Recipe], None] = lambda _: None
    sought: Callable[[Source], None] = lambda _: None
    source_progress: Progress = no_progress
    found: Callable[[SourceReport], None] = lambda _: None
    started: Callable[[Step], None] = lambda _: None
    progress: Progress = no_progress
    note: Callable[[str], None] = lambda _: None
    ended: Callable[[StepReport], None] = lambda _: None

    def note_of(self, step: Step) -> Callable[[str], None]:
        """``note``, for what a step has to say."""
        return lambda text: self.note(f"{step.name}: {text}")
