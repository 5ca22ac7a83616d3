"""Checks of what the sources are before a step runs, and errors of steps with their names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adaptkit.errors import AdaptkitError
from adaptkit.pipeline.artifact import Kind, check_kind, kind_of
from adaptkit.pipeline.recipe import Recipe, Step
from adaptkit.pipeline.report import Listener


@contextmanager
def prefix_errors(step: Step) -> Iterator[None]:
    """Prefix errors with a step's name, and replace command-line options in hints by the recipe's keys."""
    try:
        yield
    except AdaptkitError as error:
        error.message = f"{step.name}: {error.message}"
        error.args = (error.message,)
        hint = step.how.with_keys(error.hint)
        error.advise(hint.replace("another -o", "another --work"))  # outputs of a run go to the work folder
        raise


def check_sources(recipe: Recipe, steps: list[Step], found: Mapping[str, Path]) -> None:
    """Check that steps take the sources that they use, themselves or as a copy that another step makes.

    Args:
        recipe: of the run.
        steps: of the run.
        found: maps names of sources to paths; the others are not checked.

    Raises:
        AdaptkitError: a step does not take its input, or its kind cannot be found.
    """
    kinds: dict[tuple[Path, bool], Kind] = {}  # reading all headers of a large checkpoint takes seconds
    for step in steps:
        for taken, name in step.takes():
            maker = recipe.steps.get(name)
            is_copy = maker is not None and None in maker.makes.values()  # of the maker's first input
            path = found.get(next(maker.takes())[1] if maker is not None and is_copy else name)
            if path is None:
                continue
            place = step.place.at(*taken.key.split("."))
            if path.is_dir() == (taken.takes == "file"):
                problem = "folder; expected a file" if path.is_dir() else "file; expected a folder"
                raise place.error(f"{name!r} is a {problem}")
            if taken.takes not in ("file", "folder"):
                asked = path, is_copy or taken.takes == "adapter"
                with prefix_errors(step):
                    kinds[asked] = kinds.get(asked) or kind_of(path, as_adapter=asked[1])
                check_kind(kinds[asked], taken.takes, name, place)
            with prefix_errors(step):
                taken.check(path)


@contextmanager
def rejections_noted(step: Step, dry_run: bool, listener: Listener) -> Iterator[None]:
    """Prefix errors as ``prefix_errors`` does; in a dry run, note that publishing would be rejected, and go on."""
    try:
        with prefix_errors(step):
            yield
    except AdaptkitError as error:
        if not dry_run:
            raise
        listener.note(f"warning: this would be rejected: {error.message}")
