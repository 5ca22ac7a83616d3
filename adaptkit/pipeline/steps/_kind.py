"""The definition of a kind of step: its inputs, its options, and what it does."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.signing import Signer
from adaptkit.pipeline.artifact import Kind, Takes

Facts = dict[str, Any]
"""A step's results besides its artifacts, as JSON values."""
Inputs = Mapping[str, tuple[str, ...]]
"""Maps a step's keys to names of sources and of other steps' artifacts."""

_OPTION = re.compile(r"[:;] adaptkit [^;]*|(?<![\w./-])--([a-z][a-z-]*)")
"""An option of a command, and not a part of a path; or a command to run, whose options stay as they are."""


@dataclass(frozen=True)
class Input:
    """A key of a step whose value names sources or other steps.

    Attributes:
        key: in the recipe; a dot separates nested keys, as in ``calibration.files``.
        many: whether the value is a list of names.
        required: whether the key must be given.
        takes: what it takes.
        takes_with: returns what it takes with these options, if they decide that; otherwise None.
        words: values that the operation interprets itself, instead of as names.
        with_card: whether the operation also reads a folder's model card.
        made: whether it may be the output of another step.
        check: raises what the step would raise for a source, before any step is run.
    """

    key: str
    many: bool = False
    required: bool = False
    takes: Takes = "folder"
    takes_with: Callable[[Any], Takes | None] = lambda options: None
    words: tuple[str, ...] = ()
    with_card: bool = False
    made: bool = True
    check: Callable[[Path], None] = lambda path: None


@dataclass(frozen=True)
class Work:
    """Everything that a kind needs to run a step.

    Attributes:
        paths: maps the inputs' keys to paths.
        names: maps the inputs' keys to their names in the recipe.
        options: of the kind's type.
        output: folder to make; a kind that makes several artifacts appends suffixes to its name.
        progress: called with (done, total).
        note: called with a one-line message for the user.
        signer: credentials for steps that sign.
    """

    paths: Mapping[str, tuple[Path, ...]]
    names: Mapping[str, tuple[str, ...]]
    options: Any
    output: Path
    progress: Progress
    note: Callable[[str], None]
    signer: Signer

    def path(self, key: str) -> Path:
        """Return the single path of a required input."""
        return self.paths[key][0]

    def optional(self, key: str) -> Path | None:
        """Return the single path of an input; None if it was not given."""
        return next(iter(self.paths.get(key, ())), None)


@dataclass(frozen=True)
class Outcome:
    """The result of a step.

    Attributes:
        figure: the main result, as a short phrase.
        facts: all results, for programs.
    """

    figure: str
    facts: Facts


@dataclass(frozen=True)
class StepKind:
    """A kind of step.

    Attributes:
        inputs: the first one's key is the kind's own name.
        options: dataclass for the other keys.
        run: runs the step.
        refused: maps options that a recipe must not set to the hint that says why.
        complete: adds placeholders to the options for fields that inputs will fill.
        check: raises UsageError if options and inputs do not fit together.
        makes: maps a suffix of the step's name to the artifact's kind, for each artifact that it makes; None if that
            depends on the input. Empty for kinds that only measure or publish.
        gates: returns whether the step is a gate, which must pass before anything is published.
        judge: for a gate: returns why it fails, given the facts; empty if it passes.
        needs_transformers: returns whether the step fails if transformers is not installed.
        not_in_key: options that do not affect what is made or measured, and so are not part of the key.
        precheck: for kinds that publish: called before anything is done; raises what publishing would raise later.
        rehearse: for kinds that publish: called when all inputs exist; returns a summary of what would be sent, or
            raises what publishing would raise.
    """

    inputs: tuple[Input, ...]
    options: type[Any]
    run: Callable[[Work], Outcome]
    refused: Mapping[str, str] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], Inputs], dict[str, Any]] = lambda values, inputs: values
    check: Callable[[Any, Inputs], None] = lambda options, inputs: None
    makes: Callable[[Any], Mapping[str, Kind | None]] = lambda options: {}
    gates: Callable[[Any], bool] = lambda options: False
    judge: Callable[[Any, Facts], str] = lambda options, facts: ""
    needs_transformers: Callable[[Any], bool] = lambda options: False
    not_in_key: frozenset[str] = frozenset({"threads"})
    precheck: Callable[[Any, Signer, Callable[[str], None]], None] | None = None
    rehearse: Callable[[Work], str] | None = None

    @property
    def sends(self) -> bool:
        """Whether it publishes to the Hub."""
        return self.precheck is not None

    def with_keys(self, text: str) -> str:
        """Replace options of the command in a text, such as a hint, by the recipe's keys, if there are such keys."""
        known = {*(option.name for option in fields(self.options)), *(taken.key for taken in self.inputs)}
        keys = {"pr": "pull_request", "weight": "weights"} | {name.replace("_", "-"): name for name in known}
        return _OPTION.sub(lambda found: keys.get(found[1], found[0]), text)
