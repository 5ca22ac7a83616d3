"""Find out early what would fail later: before the first step is run, and before anything is sent."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import AdaptkitError, UsageError, install_hint
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.report import Listener
from adaptkit.pipeline.steps._kind import Work


class Foresight:
    """Runs the early checks of steps. In a dry run, what would fail is only a warning.

    Args:
        steps: of the run.
        dry_run: whether to only report what would be done.
        signer: credentials for steps that sign.
        listener: receives notes and warnings.
    """

    def __init__(self, steps: Sequence[Step], dry_run: bool, signer: Signer, listener: Listener) -> None:
        self._steps, self._dry_run, self._signer, self._listener = steps, dry_run, signer, listener
        self._asked_for_work = self._asked_for_sending = False

    def require_packages(self, must_run: Callable[[Step], bool]) -> None:
        """Check that the packages of steps are installed.

        Args:
            must_run: returns whether a step is known to have no kept outputs.

        Raises:
            UsageError: a step that must run would fail (not in a dry run).
        """
        if find_spec("transformers") is not None:
            return
        for step in self._steps:
            if step.how.needs_transformers(step.options) and must_run(step):
                with self._warn_in_dry_run(step):
                    raise UsageError("this needs the package transformers", hint=install_hint("train"))

    def before_work(self, must_run: Callable[[Step], bool]) -> None:
        """Run the checks that do not depend on what the steps make; called before each step that runs, acts only once.

        Args:
            must_run: see ``require_packages``.

        Raises:
            AdaptkitError: a step would fail (not in a dry run).
        """
        if self._asked_for_work:
            return
        self._asked_for_work = True
        self.require_packages(must_run)
        for step in self._steps:
            if step.how.precheck is not None:
                with self._warn_in_dry_run(step):
                    step.how.precheck(self._early_options(step), self._signer, self._listener.note_of(step))

    def before_sending(self, sendings: Iterable[tuple[Step, Work]]) -> None:
        """Before the first step that publishes, rehearse all later ones; acts only once.

        Args:
            sendings: all steps that publish, in order, with their work.

        Raises:
            AdaptkitError: publishing would be rejected (not in a dry run).
        """
        if self._asked_for_sending:
            return
        self._asked_for_sending = True
        for step, work in list(sendings)[1:]:
            self.of(step, work)

    def of(self, step: Step, work: Work) -> str:
        """Return a summary of what a step that publishes would send; empty in a dry run if it would be rejected.

        Raises:
            AdaptkitError: publishing would be rejected (not in a dry run).
        """
        with self._warn_in_dry_run(step):
            early = replace(work, options=self._early_options(step))
            return step.how.rehearse(early) if step.how.rehearse is not None else ""
        return ""

    def _early_options(self, step: Step) -> Any:
        """Return the options to check a step with: without a pull request if an earlier step makes its repository."""
        before = self._steps[: self._steps.index(step)]
        made = {other.options.repo.casefold() for other in before if other.how.sends and not other.options.pull_request}
        asks = step.how.sends and step.options.pull_request and step.options.repo.casefold() in made
        return replace(step.options, pull_request=False) if asks else step.options

    @contextmanager
    def _warn_in_dry_run(self, step: Step) -> Iterator[None]:
        try:
            with prefix_errors(step):
                yield
        except AdaptkitError as error:
            if not self._dry_run:
                raise
            self._listener.note(f"warning: this would be rejected: {error.message}")


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
