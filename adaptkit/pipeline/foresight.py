"""What would be refused in the end, asked before anything is done, and before anything is sent."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import AdaptkitError
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.report import Listener
from adaptkit.pipeline.steps._kind import Work

_OPTION = re.compile(r"--([a-z][a-z-]*)")


class Foresight:
    """Asks the Hub on behalf of the steps that send; a dry run is told of a refusal, and goes on.

    Args:
        steps: of the run.
        dry_run: nothing is going to be done.
        signer: who signs, where a step asks for it.
        listener: told.
    """

    def __init__(self, steps: Sequence[Step], dry_run: bool, signer: Signer, listener: Listener) -> None:
        self._steps, self._dry_run, self._signer, self._listener = steps, dry_run, signer, listener
        self._asked_for_work = self._asked_for_sending = False

    def before_work(self) -> None:
        """Before the first step that has to be done, ask what would be refused whatever is made.

        Raises:
            AdaptkitError: what would be refused.
        """
        if self._asked_for_work:
            return
        self._asked_for_work = True
        for step in self._steps:
            if step.how.foresee is not None:
                with self._told(step):
                    step.how.foresee(step.options, self._signer, self._listener.note_of(step))

    def before_sending(self, sendings: Iterable[tuple[Step, Work]]) -> None:
        """Before the first of several steps that send, ask whether a later one would be refused.

        Args:
            sendings: all of them, in order.

        Raises:
            AdaptkitError: what would be refused.
        """
        if self._asked_for_sending:
            return
        self._asked_for_sending = True
        for step, work in list(sendings)[1:]:
            self.of(step, work)

    def of(self, step: Step, work: Work) -> str:
        """What a step that sends would send.

        Raises:
            AdaptkitError: what would be refused.
        """
        with self._told(step):
            return step.how.rehearse(work) if step.how.rehearse is not None else ""
        return ""

    @contextmanager
    def _told(self, step: Step) -> Iterator[None]:
        try:
            with named_after(step):
                yield
        except AdaptkitError as error:
            if not self._dry_run:
                raise
            self._listener.note(f"warning: this would be rejected: {error.message}")


@contextmanager
def named_after(step: Step) -> Iterator[None]:
    """Put a step's name before what its operation says of an error."""
    try:
        yield
    except AdaptkitError as error:
        error.message = f"{step.name}: {error.message}"
        error.args = (error.message,)
        error.hint = _OPTION.sub(lambda found: _key_of(found[1], step), error.hint)
        error.hint = error.hint.replace("another -o", "another --work")  # where outputs of a run go
        raise


def _key_of(option: str, step: Step) -> str:
    """What a recipe calls an option of the step's command."""
    name = {"pr": "pull_request"}.get(option, option.replace("-", "_"))
    return name if hasattr(step.options, name) else f"--{option}"
