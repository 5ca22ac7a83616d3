"""The plan of a checkpoint at once, from names and shapes, and the right one a little later, from its architecture.

Loading transformers takes seconds; for most checkpoints it says what the names say. So the work begins with what they
say, and the answer is compared as soon as it is there.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError
from adaptkit.operations._inquiry import Inquiry
from adaptkit.operations._quantize.plan import Plan, QuantizeOptions, make_plan
from adaptkit.operations._roles import roles_by_name


class PlanChanged(Exception):  # noqa: N818 - no error: the work begins again
    """The architecture says something else than the plan that was begun with."""


class EarlyPlan:
    """A context manager that plans while others work.

    Args:
        checkpoint: unquantized.
        options: of the run.
    """

    def __init__(self, checkpoint: Checkpoint, options: QuantizeOptions) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._inquiry = Inquiry(checkpoint)
        self._pool = ThreadPoolExecutor(1)
        self._answer: Future[Plan] = self._pool.submit(self._ask)
        self._confirmed: Plan | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inquiry.end()
        self._pool.shutdown()

    def guess(self) -> Plan:
        """What names and shapes say, unless the architecture is quicker or they cannot say."""
        if not self._inquiry.takes_long:
            return self.plan()
        try:
            return make_plan(self._checkpoint, self._options, roles_by_name(self._checkpoint, "so far"))
        except AdaptkitError:
            return self.plan()

    def plan(self) -> Plan:
        """Wait for the right plan.

        Raises:
            AdaptkitError: whatever ``make_plan`` refuses.
        """
        return self._answer.result()

    def check(self, begun: Plan) -> None:
        """Compare a plan with the right one, once that is there; a call costs nothing before and after.

        Raises:
            PlanChanged: they differ in what becomes of some tensor.
            AdaptkitError: whatever ``make_plan`` refuses.
        """
        if self._answer.done() and begun is not self._confirmed:
            self.confirm(begun)
            self._confirmed = begun

    def confirm(self, begun: Plan) -> Plan:
        """Wait for the right plan, which does the same and also says where it comes from.

        Raises:
            PlanChanged: it does something else.
            AdaptkitError: whatever ``make_plan`` refuses.
        """
        right = self.plan()
        if right.tensors != begun.tensors:
            raise PlanChanged
        return right

    def _ask(self) -> Plan:
        return make_plan(self._checkpoint, self._options, self._inquiry.answer())
