"""A recipe: the sources of a release, and the steps that make it.

    name: trivia
    sources:
      base: {repo: HuggingFaceTB/SmolLM2-135M-Instruct, revision: main}     a repository on the Hub, or
      questions: {path: data/train.jsonl}                                   a path relative to the recipe's folder
    steps:
      base-nf4: {quantize: base, block_size: 64}        KIND: INPUT, then the options of that command
      adapter: {train: base-nf4, data: [questions]}     inputs name sources, or outputs of other steps

A step's first key is its kind; ``needs`` lists steps that must run before, although the step does not use their
outputs. Steps run in the order in which they are written, as far as their inputs allow; steps that publish run last,
and wait for every gate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptkit.documents import Place, nearest
from adaptkit.errors import UsageError
from adaptkit.pipeline.artifact import Kind
from adaptkit.pipeline.steps._kind import Input, Inputs, StepKind


@dataclass(frozen=True)
class Source:
    """An input of a release: a path, or a repository on the Hub.

    Attributes:
        name: in the recipe.
        place: location in the recipe, for errors.
        path: as written in the recipe, with forward slashes, relative to the recipe's folder.
        repo: org/name.
        revision: branch, tag or commit.
    """

    name: str
    place: Place
    path: str | None = None
    repo: str | None = None
    revision: str = "main"

    def entry(self) -> dict[str, str]:
        """Return the source's entry in the recipe, with defaults, for the lock."""
        return {"path": self.path} if self.path is not None else {"repo": str(self.repo), "revision": self.revision}

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        name: in the recipe.
        kind: name of its kind.
        how: its kind.
        options: of the kind's type; fields that inputs will fill hold placeholders.
        inputs: key -> names of sources and of other steps' artifacts.
        needs: names of further steps that must run before.
        makes: maps names of its artifacts to their kinds; None if the kind depends on an input.
        entry: the step's entry in the recipe, for the lock.
        place: location in the recipe, for errors.
    """

    name: str
    kind: str
    how: StepKind
    options: Any
    inputs: Inputs
    needs: tuple[str, ...]
    makes: Mapping[str, Kind | None]
    entry: Mapping[str, Any]
    place: Place

    def takes(self) -> Iterator[tuple[Input, str]]:
        """Iterate over the names that the step's inputs list, each with its input, as the step's options narrow it."""
        for taken in self.how.inputs:
            narrowed = replace(taken, takes=taken.takes_with(self.options) or taken.takes)
            for name in self.inputs.get(taken.key, ()):
                yield narrowed, name


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked as far as possible before sources are read.

    Attributes:
        path: of the file.
        name: of the release.
        sources: maps names to sources.
        steps: maps names to steps, in the order in which they run.
    """

    path: Path
    name: str
    sources: Mapping[str, Source]
    steps: Mapping[str, Step]

    def before(self, step: Step) -> list[str]:
        """Return the names of the steps that a step directly waits for."""
        makers = {made: other.name for other in self.steps.values() for made in other.makes}
        taken = [makers[name] for _, name in step.takes() if name in makers]
        return list(dict.fromkeys([*taken, *step.needs]))

    def until(self, name: str) -> list[Step]:
        """Return a step and all steps that it waits for, directly or indirectly, in the order in which they run.

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
