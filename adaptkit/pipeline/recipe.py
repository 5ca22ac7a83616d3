"""A recipe: what a release is made from, and the steps that make it.

    name: trivia
    sources:
      base: {repo: HuggingFaceTB/SmolLM2-135M-Instruct, revision: main}     a repository of the Hub, or
      questions: {path: data/train.jsonl}                                   a file or folder, from the recipe's folder
    steps:
      base-nf4: {quantize: base, block_size: 64}        KIND: INPUT, then the options of that command
      adapter: {train: base-nf4, data: [questions]}     inputs name sources, or what other steps make

A step's first key says its kind; ``needs`` lists steps that have to be done before, though nothing of theirs goes into
this one. Steps run in the order in which they stand, as far as their inputs allow; those that publish run last, and
wait for every gate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.typed import Place, nearest
from adaptkit.errors import UsageError
from adaptkit.pipeline.steps._kind import Input, Inputs, StepKind


@dataclass(frozen=True)
class Source:
    """Something that a release is made from: a path, or a repository of the Hub.

    Attributes:
        name: in the recipe.
        place: in the recipe.
        path: as it is written there, with forward slashes; from the recipe's folder.
        repo: org/name.
        revision: branch, tag or commit.
    """

    name: str
    place: Place
    path: str | None = None
    repo: str | None = None
    revision: str = "main"

    def written(self) -> dict[str, str]:
        """What the recipe says, for the lock."""
        return {"path": self.path} if self.path is not None else {"repo": str(self.repo), "revision": self.revision}

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Step:
    """Something to do.

    Attributes:
        name: in the recipe.
        kind: name of its kind.
        how: its kind.
        options: of the kind's type; what inputs fill has a stand-in.
        inputs: key -> names of sources and of what steps make.
        needs: names of steps that have to be done before.
        makes: names of its artifacts.
        written: everything that the recipe says of it, for the lock.
        place: in the recipe.
    """

    name: str
    kind: str
    how: StepKind
    options: Any
    inputs: Inputs
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    written: Mapping[str, Any]
    place: Place

    def takes(self) -> Iterator[tuple[Input, str]]:
        """Each input, and each name that it was given."""
        for taken in self.how.inputs:
            for name in self.inputs.get(taken.key, ()):
                yield taken, name


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked as far as it can be before anything is read.

    Attributes:
        path: of the file.
        name: of the release.
        sources: by name.
        steps: by name, in the order in which they run.
    """

    path: Path
    name: str
    sources: Mapping[str, Source]
    steps: Mapping[str, Step]

    def before(self, step: Step) -> list[str]:
        """The steps that a step waits for."""
        makers = {made: other.name for other in self.steps.values() for made in other.makes}
        taken = [makers[name] for _, name in step.takes() if name in makers]
        return list(dict.fromkeys([*taken, *step.needs]))

    def until(self, name: str) -> list[Step]:
        """A step and all that it waits for, in order.

        Raises:
            UsageError: there is no such step.
        """
        if name not in self.steps:
            raise UsageError(f"{self.path}: no step named {name!r}", hint=nearest(name, self.steps, "known steps"))
        wanted, waiting = {name}, [name]
        while waiting:
            found = set(self.before(self.steps[waiting.pop()])) - wanted
            wanted |= found
            waiting += found
        return [step for step in self.steps.values() if step.name in wanted]
