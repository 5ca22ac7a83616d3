"""The cost of quantizing each linear, and the allocation of a byte budget by that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array


def divergence_cost(lost: Array, importance: Array, gradient_moment: Array) -> float:
    """Estimate the Kullback-Leibler divergence per token, in nats, caused by quantizing one linear's weight.

    ½ Σ_ij E[g_i²] E[x_j²] lost_ij²: the second-order term, with the Fisher matrix approximated as diagonal and as a
    product of an output and an input factor.

    Args:
        lost: (out, in) original minus dequantized weight.
        importance: (in,) E[x²] of each input, over tokens.
        gradient_moment: (out,) E[g²] of each output, over tokens; g is the gradient of the summed log-probability of
            labels that were **sampled from the model**, not taken from the text.

    Source: K-FAC (arXiv:1503.05671), its diagonal.
    """
    per_output = np.square(lost.astype(np.float64)) @ importance.astype(np.float64)
    return 0.5 * float(per_output @ gradient_moment.astype(np.float64))


class StorageChoice(NamedTuple):
    """One way to store a linear.

    Attributes:
        nbytes: size in bytes.
        cost: cost, in any unit that can be summed over linears.
    """

    nbytes: int
    cost: float


class StorageStep(NamedTuple):
    """A step from one way to store a linear to a larger one.

    Attributes:
        name: name of the linear.
        choice: index of the new choice among the linear's choices.
        extra_bytes: bytes that it takes more than the previous choice.
        gain: cost that it saves.
    """

    name: str
    choice: int
    extra_bytes: int
    gain: float


def allocate(choices: Mapping[str, Sequence[StorageChoice]], budget_bytes: int) -> list[StorageStep]:
    """Allocate a byte budget greedily to the linears where a byte saves the most cost.

    Every linear starts at its smallest choice. Only steps along the lower convex hull of its choices are considered, so
    that the gain per byte falls from step to step. A step that does not fit is skipped, with the linear's later steps.

    Args:
        choices: choices of each linear, in any order.
        budget_bytes: budget for all linears together.

    Returns:
        The steps taken, ordered by gain per byte, then by name. Their gain is below that of the best possible
        allocation by at most the gain of the first step that did not fit.

    Raises:
        UsageError: a linear has no choice, or the budget is below the sum of the smallest choices.
    """
    steps, spent = [], 0
    for name in sorted(choices):
        hull = _hull(name, choices[name])
        spent += choices[name][hull[0]].nbytes
        for before, after in pairwise(hull):
            old, new = choices[name][before], choices[name][after]
            steps.append(StorageStep(name, after, new.nbytes - old.nbytes, old.cost - new.cost))
    if spent > budget_bytes:
        raise UsageError(f"budget: must be at least {spent} bytes, found {budget_bytes}", hint="raise the budget")
    taken, full = [], set()
    for step in sorted(steps, key=lambda step: -step.gain / step.extra_bytes):
        if step.name not in full and spent + step.extra_bytes <= budget_bytes:
            taken.append(step)
            spent += step.extra_bytes
        else:
            full.add(step.name)
    return taken


def _hull(name: str, choices: Sequence[StorageChoice]) -> list[int]:
    """Return indexes of the choices on the lower convex hull, by ascending size and descending cost."""
    if not choices:
        raise UsageError(f"{name}: no choice of encoding is given")
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=choices.__getitem__):
        new = choices[index]
        if hull and (new.cost >= choices[hull[-1]].cost or new.nbytes == choices[hull[-1]].nbytes):
            continue
        while len(hull) > 1 and _slope(choices[hull[-2]], choices[hull[-1]]) <= _slope(choices[hull[-1]], new):
            hull.pop()
        hull.append(index)
    return hull


def _slope(old: StorageChoice, new: StorageChoice) -> float:
    return (old.cost - new.cost) / (new.nbytes - old.nbytes)
