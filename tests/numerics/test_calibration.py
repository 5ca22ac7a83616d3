"""Activation-weighted scales give less error than plain ones, and decode by the ordinary formula."""

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.numerics import calibration
from adaptkit.numerics.absmax import dequantize_absmax, dynamic_levels, quantize_absmax
from adaptkit.numerics.calibration import (
    FACTORS,
    FLOOR,
    encode_at,
    nest_scales,
    nf4_error,
    prepare,
    search_scales,
    weighted_nf4,
)
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.kernels.codebook import NF4, NF4_LEVELS
from adaptkit.numerics.tensors import as_array, as_tensor

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
    weight = (weight * scale).clamp(-largest, largest).to(dtype)
    return as_array(weight), as_array(importance * draw(st.sampled_from([1e-9, 1.0, 1e6])))


def some(*shape, seed=0):
    """Return a random weight and the importance of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    return as_array(torch.randn(shape, generator=generator)), as_array(torch.rand(shape[1], generator=generator) + 0.01)


def plain_nf4(weight, block_size, double_quant):
    _, absmax, _ = reference.encode_4bit(weight, block_size, NF4)
    plain = quantize_absmax(absmax) if double_quant else absmax
    flat, _ = prepare(weight, np.ones(weight.shape[1], np.float32))
    return encode_at(flat, dequantize_absmax(plain), block_size), plain


def weighted_error(weight, importance, codes, constants, block_size):
    """Σ_ij (W - Q)_ij² · importance_j in float64, Q being the decoded float32 weight."""
    lost = nf4_error(weight, codes, constants, block_size)
    return float(np.square(lost.astype(np.float64)).sum(0) @ importance)


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([32, 64, 256]), st.booleans())
def test_the_weighted_error_is_never_larger_than_that_of_plain_nf4(problem, block_size, double_quant):
    weight, importance = problem
    codes, constants = weighted_nf4(weight, importance, block_size, double_quant)
    plain_codes, plain = plain_nf4(weight, block_size, double_quant)
    floored = importance.astype(np.float64)
    floored += FLOOR * floored.mean()
    found = weighted_error(weight, floored, codes, constants, block_size)
    assert found <= weighted_error(weight, floored, plain_codes, plain, block_size) * (1 + 1e-5)
    assert np.isfinite(dequantize_absmax(constants)).all()


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([32, 64]))
def test_with_a_single_candidate_the_result_is_plain_nf4(problem, block_size):
    weight, _ = problem
    uniform = np.ones(weight.shape[1], np.float32)
    plain_codes, plain, _ = reference.encode_4bit(weight, block_size, NF4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "FACTORS", np.ones(1, np.float32))
        patch.setattr(calibration, "REACH", 0)
        codes, absmax = weighted_nf4(weight, uniform, block_size, double_quant=False)
        nested_codes, constants = weighted_nf4(weight, uniform, block_size, double_quant=True)
    zero = plain < 1e-38
    assert np.array_equal(absmax[~zero], plain[~zero])
    assert np.array_equal(codes, plain_codes)
    expected = quantize_absmax(absmax)
    assert np.array_equal(constants.codes, expected.codes)
    assert np.array_equal(constants.nested_absmax, expected.nested_absmax)
    flat, _ = prepare(weight, uniform)
    assert np.array_equal(nested_codes, encode_at(flat, dequantize_absmax(expected), block_size))


def _errors(block, h, scales):
    """Σ h (w - q s)² in float64 over all candidate scales, each weight at the level that is nearest, by brute force."""
    apart = block.astype(np.float64)[None, :, None] - np.multiply.outer(scales.astype(np.float64), NF4_LEVELS)[:, None]
    return np.square(apart).min(axis=2) @ h.astype(np.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(20, 70))
def test_the_best_candidate_is_chosen(seed, rows, columns):
    weight, importance = some(rows, columns, seed=seed)
    scales = search_scales(*prepare(weight, importance), 32)
    important = np.tile(importance + FLOOR * importance.mean(), rows)
    for block, scale in enumerate(scales):
        part = slice(block * 32, (block + 1) * 32)
        weights, h = weight.reshape(-1)[part], important[part]
        errors = _errors(weights, h, FACTORS * np.abs(weights).max())
        assert float(_errors(weights, h, scale[None])[0]) <= float(errors.min()) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_the_best_nested_code_is_chosen(seed, signed):
    weight, importance = some(3, 64, seed=seed)
    flat, important = prepare(weight, importance)
    scales = search_scales(flat, important, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "REACH", 255)
        found = nest_scales(flat, important, scales if signed else np.abs(scales), 32)
    every = dynamic_levels() * found.nested_absmax[0] + np.float32(found.offset)
    allowed = every if signed else every[every > 0]
    h = importance + FLOOR * importance.mean()
    for block, scale in enumerate(dequantize_absmax(found)):
        part = slice(block % 2 * 32, block % 2 * 32 + 32)
        weights = flat[block * 32 : block * 32 + 32]
        least = float(_errors(weights, h[part], allowed).min())
        assert float(_errors(weights, h[part], scale[None])[0]) <= least * (1 + 1e-5)


def test_a_search_by_row_blocks_gives_the_same_scales():
    weight, importance = some(12, 96, seed=1)
    parts = [search_scales(*prepare(part, importance)) for part in np.split(weight, 3)]
    assert np.array_equal(np.concatenate(parts), search_scales(*prepare(weight, importance)))


def test_bitsandbytes_decodes_negative_scales_by_the_same_formula():
    codes, constants = weighted_nf4(*some(64, 128))
    assert (dequantize_absmax(constants) < 0).any()
    assert (dequantize_absmax(constants) > 0).any()
    functional = bitsandbytes.functional
    levels, nested_absmax = as_tensor(dynamic_levels()), as_tensor(constants.nested_absmax)
    nested = functional.QuantState(nested_absmax, code=levels, blocksize=256, dtype=torch.float32)
    state = functional.QuantState(
        as_tensor(constants.codes), (64, 128), torch.tensor(NF4_LEVELS), 64, "nf4", torch.float32,
        torch.tensor(constants.offset), nested,
    )  # fmt: skip
    theirs = functional.dequantize_4bit(as_tensor(codes).view(-1, 1), state)
    ours = nf4_error(np.zeros((64, 128), np.float32), codes, constants)
    assert np.array_equal(theirs.numpy(), -ours)


def test_a_negative_scale_is_chosen_for_a_block_of_negated_levels(monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", np.array([1, -1], np.float32))
    levels = -np.tile(np.float32(NF4_LEVELS), 2)  # exact with a negative scale only
    scales = search_scales(*prepare(levels[None], np.ones(32, np.float32)), 32)
    assert scales.tolist() == [-1.0]


@pytest.mark.parametrize(
    ("weight", "importance", "error"),
    [
        (np.ones((2, 32)), np.ones(31), UsageError),
        (np.ones(64), np.ones(64), UsageError),
        (np.ones((2, 32)), -np.ones(32), UsageError),
        (np.ones((2, 32)), np.full(32, np.nan), NonFiniteError),
        (np.full((2, 32), np.inf), np.ones(32), NonFiniteError),
    ],
)
def test_invalid_weights_and_importances_are_refused(weight, importance, error):
    with pytest.raises(error):
        weighted_nf4(weight, importance)
