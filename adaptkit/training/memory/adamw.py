"""AdamW on vectors, and its moments in 8 bits.

With g the gradient, t the step (counted from 1), m and v the moments, and p the parameter:

    p <- p · (1 - lr · decay)
    m <- m + (1 - β1) · (g - m)                                  rounded after g - m and after the sum
    v <- v · β2 + ((1 - β2) · g) · g                             rounded after v · β2, (1 - β2) · g, and the sum
    p <- p + (-lr / (1 - β1^t) · m) / (√v / √(1 - β2^t) + ε)     rounded after every operation

On a CPU the result has the same bits however a vector is split; torch's fused AdamW guarantees that only for splits at
multiples of its SIMD width. On other devices torch's fused AdamW runs. ``torch.optim.AdamW(foreach=False)`` computes
the same moments, but its library's square root may be off by one in the last bit.

In 8 bits, a moment is stored as one of 256 levels times a constant that a block of 256 neighbours shares. The levels
are the dynamic map of ``absmax``: signed for m, unsigned for v, which is never negative
(arXiv:2110.02861, in the layout of bitsandbytes 0.50). A value is rounded to the nearest level, a tie to the lower one.
Unlike in bitsandbytes, a positive second moment never becomes zero: its first moment would be divided by ε only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.absmax import GROUP, dynamic_levels
from adaptkit.numerics.tensors import as_tensor

BLOCK = GROUP
"""Number of moments that share one constant."""
STATE_BITS = {"adamw": 32, "adamw8bit": 8}
"""Bits per moment, by the optimizer's name."""


@dataclass(frozen=True)
class AdamW:
    """One step of AdamW (arXiv:1711.05101).

    Attributes:
        learning_rate: learning rate of this step.
        step: number of this step, counted from 1.
        weight_decay: decoupled weight decay.
        betas: decay rates of the first and the second moment.
        eps: added to the square root of the second moment.
    """

    learning_rate: float
    step: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
    ) -> None:
        """Update parameters and moments in place. All vectors are float32, contiguous and on one device.

        Args:
            parameters: vectors of shape (N,).
            gradients: their gradients, (N,) each; not changed.
            first: their first moments, (N,) each.
            second: their second moments, (N,) each, not negative.
        """
        if not parameters:
            return
        beta1, beta2 = self.betas
        vectors = parameters, gradients, first, second
        device = parameters[0].device
        if device.type != "cpu":
            steps = [_step_on(device, self.step)] * len(parameters)
            torch._fused_adamw_(
                list(parameters), list(gradients), list(first), list(second), [], steps,
                lr=self.learning_rate, beta1=beta1, beta2=beta2,
                weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        from adaptkit.training.memory.adamw_cpu import update

        numbers = (
            *(1 - self.learning_rate * self.weight_decay, 1 - beta1, beta2, 1 - beta2),
            *((1 - beta2**self.step) ** 0.5, self.eps, -self.learning_rate / (1 - beta1**self.step)),
        )
        for parts in zip(*vectors, strict=True):
            update(*(tensor.numpy() for tensor in parts), *map(np.float32, numbers))


def moment_bytes(count: int, bits: int) -> int:
    """Return the bytes that both moments of ``count`` parameters take, at 32 or 8 bits per moment."""
    return 8 * count if bits == 32 else 2 * count + 8 * -(-count // BLOCK)


def encode(moment: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    """Encode a moment in 8 bits.

    Args:
        moment: (N,) float32, finite; not negative if ``signed`` is false.
        codes: (N,) uint8; overwritten.
        absmax: (ceil(N / BLOCK),) float32; overwritten with the largest magnitude of each block.
        signed: whether to use the signed map.
    """
    if moment.device.type != "cpu":
        _encode_by_torch(moment, codes, absmax, signed)
        return
    from adaptkit.training.memory.adamw_cpu import encode as compiled

    bounds, starts, most = _search_tables(signed)
    compiled(moment.numpy(), BLOCK, bounds, starts, most, codes.numpy(), absmax.numpy())


def _encode_by_torch(moment: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """``encode`` on any device."""
    levels = _levels_on(moment.device, signed)
    blocks = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    absmax.copy_(largest)
    scaled = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    middles = (levels[:-1] + levels[1:]) * 0.5
    found = torch.bucketize(scaled, middles).view(-1)[: moment.numel()]
    codes.copy_(torch.where(moment > 0, found.clamp(min=1), found))


def decode(codes: Tensor, absmax: Tensor, moment: Tensor, *, signed: bool) -> None:
    """Undo ``encode`` up to rounding: write level times constant to ``moment``, (N,) float32."""
    if moment.device.type != "cpu":
        _decode_by_torch(codes, absmax, moment, signed)
        return
    from adaptkit.training.memory.adamw_cpu import decode as compiled

    compiled(codes.numpy(), absmax.numpy(), BLOCK, _levels_on(moment.device, signed).numpy(), moment.numpy())


def _decode_by_torch(codes: Tensor, absmax: Tensor, moment: Tensor, signed: bool) -> None:
    """``decode`` on any device."""
    levels = _levels_on(moment.device, signed)
    torch.mul(levels[codes.int()], absmax.repeat_interleave(BLOCK)[: codes.numel()], out=moment)


@lru_cache(maxsize=4)
def _step_on(device: torch.device, step: int) -> Tensor:
    return torch.full((), float(step), device=device)


@cache
def _levels_on(device: torch.device, signed: bool) -> Tensor:
    return as_tensor(dynamic_levels(signed)).to(device)


@cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Return ``bounds``, ``starts`` and ``most``, the search tables of ``adamw_cpu.encode``."""
    levels = dynamic_levels(signed)
    bounds = (levels[:-1] + levels[1:]) * np.float32(0.5)
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    ends = upper.view(np.float32), (upper | np.uint32(0xFFFF)).view(np.float32)
    low, high = (np.searchsorted(bounds, np.nan_to_num(end)) for end in ends)  # number of bounds below each end
    starts = np.minimum(low, high).astype(np.uint8)
    most = int(np.abs(high - low)[np.isfinite(ends[0]) & np.isfinite(ends[1])].max())
    return np.append(bounds, np.float32(np.inf)), starts, most
