"""Options, callbacks and reports of a run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.pipeline.recipe import Source, Step
from adaptkit.pipeline.steps._kind import Facts


@dataclass(frozen=True)
class InputReport:
    """A source that was found.

    Attributes:
        name: in the recipe.
        what: its path, or org/name@revision.
        commit: of a repository; None for a path.
        digest: sha256 of the file, or of the folder's manifest or list of files; None if not known yet.
        bytes: its size.
        is_here: whether it is on this machine; can be False only in a dry run.
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
        path: its folder.
        bytes: total size of its files.
        manifest_sha256: identifies its content.
    """

    name: str
    path: str
    bytes: int
    manifest_sha256: str


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        name: in the recipe.
        kind: of step.
        inputs: names of its inputs.
        needs: names of further steps that it waited for.
        makes: names of its artifacts.
        state: ``done``; ``kept`` from an earlier run; ``failed`` for a gate; in a dry run also ``to do``, or ``may
            follow`` if an earlier step's output decides whether it must run again.
        seconds: duration.
        figure: the main result, as a short phrase.
        key: hash of everything that determines its outputs; None if not known yet.
        outputs: the artifacts that it made.
        facts: further results.
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
    """The result of a run.

    Attributes:
        recipe: path of the recipe.
        name: of the release.
        lock: path of the lock.
        lock_state: ``written``, ``unchanged``, or ``kept`` (not written: with ``locked``, or in a dry run).
        sources: in the recipe's order.
        steps: in the order in which they ran.
        seconds: total duration.
    """

    recipe: str
    name: str
    lock: str
    lock_state: str
    sources: tuple[InputReport, ...]
    steps: tuple[StepResult, ...]
    seconds: float


@dataclass(frozen=True)
class Listener:
    """Callbacks for the events of a run.

    Attributes:
        on_start: called with each source before it is looked for, and each step before it runs; not for kept steps.
        source_progress: called with (done, total) bytes of the source, first downloaded, then hashed.
        progress: called with the progress (done, total) of the running step.
        note: called with a one-line message for the user.
        on_end: called with each report of a source or step, also for kept steps and failed gates.
    """

    on_start: Callable[[Source | Step], None] = lambda _: None
    source_progress: Progress = no_progress
    progress: Progress = no_progress
    note: Callable[[str], None] = lambda _: None
    on_end: Callable[[InputReport | StepResult], None] = lambda _: None

    def note_of(self, step: Step) -> Callable[[str], None]:
        """Return a callback that passes a step's messages to ``note``, with its name and the recipe's keys in them."""
        return lambda text: self.note(f"{step.name}: {step.how.with_keys(text)}")
