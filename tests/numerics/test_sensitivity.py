"""The cost of an error predicts the divergence, and a budget is spent where a byte saves most."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import UsageError
from adaptkit.numerics.sensitivity import StorageChoice, allocate, divergence_cost
from adaptkit.numerics.tensors import as_array


def test_the_cost_approximates_the_divergence_of_a_softmax_regression():
    """With independent inputs and random errors, the Fisher matrix is nearly the assumed one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 40, generator=generator, dtype=torch.float64) * 0.05
    lost = torch.randn(12, 40, generator=generator, dtype=torch.float64) * 1e-3
    inputs = torch.randint(0, 2, (20000, 40), generator=generator).double() * 2 - 1
    inputs *= torch.linspace(0.1, 2, 40, dtype=torch.float64)
    log_p = torch.log_softmax(inputs @ weight.T, -1)
    log_q = torch.log_softmax(inputs @ (weight - lost).T, -1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    labels = torch.multinomial(log_p.exp(), 1, generator=generator)
    gradient = -log_p.exp()
    gradient.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float64))
    cost = divergence_cost(*map(as_array, (lost, inputs.square().mean(0), gradient.square().mean(0))))
    assert cost == pytest.approx(divergence, rel=0.15)


@st.composite
def problems(draw):
    choices = {}
    for index in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        sizes = st.integers(1, 60)
        costs = st.integers(0, 100)
        choices[f"linear{index}"] = [StorageChoice(draw(sizes), float(draw(costs))) for _ in range(count)]
    least = sum(min(choice.nbytes for choice in ways) for ways in choices.values())
    return choices, least + draw(st.integers(0, 120))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_allocation_is_within_one_step_of_the_best(problem):
    choices, budget = problem
    steps = allocate(choices, budget)
    at = {name: min(range(len(w)), key=lambda i, w=w: (w[i].nbytes, w[i].cost)) for name, w in choices.items()}
    for step in steps:
        before, after = choices[step.name][at[step.name]], choices[step.name][step.choice]
        assert (step.extra_bytes, step.gain) == (after.nbytes - before.nbytes, before.cost - after.cost)
        at[step.name] = step.choice
    chosen = [choices[name][index] for name, index in at.items()]
    assert sum(choice.nbytes for choice in chosen) <= budget
    best = min(
        sum(choice.cost for choice in combination)
        for combination in product(*choices.values())
        if sum(choice.nbytes for choice in combination) <= budget
    )
    largest = max(max(c.cost for c in ways) - min(c.cost for c in ways) for ways in choices.values())
    assert sum(choice.cost for choice in chosen) <= best + largest
    gains = [step.gain / step.extra_bytes for step in steps]
    assert gains == sorted(gains, reverse=True)


def test_steps_do_not_depend_on_the_order_of_the_linears():
    choices = {name: [StorageChoice(1, 2.0), StorageChoice(2, 1.0)] for name in "cab"}
    assert [step.name for step in allocate(choices, 5)] == ["a", "b"]
    assert allocate(dict(sorted(choices.items())), 5) == allocate(choices, 5)


def test_a_larger_choice_that_saves_nothing_is_never_made():
    assert allocate({"a": [StorageChoice(1, 1.0), StorageChoice(2, 1.0), StorageChoice(3, 2.0)]}, 100) == []


def test_a_budget_below_the_smallest_encoding_is_refused():
    with pytest.raises(UsageError, match="budget"):
        allocate({"a": [StorageChoice(5, 1.0)]}, 4)
    with pytest.raises(UsageError, match="no choice of encoding"):
        allocate({"a": []}, 4)
