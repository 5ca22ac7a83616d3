"""Checks that would fail a run later: of what the sources are before a step runs, and of what is to be published."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import AdaptkitError
from adaptkit.pipeline.artifact import Kind, check_kind, kind_of
from adaptkit.pipeline.recipe import Recipe, Step
from adaptkit.pipeline.report import Listener
from adaptkit.pipeline.steps._kind import Work


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


class PublishChecks:
    """Asks the Hub, before the work of making artifacts, whether they could be published; in a dry run, it only warns.

    Args:
        steps: of the run.
        dry_run: whether to only report what would be done.
        signer: credentials for steps that sign.
        listener: receives notes and warnings.
    """

    def __init__(self, steps: list[Step], dry_run: bool, signer: Signer, listener: Listener) -> None:
        self._steps, self._dry_run, self._signer, self._listener = steps, dry_run, signer, listener
        self._is_asked = False

    def before_work(self) -> None:
        """Check what does not depend on what the steps make; called before each step that runs, acts only once.

        Raises:
            AdaptkitError: a step would fail (not in a dry run).
        """
        for step in self._steps if not self._is_asked else ():
            if step.how.precheck is not None:
                with self._warn_in_dry_run(step):
                    step.how.precheck(step.options, self._signer, self._listener.note_of(step))
        self._is_asked = True

    def rehearse(self, step: Step, work: Work) -> str:
        """Return a summary of what a step that publishes would send; empty in a dry run if it would be rejected.

        Raises:
            AdaptkitError: publishing would be rejected (not in a dry run).
        """
        with self._warn_in_dry_run(step):
            return step.how.rehearse(work) if step.how.rehearse is not None else ""
        return ""

    @contextmanager
    def _warn_in_dry_run(self, step: Step) -> Iterator[None]:
        try:
            with prefix_errors(step):
                yield
        except AdaptkitError as error:
            if not self._dry_run:
                raise
            self._listener.note(f"warning: this would be rejected: {error.message}")
