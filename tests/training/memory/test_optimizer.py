"""Paged AdamW equals torch's bit for bit with any budget; results with 8-bit moments do not depend on it either."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.numerics.absmax import dynamic_levels
from adaptkit.training.memory.adamw import BLOCK, AdamW
from adaptkit.training.memory.moments import PagedState, page_elements
from adaptkit.training.memory.optimizer import PagedAdamW
from adaptkit.training.memory.parameters import Group

CPU = torch.device("cpu")
RATES = [1e-3, 2e-3, 5e-4, 1e-3, 3e-3]


def gradient(count, step):
    return torch.randn(count, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step - 3)


def torch_adamw(start, weight_decay):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], weight_decay=weight_decay, fused=True)
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient(start.numel(), step)
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def moments(state):
    return {name: vector.whole() for name, vector in state.vectors().items()}


def run(count, state, budgets, weight_decay=0.01):
    """Return parameters and state after a step per budget."""
    values, gradients = torch.randn(count, generator=torch.Generator().manual_seed(99)), torch.zeros(count)
    optimizer = PagedAdamW(values, gradients, [Group(slice(0, count))], state, weight_decay)
    for step, (rate, budget) in enumerate(zip(RATES, budgets, strict=True)):
        state.pages.set_budget(budget)
        gradients.copy_(gradient(count, step))
        optimizer.step(rate)
    return {"parameters": values} | moments(state)


budgets = st.lists(st.one_of(st.none(), st.integers(1, 6000)), min_size=len(RATES), max_size=len(RATES))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 130), budgets, st.sampled_from([0.0, 0.01]))
def test_updates_equal_those_of_torch_with_any_budget_changed_at_any_step(vectors, page, budgets, weight_decay):
    """Counts are multiples of torch's vector size, since torch rounds remaining elements differently."""
    count = 64 * vectors
    found = run(count, PagedState(count, page, budgets[0], CPU), budgets, weight_decay)
    start = torch.randn(count, generator=torch.Generator().manual_seed(99))
    for name, expected in zip(found, torch_adamw(start, weight_decay), strict=True):
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("resident", [0, 1, 4, 7])
def test_resident_pages_are_updated_together_with_the_same_bits(resident, monkeypatch):
    """As on a GPU. Groups end inside pages; with four resident pages, one ends inside the last of these."""
    count, calls, update = 700, [], AdamW.update

    def steps():
        values = torch.randn(count, generator=torch.Generator().manual_seed(99))
        gradients, state = torch.zeros(count), PagedState(count, 100, 8 * 100 * (resident + 1), CPU)
        groups = [Group(slice(0, 150)), Group(slice(150, 390), rate=4.0), Group(slice(390, count), decay=False)]
        optimizer = PagedAdamW(values, gradients, groups, state, 0.01)
        for step, rate in enumerate(RATES):
            gradients.copy_(gradient(count, step))
            optimizer.step(rate)
        return {"parameters": values} | moments(state), state.pages.resident

    expected, _ = steps()
    monkeypatch.setattr(PagedState, "stays", lambda state, page: page < state.pages.resident)
    monkeypatch.setattr(AdamW, "update", lambda *given: [calls.append(len(given[1])), update(*given)])
    found, stayed = steps()
    assert stayed == resident
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert max(calls) == {0: 1, 1: 2, 4: 3, 7: 4}[resident]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 3), budgets)
def test_8_bit_moments_depend_on_neither_pages_nor_budget(count, blocks, budgets):
    expected = run(count, PagedState(count, 2048, None, CPU, bits=8), [None] * len(RATES))
    found = run(count, PagedState(count, blocks * BLOCK, budgets[0], CPU, bits=8), budgets)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["first_moment_codes"].dtype == torch.uint8


def test_8_bit_adamw_equals_its_formula():
    """Decode, AdamW in torch, encode as the nearest of bitsandbytes' levels: block-wise AdamW of arXiv:2110.02861."""
    count = 1024
    found = run(count, PagedState(count, BLOCK, None, CPU, bits=8), [None] * len(RATES))
    values = torch.randn(count, generator=torch.Generator().manual_seed(99))
    moments = [torch.zeros(count), torch.zeros(count)]
    for step, rate in enumerate(RATES):
        parameter = torch.nn.Parameter(values)
        optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.01, fused=True)
        parameter.grad = gradient(count, step)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)), "exp_avg": moments[0], "exp_avg_sq": moments[1],
        }  # fmt: skip
        optimizer.step()
        values, codes = parameter.detach(), {}
        for index, name in enumerate(("first_moment", "second_moment")):
            blocks, levels = moments[index].view(-1, BLOCK), torch.from_numpy(dynamic_levels(signed=index == 0))
            absmax = blocks.abs().amax(1, keepdim=True)
            codes[name] = torch.bucketize(blocks / absmax, (levels[:-1] + levels[1:]) / 2)
            if index == 1:  # a positive value is never encoded as zero
                codes[name].clamp_(min=1)
            moments[index] = (levels[codes[name]] * absmax).view(-1)
    assert torch.equal(found["parameters"], values)
    for name, expected in codes.items():
        assert torch.equal(found[f"{name}_codes"].long(), expected.view(-1))


def test_8_bit_adamw_learns_what_32_bit_adamw_learns():
    target = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    losses = {}
    for bits in (32, 8):
        values, gradients = torch.zeros(4096), torch.zeros(4096)
        state = PagedState(4096, 1024, None, CPU, bits=bits)
        optimizer = PagedAdamW(values, gradients, [Group(slice(0, 4096))], state)
        for _ in range(100):
            gradients.copy_(values - target)
            optimizer.step(0.02)
        losses[bits] = float((values - target).square().mean())
    assert losses[32] < 0.2
    assert losses[8] == pytest.approx(losses[32], rel=0.15)


@pytest.mark.parametrize("sizes", [(512, 256), (256, 512)], ids=["smaller", "larger"])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_state_loaded_into_pages_of_a_different_size_continues_with_the_same_bits(bits, sizes, tmp_path):
    expected = run(900, PagedState(900, BLOCK, None, CPU, bits=bits), [None] * len(RATES))
    halves = [
        PagedState(900, size, budget, CPU, tmp_path / f"{size}", bits)
        for size, budget in zip(sizes, (1, 5000), strict=True)
    ]
    values, gradients = torch.randn(900, generator=torch.Generator().manual_seed(99)), torch.zeros(900)
    for step, rate in enumerate(RATES):
        state = halves[step // 3]
        optimizer = PagedAdamW(values, gradients, [Group(slice(0, 900))], state, 0.01)
        optimizer.steps = step
        if step == 3:
            state.load(halves[0].vectors())
        gradients.copy_(gradient(900, step))
        optimizer.step(rate)
    found = {"parameters": values} | moments(halves[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_page_holds_whole_blocks():
    assert page_elements(2 << 20, 32) == 1 << 18
    assert page_elements(2 << 20, 8) == (2 << 20) // 520 * 256
    assert page_elements(1024, 32) == page_elements(1, 8) == BLOCK


@pytest.mark.parametrize("page", [7, 64, 500])
def test_groups_have_their_own_learning_rates_and_weight_decay(page):
    """Compare with two of torch's groups; a page may contain parts of both."""
    start = torch.randn(256, generator=torch.Generator().manual_seed(5))
    torch_groups = [
        {"params": [torch.nn.Parameter(start[:128].clone())], "weight_decay": 0.1},
        {"params": [torch.nn.Parameter(start[128:].clone())], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(torch_groups, fused=True)
    values, gradients = start.clone(), torch.zeros(256)
    groups = [Group(slice(0, 128)), Group(slice(128, 256), rate=16.0, decay=False)]
    ours = PagedAdamW(values, gradients, groups, PagedState(256, page, 3 * 8 * page, CPU), weight_decay=0.1)
    for step, rate in enumerate(RATES):
        gradients.copy_(gradient(256, step))
        for group, span, factor in zip(theirs.param_groups, (slice(0, 128), slice(128, 256)), (1.0, 16.0), strict=True):
            group["lr"] = rate * factor
            group["params"][0].grad = gradients[span].clone()
        theirs.step()
        ours.step(rate)
    assert torch.equal(values, torch.cat([group["params"][0].detach() for group in theirs.param_groups]))


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


def test_the_norm_of_many_gradients_is_as_exact_as_that_of_few():
    """One float32 sum of 20 million squares loses a thousandth; the reference is in float64."""
    count = 20_000_003
    gradients = torch.full((count,), 0.001).mul_(1 + torch.arange(count) % 7)
    expected = float(torch.linalg.vector_norm(gradients, dtype=torch.float64))
    optimizer = PagedAdamW(torch.zeros(1), gradients, [Group(slice(0, 1))], PagedState(1, 64, None, CPU))
    assert optimizer.clip(0) == pytest.approx(expected, rel=1e-6)
    optimizer.clip(1)
    assert float(torch.linalg.vector_norm(gradients, dtype=torch.float64)) == pytest.approx(1, rel=1e-6)
