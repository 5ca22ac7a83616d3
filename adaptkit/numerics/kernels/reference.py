"""The definition of every kernel, in plain torch on any device.

Read this file and ``_reference_blocks`` to know what the bits mean; ``cpu`` and ``gpu`` must give the same ones.
"""

import torch
from torch import Tensor

from adaptkit.numerics.kernels._reference_blocks import (
    decode_4bit,
    decode_8bit,
    decode_constants,
    encode_4bit,
    encode_8bit,
    encode_constants,
    int8_factors,
)
from adaptkit.numerics.kernels.codebook import NF4_LEVELS

__all__ = [
    "FLOAT_INTS",
    "NF4_LEVELS",
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_8bit",
    "decode_constants",
    "encode_4bit",
    "encode_8bit",
    "encode_constants",
    "from_ordinal",
    "int8_factors",
    "low_rank_delta",
    "ordinal",
    "round_to",
    "undo",
    "undo_residual",
]

FLOAT_INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The integer type that holds the bits of each weight type."""


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """The canonical change of a weight: Σ over adapters of scale · (B A), the same bits on every machine.

    The inner sum runs in float64 with k ascending; a product of two float32 is exact there. It is scaled, then added
    to the sum of the adapters before it. No matrix library is involved, so neither threads nor processors matter.

    Args:
        lora_a: (Σ ranks, in) float32, the adapters' A matrices one under the other.
        lora_b: (out, Σ ranks) float32, their B matrices side by side.
        ranks: one per adapter.
        scales: weight · scaling, one per adapter.

    Returns:
        (out, in) float64.
    """
    a, b = lora_a.double(), lora_b.double()
    delta = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64, device=a.device)
    start = 0
    for rank, scale in zip(ranks, scales, strict=True):
        inner = torch.zeros_like(delta)
        for k in range(start, start + rank):
            inner += b[:, k, None] * a[None, k, :]
        delta += inner * scale
        start += rank
    return delta


def round_to(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to a shorter float once, to nearest with ties to even.

    torch converts by way of float32 and so rounds twice. Here the float32 step rounds to odd, which keeps enough of
    the lost part for the second step to be right (Boldo and Melquiond, 2008).
    """
    nearest = exact.to(torch.float32)
    if dtype == torch.float32:
        return nearest
    lost = exact - nearest.double()
    bits = nearest.view(torch.int32)
    grew = nearest.double().abs() > exact.abs()
    odd = torch.where(grew, bits - 1, bits + 1)
    return torch.where((lost != 0) & (bits % 2 == 0), odd, bits).view(torch.float32).to(dtype)


def add_rounded(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta``, computed in float64 and rounded once to the weight's dtype.

    Args:
        weight: (out, in) bfloat16, float16 or float32.
        delta: (out, in) float64.

    Returns:
        (out, in) of the weight's dtype; infinite where the sum overflows it.
    """
    return round_to(weight.double() + delta, weight.dtype)


def addition_sums(weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
    """What an addition did: for reports, so that here alone the order of the sums is left open.

    Args:
        weight: (out, in), before.
        merged: (out, in), after.
        delta: (out, in) float64.

    Returns:
        How many values moved, Σ Δ², Σ W², and Σ (merged − W) · Δ.
    """
    exact = weight.double()
    effect = merged.double() - exact
    return int((effect != 0).sum()), float((delta**2).sum()), float((exact**2).sum()), float((effect * delta).sum())


def ordinal(values: Tensor) -> Tensor:
    """Number the floats of a type in order: neighbours differ by one, and −0 comes just before +0.

    Returns:
        int32 of the same shape for 16-bit types, int64 for float32.
    """
    bits = values.view(FLOAT_INTS[values.dtype])
    wide = bits.to(torch.int32 if bits.dtype == torch.int16 else torch.int64)
    top = 1 << (8 * bits.element_size() - 1)
    return torch.where(wide >= 0, wide, -(wide + top) - 1)


def from_ordinal(ordinals: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``ordinal``."""
    ints = FLOAT_INTS[dtype]
    top = 1 << (8 * ints.itemsize - 1)
    return torch.where(ordinals >= 0, ordinals, -(ordinals + 1) - top).to(ints).view(dtype)


def _candidate(merged: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """What plain subtraction gives, and where that alone does not determine the original weight.

    The weights that a rounded addition maps to the same result are neighbours. So the candidate is the original
    for certain where it maps to ``merged`` and neither of its neighbours does.
    """
    top = torch.finfo(merged.dtype).max
    guess = ordinal(round_to(merged.double() - delta, merged.dtype).clamp(-top, top))
    certain = torch.ones_like(guess, dtype=torch.bool)
    for step, expected in ((0, True), (1, False), (-1, False)):
        again = add_rounded(from_ordinal(guess + step, merged.dtype), delta)
        certain &= (ordinal(again) == ordinal(merged)) == expected
    return guess, certain


def undo_residual(weight: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
    """What must be kept so that ``undo`` restores ``weight`` to the bit.

    Args:
        weight: (out, in), the original.
        merged: (out, in), ``add_rounded(weight, delta)``.
        delta: (out, in) float64.

    Returns:
        (M,) int64: for each of the M weights that ``merged`` and ``delta`` do not determine, in row-major order, how
        many representable numbers the original lies above the candidate.
    """
    guess, certain = _candidate(merged, delta)
    return (ordinal(weight) - guess)[~certain].long()


def undo(merged: Tensor, delta: Tensor, residual: Tensor) -> tuple[Tensor, int]:
    """Restore the weight from which ``add_rounded`` made ``merged``.

    Args:
        merged: (out, in).
        delta: (out, in) float64, the same bits as when merging.
        residual: (M,) int64 that begins with what ``undo_residual`` gave; more may follow.

    Returns:
        The weight, (out, in) of the merged dtype, and how much of the residual was used.

    Raises:
        ValueError: the residual is shorter than this addition calls for.
    """
    guess, certain = _candidate(merged, delta)
    used = int((~certain).sum())
    if used > residual.numel():
        raise ValueError(f"{used} weights are ambiguous, the record holds {residual.numel()}")
    guess[~certain] += residual[:used].to(guess.dtype)
    return from_ordinal(guess, merged.dtype), used
