"""Decoding of block-wise weights to the bits of ``numerics.kernels.reference``, on any device.

On a CPU by its compiled kernels, on a GPU by Triton if that can run, else in plain torch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptkit.numerics.absmax import GROUP
from adaptkit.numerics.kernels import cpu
from adaptkit.numerics.kernels.codebook import Codebook
from adaptkit.numerics.tensors import as_array, as_tensor
from adaptkit.training.network.threads import are_shared, in_parts
from adaptkit.training.triton_needs import has_triton

_PIECE = 1 << 18
"""Weights decoded at a time by a thread: they stay in its cache until they are copied. A multiple of any block size."""


@dataclass(frozen=True)
class NestedConstants:
    """Doubly quantized constants of M blocks; see ``numerics.absmax``.

    Attributes:
        codes: (M,) uint8.
        nested_absmax: (ceil(M / GROUP),) float32.
        offset: a float32 value.
    """

    codes: Tensor
    nested_absmax: Tensor
    offset: float


@dataclass(frozen=True)
class Blocks:
    """Encoded blocks of a flat weight.

    Attributes:
        codes: (ceil(count / 2),) uint8.
        constants: of the blocks, doubly quantized or as (M,) float32.
        levels: (256,) float32, the values of the codes of doubly quantized constants.
        count: number of weights.
        block_size: number of weights that share one constant, a power of two.
        book: levels of the codes.
    """

    codes: Tensor
    constants: NestedConstants | Tensor
    levels: Tensor
    count: int
    block_size: int
    book: Codebook


def decode(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Return the weights, (count,): level times constant in float32, rounded once to bfloat16, float16 or float32."""
    device = blocks.codes.device.type
    if device == "cpu":
        return _by_kernels(blocks, dtype)
    return by_triton(blocks, dtype) if has_triton(device) else in_plain_torch(blocks, dtype)


def decode_constants(constants: NestedConstants | Tensor, levels: Tensor) -> Tensor:
    """Return constants in float32, (M,); those that are not quantized are returned as they are."""
    if not isinstance(constants, NestedConstants):
        return constants
    codes, nested, offset = constants.codes, constants.nested_absmax, constants.offset
    if codes.device.type == "cpu":
        return as_tensor(cpu.decode_constants(as_array(codes), as_array(nested), offset, as_array(levels)))
    if has_triton(codes.device.type):
        from adaptkit.training.network import decode_gpu

        return decode_gpu.decode_constants(codes, nested, offset, levels)
    return constants_in_plain_torch(constants, levels)


def _by_kernels(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    codes, absmax = as_array(blocks.codes), as_array(decode_constants(blocks.constants, blocks.levels))
    kind, size, book = as_array(torch.empty(0, dtype=dtype)).dtype, blocks.block_size, blocks.book
    if not are_shared(blocks.count):
        return as_tensor(cpu.decode_4bit(codes, absmax, blocks.count, size, book, kind))
    weights = torch.empty(blocks.count, dtype=dtype)
    out = as_array(weights)

    def decode_part(_: int, first: int, last: int) -> None:
        for start in range(first * size, last * size, _PIECE):
            end = min(start + _PIECE, last * size, blocks.count)
            part = codes[start // 2 : -(-end // 2)], absmax[start // size : -(-end // size)]
            out[start:end] = cpu.decode_4bit(*part, end - start, size, book, kind)

    in_parts(len(absmax), blocks.count, decode_part)
    return weights


def by_triton(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Do ``decode`` by Triton."""
    from adaptkit.training.network import decode_gpu

    codes, constants, size = blocks.codes.contiguous(), blocks.constants, blocks.block_size
    out, whole = torch.empty(blocks.count, dtype=dtype, device=codes.device), blocks.count // size * size
    if whole == blocks.count and isinstance(constants, NestedConstants):
        nested = constants.codes, constants.nested_absmax, constants.offset, blocks.levels
        decode_gpu.decode_nested_4bit(codes, nested, size, blocks.book, out)
    else:
        absmax = decode_constants(constants, blocks.levels).contiguous()
        decode_gpu.decode_4bit(codes, absmax, size, blocks.book, out[:whole])
        if rest := blocks.count - whole:
            last = replace(blocks, codes=codes[whole // 2 :], constants=absmax[whole // size :], count=rest)
            out[whole:] = in_plain_torch(last, dtype)
    return out


def in_plain_torch(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Do ``decode`` without kernels, and without waiting for the device."""
    codes, absmax = blocks.codes, constants_in_plain_torch(blocks.constants, blocks.levels)
    known = torch.tensor(blocks.book.levels).to(codes.device, non_blocking=True)
    byte = torch.arange(256, device=codes.device)
    pairs = torch.stack([known[byte >> 4], known[byte & 15]], dim=1)  # one look-up decodes both weights of a byte
    values = pairs.index_select(0, codes.int()).view(-1)[: blocks.count]
    size = blocks.block_size
    scale = absmax.repeat_interleave(size, output_size=len(absmax) * size)[: blocks.count]
    return (values * scale).to(dtype)


def constants_in_plain_torch(constants: NestedConstants | Tensor, levels: Tensor) -> Tensor:
    """Do ``decode_constants`` without kernels, and without waiting for the device."""
    if not isinstance(constants, NestedConstants):
        return constants
    scale = constants.nested_absmax.repeat_interleave(GROUP)[: constants.codes.numel()]
    return levels[constants.codes.int()] * scale + constants.offset
