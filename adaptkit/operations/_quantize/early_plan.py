"""A provisional plan from names and shapes, checked against the plan from the architecture once that is known.

Loading transformers takes seconds, and for most checkpoints both plans are the same. So work starts with the
provisional plan, which is compared with the other as soon as that is ready.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError
from adaptkit.operations._inquiry import Inquiry
from adaptkit.operations._quantize.plan import Plan, QuantizeOptions, make_plan
from adaptkit.operations._roles import roles_by_name


class PlanChanged(Exception):  # noqa: N818 - no error: the work begins again
    """The plan from the architecture differs from the one that work started with."""


class EarlyPlan:
    """A context manager that computes the plan from the architecture in the background.

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

    def __exit__(self, *_: object) -> None:
        self._inquiry.end()
        self._pool.shutdown()

    def guess(self) -> Plan:
        """Return the plan from names and shapes; wait for ``plan`` if that is quick, or if names are not enough."""
        if not self._inquiry.takes_long:
            return self.plan()
        try:
            return make_plan(self._checkpoint, self._options, roles_by_name(self._checkpoint, "so far"))
        except AdaptkitError:
            return self.plan()

    def plan(self) -> Plan:
        """Wait for the plan from the architecture.

        Raises:
            AdaptkitError: from ``make_plan`` or the inquiry.
        """
        return self._answer.result()

    def check(self, begun: Plan) -> None:
        """Compare a plan with that from the architecture if it is ready; later calls with the same plan cost nothing.

        Raises:
            PlanChanged: a tensor is handled differently.
            AdaptkitError: see ``plan``.
        """
        if self._answer.done() and begun is not self._confirmed:
            self.confirm(begun)
            self._confirmed = begun

    def confirm(self, begun: Plan) -> Plan:
        """Wait for the plan from the architecture; return it, since it reports where it comes from.

        Raises:
            PlanChanged: a tensor is handled differently.
            AdaptkitError: see ``plan``.
        """
        right = self.plan()
        if right.tensors != begun.tensors:
            raise PlanChanged
        return right

    def _ask(self) -> Plan:
        return make_plan(self._checkpoint, self._options, self._inquiry.answer())
