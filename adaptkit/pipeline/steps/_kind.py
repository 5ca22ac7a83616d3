"""The definition of a kind of step: its inputs, its options, and what it does."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.signing import Signer
from adaptkit.pipeline.artifact import Kind, Takes
from adaptkit.settings import Settings, settings

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
        field: the option that holds the paths, if the operation takes them in its options; nested as in ``key``.
        keyed_option: an option whose keys are also these names.
        many: whether the value is a list of names.
        required: whether the key must be given.
        takes: what it takes.
        takes_with: returns what it takes with these options, if they decide that; otherwise None.
        words: values that the operation interprets itself, instead of as names.
        with_card: whether the operation also reads a folder's model card.
        takes_outputs: whether it may be the output of another step.
        check: raises what the step would raise for a source, before any step is run.
    """

    key: str
    field: str = ""
    keyed_option: str = ""
    many: bool = False
    required: bool = False
    takes: Takes = "folder"
    takes_with: Callable[[Any], Takes | None] = lambda options: None
    words: tuple[str, ...] = ()
    with_card: bool = False
    takes_outputs: bool = True
    check: Callable[[Path], None] = lambda path: None


@dataclass(frozen=True)
class Work:
    """Everything that a kind needs to run a step.

    Attributes:
        paths: maps the inputs' keys to paths.
        options: of the kind's type, with the paths of inputs that are options.
        output: folder to make; a kind that makes several artifacts appends suffixes to its name.
        progress: called with (done, total).
        note: called with a one-line message for the user.
        signer: credentials for steps that sign.
    """

    paths: Mapping[str, tuple[Path, ...]]
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
        options: class of the settings that the other keys are.
        run: runs the step.
        refused: maps options that a recipe must not set to the hint that says why.
        validate: raises UsageError if options and inputs do not fit together.
        makes: maps a suffix of the step's name to the artifact's kind, for each artifact that it makes; None if that
            depends on the input. Empty for kinds that only measure or publish.
        gates: returns whether the step is a gate, which must pass before anything is published.
        judge: for a gate: returns why it fails, given the facts; empty if it passes.
        not_in_key: options that do not affect what is made or measured, and so are not part of the key.
        precheck: for kinds that publish: called before anything is done; raises what publishing would raise later.
        rehearse: for kinds that publish: called when all inputs exist; returns a summary of what would be sent, or
            raises what publishing would raise.
    """

    inputs: tuple[Input, ...]
    options: type[Settings]
    run: Callable[[Work], Outcome]
    refused: Mapping[str, str] = field(default_factory=dict)
    validate: Callable[[Any, Inputs], None] = lambda options, inputs: None
    makes: Callable[[Any], Mapping[str, Kind | None]] = lambda options: {}
    gates: Callable[[Any], bool] = lambda options: False
    judge: Callable[[Any, Facts], str] = lambda options, facts: ""
    not_in_key: frozenset[str] = frozenset({"threads"})
    precheck: Callable[[Any, Signer, Callable[[str], None]], None] | None = None
    rehearse: Callable[[Work], str] | None = None

    @property
    def publishes(self) -> bool:
        """Whether it publishes to the Hub."""
        return self.precheck is not None

    def with_keys(self, text: str) -> str:
        """Replace options of the command in a text, such as a hint, by the recipe's keys, if there are such keys."""
        names = {*(option.name for option in fields(self.options)), *(taken.key for taken in self.inputs)}
        keys = {name.replace("_", "-"): name for name in names}
        keys |= {rule.flag[2:]: name for name, (_, rule) in settings(self.options).items() if rule.flag}
        return _OPTION.sub(lambda found: keys.get(found[1], found[0]), text)

    def with_paths(self, options: Any, names: Inputs, paths: Mapping[str, tuple[Path, ...]]) -> Any:
        """Return the options with the paths of the inputs that are options, instead of their names."""
        changed: dict[str, Any] = {}
        for taken in self.inputs:
            outer, _, inner = taken.field.partition(".")
            if outer and taken.key in paths:
                found: Any = paths[taken.key] if taken.many else paths[taken.key][0]
                changed[outer] = replace(getattr(options, outer), **{inner: found}) if inner else found
            if taken.keyed_option and (values := getattr(options, taken.keyed_option)):
                places = dict(zip(names[taken.key], map(str, paths[taken.key]), strict=True))
                changed[taken.keyed_option] = {places[name]: value for name, value in values.items()}
        return replace(options, **changed)
