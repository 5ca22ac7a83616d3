"""What a kind of step is: what it takes, which options it has, and what it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.signing import Signer

Facts = dict[str, Any]
"""What is remembered of a step besides its artifacts: what JSON can hold."""
Inputs = Mapping[str, tuple[str, ...]]
"""By key of a step, the names of sources and of what steps make."""


@dataclass(frozen=True)
class Input:
    """A key of a step whose value names sources or other steps.

    Attributes:
        key: in the recipe; ``calibration.files`` is inside another key.
        many: a list of names.
        required: it may not be left out.
        takes: folders (checkpoints, adapters) or files.
        words: values that are no names, but mean something to the operation.
    """

    key: str
    many: bool = False
    required: bool = False
    takes: Literal["folder", "file"] = "folder"
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """One step to be done.

    Attributes:
        paths: what its inputs name, by key.
        names: what the recipe calls them, by key.
        options: of the kind's type.
        output: folder to make; a kind that makes several artifacts adds to its name.
        progress: told how much is done, of how much.
        note: told of what people should know, in a line.
        signer: who signs, where that is asked for.
    """

    paths: Mapping[str, tuple[Path, ...]]
    names: Mapping[str, tuple[str, ...]]
    options: Any
    output: Path
    progress: Progress
    note: Callable[[str], None]
    signer: Signer

    def path(self, key: str) -> Path:
        """The one path of an input that has to be there."""
        return self.paths[key][0]

    def optional(self, key: str) -> Path | None:
        """The path of an input, if it was given."""
        return next(iter(self.paths.get(key, ())), None)


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        figure: the one that matters, in a few words.
        facts: more of them, for programs.
    """

    figure: str
    facts: Facts


@dataclass(frozen=True)
class StepKind:
    """A kind of step.

    Attributes:
        inputs: the first one's value stands beside the kind's own name.
        options: dataclass that the other keys fill.
        run: does it.
        refused: options that a recipe cannot set, and why.
        complete: puts stand-ins into the options for what inputs will fill.
        check: refuses options and inputs that do not go together, by a UsageError.
        makes: what is added to the step's name for each artifact that it makes; kinds that look, or send, make none.
        gates: whether it is a gate, which has to be passed before anything is published.
        judge: of a gate: what stands against going on, given what was measured; empty if nothing does.
        uncounted: options that change nothing that is made or measured.
        foresee: of a kind that reaches out to the Hub: refuses before anything is done what it would refuse in the end.
        rehearse: of such a kind: says what it would send when all that it takes is there, or refuses that.
    """

    inputs: tuple[Input, ...]
    options: type[Any]
    run: Callable[[Work], Outcome]
    refused: Mapping[str, str] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], Inputs], dict[str, Any]] = lambda values, inputs: values
    check: Callable[[Any, Inputs], None] = lambda options, inputs: None
    makes: Callable[[Any], tuple[str, ...]] = lambda options: ("",)
    gates: Callable[[Any], bool] = lambda options: False
    judge: Callable[[Any, Facts], str] = lambda options, facts: ""
    uncounted: frozenset[str] = frozenset({"threads"})
    foresee: Callable[[Any, Signer, Callable[[str], None]], None] | None = None
    rehearse: Callable[[Work], str] | None = None

    @property
    def sends(self) -> bool:
        """Whether it reaches out to the Hub."""
        return self.foresee is not None
