"""Packed linear layers that read the same input, on a GPU: their weights are concatenated and decoded by one launch.

    Yᵢ = sᵢ (X Aᵢᵀ) Bᵢᵀ, and [Y₁ | Y₂ | …] += X [W₁; W₂; …]ᵀ in place      X [A₁; A₂; …]ᵀ is one product
    dX = Σ Gᵢ Wᵢ + [s₁ G₁ B₁ | s₂ G₂ B₂ | …] [A₁; A₂; …]                     Gᵢ: the gradient of Yᵢ

A launch costs the host several microseconds, and these dominate a step of a small model. The gradients Gᵢ are not
concatenated for one product with W: copying those of a gate takes longer than accumulating into dX a second time.

The layers' own weights become views of the concatenated weight, so nothing is stored twice. With dropout each layer
computes its own result, as without joining.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.models.recompute import source_of
from adaptkit.numerics.absmax import GROUP
from adaptkit.training.network.accumulation import accumulate
from adaptkit.training.network.decode import NestedConstants, decode_constants
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.groups import groups, join
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.narrow import narrowed, narrowed_below
from adaptkit.training.network.packed import QuantizedWeight
from adaptkit.training.triton_needs import has_triton


def join_on_gpu(network: Any) -> list[list[nn.Parameter]]:
    """Replace ``LoraLinear.multiply`` of a network's layers on a GPU that share an input, an encoding and a width.

    Layers with DoRA or without an adapter are left unchanged, and so are weights that are not a whole number of blocks,
    since a block would span two layers.

    Args:
        network: transformers model with its adapter, before its layers are checkpointed; sharded weights are skipped.

    Returns:
        The A matrices of every joined group, in the order in which they are concatenated along rows.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLinear) and _can_join(layer)]
    joined_bases: set[Any] = set()
    together: list[list[nn.Parameter]] = []
    for group in groups(network, layers):
        bases: list[Any] = [layer.base for layer in group]
        if len(group) > 1 and _are_alike(bases) and joined_bases.isdisjoint(bases):
            joined_bases.update(bases)
            join(group, partial(_multiplied, JoinedWeight(bases)), LoraLinear.multiply)
            together.append([layer.lora_a for layer in group if layer.lora_a is not None])
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # release the parts that were copied
    return together


def _can_join(layer: LoraLinear) -> bool:
    base = layer.base
    if layer.lora_a is None or layer.magnitude is not None or not isinstance(base, PackedWeight) or base.is_divided:
        return False
    weight = base.quantized()
    return weight.book is not None and weight.count % weight.block_size == 0


def _are_alike(bases: Sequence[PackedWeight]) -> bool:
    weights = [base.quantized() for base in bases]
    kinds = {(weight.encoding, weight.shape[1:], weight.codes.device) for weight in weights}
    same_levels = len(kinds) == 1 and all(torch.equal(weights[0].levels, weight.levels) for weight in weights[1:])
    return same_levels and len(set(bases)) == len(bases)


class JoinedWeight:
    """Packed weights of one width, concatenated along rows; their own buffers become views of the result.

    Args:
        bases: weights of the same encoding, width, device and levels, each a whole number of blocks.

    Attributes:
        rows: number of rows of each weight.
    """

    def __init__(self, bases: Sequence[PackedWeight]) -> None:
        weights = [base.quantized() for base in bases]
        self.rows = [weight.shape[0] for weight in weights]
        first = weights[0]
        nested = [weight.constants for weight in weights if isinstance(weight.constants, NestedConstants)]
        codes = _joined(bases, "codes")
        constants: Any = _joined(bases, "absmax")
        if nested:
            offsets = [each.offset for each in nested]
            blocks = [weight.count // weight.block_size for weight in weights]
            groups = [-(-count // GROUP) for count in blocks]
            places = _starts(blocks), _starts(groups)
            self._parts = blocks, groups, offsets  # kept on the host, too, to avoid a synchronization
            self._offsets = torch.tensor(offsets, dtype=torch.float32, device=codes.device)
            self._places = torch.tensor(places, dtype=torch.int64, device=codes.device)
            constants = NestedConstants(constants, _joined(bases, "nested_absmax"), float("nan"))  # each has its offset
        shape = sum(self.rows), first.shape[1]
        self._weight = QuantizedWeight(first.encoding, first.book, codes, constants, shape, first.dtype, first.levels)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return all rows, (sum of out, in), bit for bit as each weight is dequantized by itself."""
        weight, constants = self._weight, self._weight.constants
        if not isinstance(constants, NestedConstants) or weight.book is None:
            return weight.dequantize(dtype)
        if has_triton(weight.codes.device.type):
            from adaptkit.training.fast import gpu_decode

            known = constants.codes, constants.nested_absmax, self._offsets, self._places, weight.levels
            out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
            gpu_decode.decode_parts_4bit(weight.codes, known, weight.block_size, weight.book, out.view(-1))
            return out
        absmax = torch.cat(self._decoded_constants(constants, weight.levels))
        return replace(weight, constants=absmax).dequantize(dtype)

    def _decoded_constants(self, constants: NestedConstants, levels: Tensor) -> list[Tensor]:
        """Return the decoded constants of each weight, for devices without a kernel that decodes all at once."""
        blocks, groups, offsets = self._parts
        parts = zip(
            torch.split(constants.codes, blocks), torch.split(constants.nested_absmax, groups), offsets, strict=True
        )
        return [decode_constants(NestedConstants(*part), levels) for part in parts]


def _joined(bases: Sequence[PackedWeight], name: str) -> Tensor:
    """Concatenate one buffer of all weights, and make the weights' own buffers views of the result."""
    parts: list[Tensor] = [getattr(base, name) for base in bases]
    whole, start = torch.cat([part.reshape(-1) for part in parts]), 0
    for base, part in zip(bases, parts, strict=True):
        setattr(base, name, whole[start : start + part.numel()].view(part.shape))
        start += part.numel()
    return whole


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


def _multiplied(weight: JoinedWeight, layers: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    """Return the layers' results for one input, (…, in): (…, out) of each."""
    factors = [layer.lora_a for layer in layers] + [layer.lora_b for layer in layers]
    scales = [layer.scaling for layer in layers]
    results: tuple[Tensor, ...] = _Product.apply(x, weight, scales, *factors)  # type: ignore[no-untyped-call]
    for layer, result in zip(layers, results, strict=True):
        if layer.stand_in is not None:  # the product is computed anyway, for the other layers
            result.detach().fill_(layer.stand_in)
    return results


class _Product(torch.autograd.Function):
    """The module docstring's formulas; saves its input's source (see ``recompute``), X Aᵀ and adapters, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: JoinedWeight, scales: list[float], *factors: Tensor) -> tuple[Tensor, ...]:
        count, flat = len(scales), x.reshape(-1, x.shape[-1])
        inner = flat @ narrowed_below(factors[:count], x.dtype).T
        y = x.new_empty(*x.shape[:-1], sum(weight.rows))
        # Unlike views, autograd lets the network change these results in place.
        results = torch.unsafe_split_with_sizes(y, weight.rows, -1)
        parts = torch.split(inner, [len(a) for a in factors[:count]], 1)
        for result, part, b, scale in zip(results, parts, factors[count:], scales, strict=True):
            result.view(-1, len(b)).addmm_(part, narrowed(b, x.dtype).T, beta=0, alpha=scale)
        y.view(-1, y.shape[-1]).addmm_(flat, weight.dequantize(x.dtype).T)
        ctx.make, kept = source_of(x)
        ctx.save_for_backward(inner, *factors, *kept)
        ctx.weight, ctx.scales, ctx.shape = weight, scales, x.shape
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = len(grads)
        inner, *saved = ctx.saved_tensors
        lora_a, lora_b, kept = saved[:count], saved[count : 2 * count], saved[2 * count :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        ranks = [len(a) for a in lora_a]
        grad_inner = torch.empty_like(inner)
        by_b, columns = [], (torch.split(side, ranks, 1) for side in (grad_inner, inner))
        for to, part, grad, b, scale in zip(*columns, flat, lora_b, ctx.scales, strict=True):
            to.addmm_(grad, narrowed(b, grad.dtype), beta=0, alpha=scale)
            by_b.append(accumulate(b, grad.T @ part, scale))
        grad_a = grad_inner.T @ ctx.make(*kept).reshape(-1, ctx.shape[-1])
        by_a = [accumulate(a, grad) for a, grad in zip(lora_a, torch.split(grad_a, ranks), strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_inner @ narrowed_below(lora_a, inner.dtype)
            parts = torch.split(ctx.weight.dequantize(inner.dtype), ctx.weight.rows)
            for grad, rows in zip(flat, parts, strict=True):
                grad_x.addmm_(grad, rows)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *by_a, *by_b
