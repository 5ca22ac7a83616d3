"""What quantizing a linear costs, and where a few more bits are worth most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from adaptkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def divergence_cost(lost: Tensor, importance: Tensor, gradient_moment: Tensor) -> float:
    """The Kullback-Leibler divergence a token, in nats, that a change of one linear's weight is expected to cost.

    ½ Σ_ij E[g_i²] E[x_j²] lost_ij²: the second-order term, with the Fisher matrix taken as diagonal and as a product of
    outputs and inputs.

    Args:
        lost: (out, in) original minus decoded weight.
        importance: (in,) E[x²] of each input, over tokens.
        gradient_moment: (out,) E[g²] of each output, over tokens, g being the gradient of the summed log-probability of
            labels that were **drawn from the model**, not taken from the text.

    Source: K-FAC (arXiv:1503.05671), its diagonal.
    """
    per_output = lost.double().square() @ importance.double()
    return 0.5 * float(per_output @ gradient_moment.double())


@dataclass(frozen=True)
class Choice:
    """One way to store a linear.

    Attributes:
        nbytes: that it takes.
        cost: in any unit that adds up over linears.
    """

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Upgrade:
    """A step from one way to store a linear to a larger one.

    Attributes:
        name: of the linear.
        choice: index of the new way among its choices.
        extra_bytes: that it takes.
        gain: cost that it saves.
    """

    name: str
    choice: int
    extra_bytes: int
    gain: float

    @property
    def gain_per_byte(self) -> float:
        """What the steps are ordered by."""
        return self.gain / self.extra_bytes


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> list[Upgrade]:
    """Spend a budget on the linears where a byte saves most.

    Every linear starts at its smallest choice. Only steps along the lower convex hull of its choices are made, so that
    gains fall from step to step; a step that does not fit is passed over, with the later ones of its linear.

    Args:
        choices: of each linear, in any order.
        budget_bytes: for all of them together.

    Returns:
        The steps in order, by gain a byte, then by name. What they gain is less than the best possible allocation by no
        more than the gain of one step that did not fit.

    Raises:
        UsageError: a linear without a choice, or a budget below the smallest choices.
    """
    steps = []
    spent = 0
    for name in sorted(choices):
        hull = _hull(name, choices[name])
        spent += choices[name][hull[0]].nbytes
        for before, after in pairwise(hull):
            old, new = choices[name][before], choices[name][after]
            steps.append(Upgrade(name, after, new.nbytes - old.nbytes, old.cost - new.cost))
    if spent > budget_bytes:
        raise UsageError(f"budget: must be at least {spent} bytes, found {budget_bytes}", hint="raise the budget")
    taken, full = [], set()
    for step in sorted(steps, key=lambda step: -step.gain_per_byte):
        if step.name not in full and spent + step.extra_bytes <= budget_bytes:
            taken.append(step)
            spent += step.extra_bytes
        else:
            full.add(step.name)
    return taken


def _hull(name: str, choices: Sequence[Choice]) -> list[int]:
    """Indexes of the choices on the lower convex hull, from the smallest on; each costs less than the one before."""
    if not choices:
        raise UsageError(f"{name}: no choice of encoding is given")
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda index: (choices[index].nbytes, choices[index].cost)):
        new = choices[index]
        if hull and (new.cost >= choices[hull[-1]].cost or new.nbytes == choices[hull[-1]].nbytes):
            continue
        while len(hull) > 1 and _slope(choices[hull[-2]], choices[hull[-1]]) <= _slope(choices[hull[-1]], new):
            hull.pop()
        hull.append(index)
    return hull


def _slope(old: Choice, new: Choice) -> float:
    return (old.cost - new.cost) / (new.nbytes - old.nbytes)
