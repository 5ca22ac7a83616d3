"""AdamW matches torch's, however vectors are split; 8-bit moments are the nearest of bitsandbytes' levels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.numerics.absmax import dynamic_levels
from adaptkit.training.memory.adamw import BLOCK, AdamW, _decode_by_torch, _encode_by_torch, decode, encode

RATES = [1e-3, 2e-3, 5e-4, 1e-3, 3e-3]


def random(count, seed, scale=1.0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(count, step):
    return random(count, step, 10.0 ** (step - 3))


def ours(start, weight_decay, betas=(0.9, 0.999), cut=None):
    vectors = start.clone(), torch.empty_like(start), torch.zeros_like(start), torch.zeros_like(start)
    for step, rate in enumerate(RATES):
        vectors[1].copy_(gradient(len(start), step))
        rule = AdamW(rate, step + 1, weight_decay, betas)
        rule.update(*(v.split(cut or len(start)) for v in vectors))
    return vectors[0], vectors[2], vectors[3]


def of_torch(start, weight_decay, betas=(0.9, 0.999), **how):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], weight_decay=weight_decay, betas=betas, **how)
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient(start.numel(), step)
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_updates_match_torchs_fused_adamw_bit_for_bit_for_multiples_of_its_simd_width(weight_decay, betas):
    start = random(64 * 100, 99)
    for found, expected in zip(
        ours(start, weight_decay, betas), of_torch(start, weight_decay, betas, fused=True), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_updates_match_torchs_plain_adamw_up_to_the_last_bit_of_the_square_root(count):
    start = random(count, 99)
    found, expected = ours(start, 0.01), of_torch(start, 0.01, foreach=False, fused=False)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    # The last bit of an update of at most lr · 10, and that of the parameter.
    torch.testing.assert_close(found[0], expected[0], rtol=2**-23, atol=len(RATES) * 3e-2 * 2**-23)


@given(st.integers(1, 700), st.integers(1, 130))
def test_splitting_a_vector_does_not_change_the_bits(count, cut):
    start = random(count, count)
    for whole, parts in zip(ours(start, 0.01), ours(start, 0.01, cut=cut), strict=True):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_match_bitsandbytes(signed):
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(torch.from_numpy(dynamic_levels(signed)), create_dynamic_map(signed=signed))


def _encode_here(moment, codes, absmax, signed):
    encode(moment, codes, absmax, signed=signed)


def _decode_here(codes, absmax, moment, signed):
    decode(codes, absmax, moment, signed=signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize(("write", "read"), [(_encode_here, _decode_here), (_encode_by_torch, _decode_by_torch)])
def test_moments_get_the_nearest_level_except_that_positive_unsigned_ones_never_get_zero(signed, count, write, read):
    """For the compiled CPU kernels, and for torch's operations as on other devices."""
    moment = random(count, count) * torch.logspace(-12, 0, count)
    moment = moment if signed else moment.square()
    moment[: count // 3] = 0
    codes, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // BLOCK))
    write(moment, codes, absmax, signed)
    back = torch.empty(count)
    read(codes, absmax, back, signed)
    levels = dynamic_levels(signed)
    for block, largest in enumerate(absmax.tolist()):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        values = moment[span].numpy()
        assert largest == np.abs(values).max()
        scaled = values / np.float32(largest or 1)
        distance = np.abs(levels[codes[span].numpy()].astype(np.float64) - scaled)
        choices = levels[None] if signed else np.where((levels == 0) & (scaled[:, None] > 0), 2, levels)  # 2 is far
        nearest = np.abs(choices.astype(np.float64) - scaled[:, None]).min(1)
        np.testing.assert_allclose(distance, nearest, rtol=0, atol=1e-8)  # bounds between levels are float32
        np.testing.assert_array_equal(back[span].numpy(), levels[codes[span].numpy()] * np.float32(largest))
    assert not back[: count // 3].any()


def test_the_lookup_table_agrees_with_a_search_for_every_upper_half_of_a_float32():
    """All bounds, their neighbours, and a value in every one of the table's buckets within [-1, 1]."""
    for signed in (True, False):
        levels = torch.from_numpy(dynamic_levels(signed))
        bounds = (levels[:-1] + levels[1:]) * 0.5
        upper = (torch.arange(1 << 16, dtype=torch.int64) << 16 | 0x1234).to(torch.int32).view(torch.float32)
        near = [bounds, *(torch.nextafter(bounds, torch.tensor(s)) for s in (-2.0, 2.0)), levels, upper]
        values = torch.cat(near)
        values = values[values.abs() <= 1] if signed else values[(values >= 0) & (values <= 1)]
        values = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
        values = torch.nn.functional.pad(values, (0, 1), value=1.0).reshape(-1)  # so that every block's constant is 1
        codes, absmax = torch.empty(len(values), dtype=torch.uint8), torch.empty(len(values) // BLOCK)
        encode(values, codes, absmax, signed=signed)
        expected = torch.bucketize(values, bounds)
        assert torch.equal(codes.long(), torch.where(values > 0, expected.clamp(min=1), expected))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_single_gradient_moves_a_parameter_by_little_more_than_the_rate_per_step(bits):
    """As for a token that few batches contain; next to large ones in its block, its second moment is almost zero."""
    values, gradients, absent = torch.zeros(BLOCK), torch.ones(BLOCK), torch.zeros(BLOCK)
    gradients[::2] = 1e-4
    moments = torch.zeros(BLOCK), torch.zeros(BLOCK)
    stored = [(torch.empty(BLOCK, dtype=torch.uint8), torch.empty(1)) for _ in moments]
    for step, gradient in enumerate((gradients, *[absent] * 20), start=1):
        before = values.clone()
        AdamW(1e-3, step).update([values], [gradient], *([moment] for moment in moments))
        assert (values - before).abs().max() < 1.5e-3
        for moment, (codes, absmax), signed in zip(moments, stored, (True, False), strict=True):
            if bits == 8:
                encode(moment, codes, absmax, signed=signed)
                decode(codes, absmax, moment, signed=signed)
