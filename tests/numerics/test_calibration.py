"""Activation-weighted scales give less error than plain ones, and decode by the ordinary formula."""

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.numerics import calibration
from adaptkit.numerics.absmax import dequantize_absmax, dynamic_map, quantize_absmax
from adaptkit.numerics.calibration import (
    FACTORS,
    FLOOR,
    encode_at,
    nest_scales,
    nf4_error,
    search_scales,
    weighted_nf4,
)
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.kernels.codebook import NF4, NF4_LEVELS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@st.composite
def problems(draw):
    """A weight and an importance: usual ones, outliers, zero blocks, inputs never used, tails, blocks across rows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 300))
    weight = torch.randn(rows, columns, generator=generator)
    kind = draw(st.sampled_from(["normal", "outliers", "sparse", "wild"]))
    if kind == "outliers":
        weight[torch.rand(rows, columns, generator=generator) < 0.01] *= 50
    elif kind == "sparse":
        weight[torch.rand(rows, columns, generator=generator) < 0.95] = 0
    elif kind == "wild":
        weight *= torch.exp(6 * torch.randn(rows, 1, generator=generator))
    importance = torch.exp(3 * torch.randn(columns, generator=generator))
    if draw(st.booleans()):
        importance[torch.rand(columns, generator=generator) < 0.5] = 0
    scale = draw(st.sampled_from([1e-6, 0.02, 30]))
    dtype = draw(st.sampled_from(DTYPES))
    largest = torch.finfo(dtype).max
    return (weight * scale).clamp(-largest, largest).to(dtype), importance * draw(st.sampled_from([1e-9, 1.0, 1e6]))


def weighted_error(weight, importance, codes, constants, block_size):
    """Σ_ij (W - Q)_ij² · importance_j in float64, Q being the decoded float32 weight."""
    lost = nf4_error(weight, codes, constants, block_size)
    return float(lost.double().square().sum(0) @ importance.double())


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([32, 64, 256]), st.booleans())
def test_the_weighted_error_is_never_larger_than_that_of_plain_nf4(problem, block_size, double_quant):
    weight, importance = problem
    codes, constants = weighted_nf4(weight, importance, block_size, double_quant)
    _, plain, _ = reference.encode_4bit(weight, block_size, NF4)
    plain = quantize_absmax(plain) if double_quant else plain
    plain_codes = encode_at(weight, dequantize_absmax(plain), block_size)
    floored = importance.double() + FLOOR * importance.double().mean()
    found = weighted_error(weight, floored, codes, constants, block_size)
    assert found <= weighted_error(weight, floored, plain_codes, plain, block_size) * (1 + 1e-5)
    assert bool(torch.isfinite(dequantize_absmax(constants)).all())


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([32, 64]))
def test_with_a_single_candidate_the_result_is_plain_nf4(problem, block_size):
    weight, _ = problem
    uniform = torch.ones(weight.shape[1])
    plain_codes, plain, _ = reference.encode_4bit(weight, block_size, NF4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "FACTORS", np.ones(1, np.float32))
        patch.setattr(calibration, "REACH", 0)
        codes, absmax = weighted_nf4(weight, uniform, block_size, double_quant=False)
        nested_codes, constants = weighted_nf4(weight, uniform, block_size, double_quant=True)
    zero = plain < 1e-38
    assert torch.equal(absmax[~zero], plain[~zero])
    assert torch.equal(codes, plain_codes)
    expected = quantize_absmax(absmax)
    assert torch.equal(constants.codes, expected.codes)
    assert torch.equal(constants.nested_absmax, expected.nested_absmax)
    assert torch.equal(nested_codes, encode_at(weight, dequantize_absmax(expected), block_size))


def _errors(block, h, scales):
    """Σ h (w - q s)² in float64 over all candidate scales, each weight at the level that is nearest, by brute force."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    distances = (block.double().view(1, -1, 1) - scales.double().view(-1, 1, 1) * levels).square().amin(dim=2)
    return distances @ h.double()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(20, 70))
def test_the_best_candidate_is_chosen(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    importance = torch.rand(columns, generator=generator) + 0.01
    scales = search_scales(weight, importance, 32)
    important = (importance.double() + FLOOR * importance.double().mean()).repeat(rows)
    for block, scale in enumerate(scales):
        part = slice(block * 32, (block + 1) * 32)
        weights, h = weight.reshape(-1)[part], important[part]
        errors = _errors(weights, h, torch.from_numpy(FACTORS) * weights.abs().max())
        assert float(_errors(weights, h, scale.view(1))) <= float(errors.min()) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_the_best_nested_code_is_chosen(seed, signed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator)
    importance = torch.rand(64, generator=generator) + 0.01
    scales = search_scales(weight, importance, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "REACH", 255)
        found = nest_scales(weight, scales if signed else scales.abs(), importance, 32)
    every = dynamic_map() * found.nested_absmax[0] + found.offset
    allowed = every if signed else every[every > 0]
    h = importance.double() + FLOOR * importance.double().mean()
    for block, scale in enumerate(dequantize_absmax(found)):
        part = slice(block % 2 * 32, block % 2 * 32 + 32)
        weights = weight.reshape(-1)[block * 32 : block * 32 + 32]
        least = float(_errors(weights, h[part], allowed).min())
        assert float(_errors(weights, h[part], scale.view(1))) <= least * (1 + 1e-5)


def test_a_search_by_row_blocks_gives_the_same_scales():
    generator = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(12, 96, generator=generator), torch.rand(96, generator=generator)
    parts = [search_scales(part, importance) for part in weight.split(4)]
    assert torch.equal(torch.cat(parts), search_scales(weight, importance))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_a_weight_does_not_affect_the_result(dtype):
    generator = torch.Generator().manual_seed(2)
    weight, importance = torch.randn(8, 128, generator=generator).to(dtype), torch.rand(128, generator=generator)
    for found, expected in zip(
        weighted_nf4(weight, importance, double_quant=False),
        weighted_nf4(weight.float(), importance, double_quant=False),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_bitsandbytes_decodes_negative_scales_by_the_same_formula():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(64, 128, generator=generator), torch.rand(128, generator=generator)
    codes, constants = weighted_nf4(weight, importance)
    assert bool((dequantize_absmax(constants) < 0).any())
    assert bool((dequantize_absmax(constants) > 0).any())
    functional = bitsandbytes.functional
    nested = functional.QuantState(constants.nested_absmax, code=dynamic_map(), blocksize=256, dtype=torch.float32)
    state = functional.QuantState(
        constants.codes, weight.shape, torch.tensor(NF4_LEVELS), 64, "nf4", torch.float32,
        torch.tensor(constants.offset), nested,
    )  # fmt: skip
    theirs = functional.dequantize_4bit(codes.view(-1, 1), state)
    ours = nf4_error(torch.zeros(64, 128), codes, constants)
    assert torch.equal(theirs, -ours)


def test_a_negative_scale_is_chosen_for_a_block_of_negated_levels(monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", np.array([1, -1], np.float32))
    levels = -torch.tensor(NF4_LEVELS).repeat(2)  # exact with a negative scale only
    scales = search_scales(levels.view(1, 32), torch.ones(32), 32)
    assert scales.tolist() == [-1.0]


@pytest.mark.parametrize(
    ("weight", "importance", "error"),
    [
        (torch.ones(2, 32), torch.ones(31), UsageError),
        (torch.ones(64), torch.ones(64), UsageError),
        (torch.ones(2, 32), -torch.ones(32), UsageError),
        (torch.ones(2, 32), torch.full((32,), torch.nan), NonFiniteError),
        (torch.full((2, 32), torch.inf), torch.ones(32), NonFiniteError),
    ],
)
def test_invalid_weights_and_importances_are_refused(weight, importance, error):
    with pytest.raises(error):
        weighted_nf4(weight, importance)
