"""Paged AdamW is torch's AdamW to the bit, whatever is resident."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.training.optimizer import PagedAdamW
from adaptkit.training.paging import PagedState
from adaptkit.training.parameters import Group

CPU = torch.device("cpu")
RATES = [1e-3, 2e-3, 5e-4, 1e-3, 3e-3]


def gradient(count, step):
    return torch.randn(count, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step - 3)


def torch_adamw(start, weight_decay):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], weight_decay=weight_decay, foreach=False, fused=False)
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient(start.numel(), step)
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 130),
    st.lists(st.integers(1, 4000), min_size=len(RATES), max_size=len(RATES)),
    st.sampled_from([0.0, 0.01]),
)
def test_updates_are_those_of_torch_with_any_budget_changed_at_any_step(count, page, budgets, weight_decay):
    start = torch.randn(count, generator=torch.Generator().manual_seed(99))
    parameters, gradients = start.clone(), torch.zeros(count)
    state = PagedState(count, page, budgets[0], CPU)
    optimizer = PagedAdamW(parameters, gradients, [Group(slice(0, count))], state, weight_decay)
    for step, rate in enumerate(RATES):
        state.set_budget(budgets[step])
        gradients.copy_(gradient(count, step))
        optimizer.step(rate)
    for found, expected in zip((parameters, *state.moments()), torch_adamw(start, weight_decay), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("page", [7, 64, 500])
def test_groups_learn_at_their_own_rates_and_decay_as_they_say(page):
    """Two of torch's groups, whose border no page keeps to."""
    start = torch.randn(200, generator=torch.Generator().manual_seed(5))
    torch_groups = [
        {"params": [torch.nn.Parameter(start[:83].clone())], "weight_decay": 0.1},
        {"params": [torch.nn.Parameter(start[83:].clone())], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(torch_groups, foreach=False, fused=False)
    values, gradients = start.clone(), torch.zeros(200)
    groups = [Group(slice(0, 83)), Group(slice(83, 200), rate=16.0, decay=False)]
    ours = PagedAdamW(values, gradients, groups, PagedState(200, page, 3 * 8 * page, CPU), weight_decay=0.1)
    for step, rate in enumerate(RATES):
        gradients.copy_(gradient(200, step))
        for group, span, factor in zip(theirs.param_groups, (slice(0, 83), slice(83, 200)), (1.0, 16.0), strict=True):
            group["lr"] = rate * factor
            group["params"][0].grad = gradients[span].clone()
        theirs.step()
        ours.step(rate)
    assert torch.equal(values, torch.cat([group["params"][0].detach() for group in theirs.param_groups]))


def test_a_cyclic_sweep_reuses_the_resident_subset():
    """With 4 slots for 10 pages, 3 pages stay; least-recently-used would fault on every page of every sweep."""
    state = PagedState(100, 10, 4 * 80, CPU)
    assert (state.pages, state.slots, state.page_bytes) == (10, 4, 80)
    for _ in range(5):
        list(state.sweep())
    assert state.counters.faults == 10 + 4 * 7
    everything = PagedState(100, 10, None, CPU)
    for _ in range(5):
        list(everything.sweep())
    assert everything.counters.faults == 10
    assert everything.counters.evictions == 0


@pytest.mark.parametrize("budget", [1, 170, None])
def test_what_is_written_in_a_sweep_is_there_in_the_next(budget, tmp_path):
    state = PagedState(95, 10, budget, CPU, tmp_path / "pages.bin")
    for span, first, second in state.sweep():
        first.copy_(torch.arange(span.start, span.stop))
        second.fill_(7)
    for span, first, second in state.sweep():
        assert first.tolist() == list(range(span.start, span.stop))
        assert set(second.tolist()) == {7.0}
    first, second = state.moments()
    assert first.tolist() == list(range(95))
    assert second.numel() == 95
    other = PagedState(95, 7, 60, CPU)
    other.load_moments(first, second)
    assert torch.equal(other.moments()[0], first)
    assert (tmp_path / "pages.bin").stat().st_size == 10 * 80


def test_gradients_are_clipped_to_the_norm_as_torch_does():
    gradients = gradient(300, 5)
    parameter = torch.nn.Parameter(torch.zeros(300))
    parameter.grad = gradients.clone()
    expected = torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    optimizer = PagedAdamW(torch.zeros(300), gradients, [Group(slice(0, 300))], PagedState(300, 64, None, CPU))
    assert optimizer.clip(0.5) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(gradients, parameter.grad, rtol=1e-6)
    assert float(gradients.norm()) == pytest.approx(0.5, rel=1e-4)
    before = gradients.clone()
    optimizer.clip(0)
    assert torch.equal(gradients, before)


def test_finding_a_page_takes_no_search():
    """A sweep over many resident pages, through one slot for the rest, looks at each page once."""
    state = PagedState(60_000, 1, 8 * 30_000, CPU)
    start = time.process_time()
    for _ in state.sweep():
        pass
    assert state.counters.faults == 60_000
    assert time.process_time() - start < 10
