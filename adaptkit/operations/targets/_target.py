"""A target: a program, and a table of its answers to the features that an adapter's or a checkpoint's files have."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles


@dataclass(frozen=True)
class Finding:
    """One thing that a program refuses, gets wrong, or accepts only under a condition.

    Attributes:
        level: ``error`` if the program refuses the files or computes something else; ``warning`` if it needs a flag, or
            handles the files differently in some versions or cases.
        found: what was found, with the name of a tensor or key.
        effect: what the program does with it.
        change: what to do about it: a command, or a flag of the program.
    """

    level: Literal["error", "warning"]
    found: str
    effect: str
    change: str


@dataclass(frozen=True)
class Sighting:
    """A feature that the files have.

    Attributes:
        feature: its name in tables.
        found: as in ``Finding``.
        values: more about it, for the texts of answers.
        doubtful: whether an answer that is an error is only a warning, since the files do not tell enough.
    """

    feature: str
    found: str
    values: Mapping[str, object] = field(default_factory=dict)
    doubtful: bool = False


@dataclass(frozen=True)
class Response:
    """What a program does with a feature.

    Attributes:
        level: as in ``Finding``.
        effect: what it does; ``{program}`` is its name, other names are values of the sighting.
        change: what to do about it; ``{root}`` is the folder, and ``ways`` of the files are names, too.
    """

    level: Literal["error", "warning"]
    effect: str
    change: str


def error(effect: str, change: str = "{merge}") -> Response:
    """Return the answer of a program that refuses the files or computes something else."""
    return Response("error", effect, change)


def warning(effect: str, change: str) -> Response:
    """Return the answer of a program that accepts the files under a condition."""
    return Response("warning", effect, change)


@dataclass(frozen=True)
class Program:
    """A program. A feature that is not in its table it handles as peft and transformers do.

    Attributes:
        program: its name in texts.
        loader: the same for what reads checkpoints.
        version: name and version of what the tables were read from.
        tried_in: the test or script that compares the tables with the program itself; empty if there is none.
        adapter: answers to features of adapters.
        checkpoint: answers to features of checkpoints.
        in_adapter: iterates over the features of an adapter.
        in_checkpoint: iterates over the features of a checkpoint.
    """

    program: str
    loader: str
    version: str
    tried_in: str
    adapter: Mapping[str, Response]
    checkpoint: Mapping[str, Response]
    in_adapter: Callable[[AdapterFiles], Iterable[Sighting]]
    in_checkpoint: Callable[[CheckpointFiles], Iterable[Sighting]]

    def findings(self, files: AdapterFiles | CheckpointFiles) -> Iterator[Finding]:
        """Iterate over the findings about an adapter or a checkpoint."""
        if isinstance(files, AdapterFiles):
            answers, sightings, ways = self.adapter, self.in_adapter(files), {"program": self.program, **files.ways}
        else:
            answers, sightings = self.checkpoint, self.in_checkpoint(files)
            ways = {"program": self.loader, "root": files.root}
        for sighting in sightings:
            answer = answers.get(sighting.feature)
            if answer is not None:
                effect, change = (
                    text.format_map({**ways, **sighting.values}) for text in (answer.effect, answer.change)
                )
                yield Finding("warning" if sighting.doubtful else answer.level, sighting.found, effect, change)


def some(names: Collection[str]) -> str:
    """Return the first of some names in sorted order, and how many more there are."""
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def seen(
    feature: str, names: Collection[str], what: str = "", *, doubtful: bool = False, **values: object
) -> Iterator[Sighting]:
    """Yield a sighting of tensors or modules; nothing if there are no names.

    ``what`` is said of the names, which are put in the place of its ``{}`` or else before it.
    """
    if names:
        found = what.replace("{}", some(names)) if "{}" in what else ": ".join(filter(None, (some(names), what)))
        yield Sighting(feature, found, values, doubtful)
