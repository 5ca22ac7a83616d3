"""Decoding of block-wise weights on a GPU, in Triton: one program decodes a few whole blocks.

To give exactly the bits of ``numerics.kernels.reference``, products are not fused with additions (launches set
``enable_fp_fusion`` to False), and rounding to 16 bits operates on the bits. Offsets are 64-bit: a fused expert tensor
may have more than 2^31 weights. ``network.decode`` also decodes a short last block.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptkit.numerics.absmax import GROUP
from adaptkit.numerics.kernels.codebook import Codebook

_WEIGHTS_PER_PROGRAM = 2048
_CONSTANTS_PER_PROGRAM = 1024
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def decode_4bit(codes: Tensor, absmax: Tensor, block_size: int, book: Codebook, out: Tensor) -> None:
    """Decode whole blocks.

    Args:
        codes: (N / 2,) uint8, contiguous.
        absmax: (N / block_size,) float32, contiguous.
        block_size: number of weights that share one constant, a power of two.
        book: the codebook.
        out: (N,) bfloat16, float16 or float32, contiguous, written.
    """
    full, rows = len(out) // block_size, max(1, _WEIGHTS_PER_PROGRAM // block_size)
    if full:
        arguments = codes, absmax, _levels(book, codes.device), _bits(out), full, block_size, rows, _KINDS[out.dtype]
        with _on(codes):
            _decode_4bit[(triton.cdiv(full, rows),)](*arguments, **_EXACT)


def decode_nested_4bit(
    codes: Tensor, constants: tuple[Tensor, Tensor, float, Tensor], block_size: int, book: Codebook, out: Tensor
) -> None:
    """Do ``decode_constants`` and ``decode_4bit`` in one launch, with the same bits.

    A training step decodes every weight several times, and with small layers it is bound by launches.

    Args:
        codes: see ``decode_4bit``.
        constants: the arguments of ``decode_constants``.
        block_size: see ``decode_4bit``.
        book: see ``decode_4bit``.
        out: see ``decode_4bit``.
    """
    small, nested, offset, nested_levels = constants
    full, rows = len(out) // block_size, max(1, _WEIGHTS_PER_PROGRAM // block_size)
    if full:
        tables = small.contiguous(), nested.contiguous(), nested_levels.contiguous(), _levels(book, codes.device)
        with _on(codes):
            _decode_nested_4bit[(triton.cdiv(full, rows),)](
                codes, *tables, _bits(out), offset, full, block_size, rows, GROUP, _KINDS[out.dtype], **_EXACT
            )


def decode_constants(codes: Tensor, nested_absmax: Tensor, offset: float, levels: Tensor) -> Tensor:
    """See ``numerics.kernels.reference``; one launch, since a training step decodes every weight several times."""
    count, out = codes.numel(), torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    if count:
        arguments = (codes.contiguous(), nested_absmax.contiguous(), levels.contiguous(), out, offset, count)
        with _on(codes):
            grid = (triton.cdiv(count, _CONSTANTS_PER_PROGRAM),)
            _decode_constants[grid](*arguments, _CONSTANTS_PER_PROGRAM, GROUP, **_EXACT)
    return out


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _bits(out: Tensor) -> Tensor:
    return out if out.dtype == torch.float32 else out.view(torch.uint16)


@cache
def _levels(book: Codebook, where: torch.device) -> Tensor:
    return torch.tensor(book.levels, dtype=torch.float32, device=where)


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """Convert float32 to a ``kind``: 0 is float32 itself, 1 the bits of bfloat16, 2 the bits of float16."""
    if kind == 0:
        narrow = x
    elif kind == 1:
        narrow = _bfloat16_bits(x.to(tl.uint32, bitcast=True))
    else:
        narrow = _float16_bits(x.to(tl.uint32, bitcast=True))
    return narrow


@triton.jit
def _bfloat16_bits(bits):
    x = bits.to(tl.float32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # cannot carry into the sign, except for a NaN
    return (tl.where(x == x, rounded, (bits & 0x80000000) | 0x7FC00000) >> 16).to(tl.uint16)


@triton.jit
def _float16_bits(bits):
    size = bits & 0x7FFFFFFF
    normal = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13
    # One half has the spacing of float16's denormals, so adding it rounds to them.
    denormal = (size.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    result = tl.where(size < 0x38800000, denormal, normal)
    result = tl.where(size >= 0x477FF000, 0x7C00, result)
    result = tl.where(size > 0x7F800000, 0x7E00, result)
    return (result | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def _decode_4bit(codes, absmax, levels, out, count, block: tl.constexpr, group: tl.constexpr, kind: tl.constexpr):
    """Decode ``count`` blocks; ``levels`` holds the level of each code, ``out`` has the result type of ``_rounded``."""
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    _decode_rows(codes, tl.load(absmax + rows, mask=inside, other=0.0), levels, out, rows, inside, block, kind)


@triton.jit
def _decode_nested_4bit(
    codes,
    constants,
    nested,
    nested_levels,
    levels,
    out,
    offset,
    count,
    block: tl.constexpr,
    group: tl.constexpr,
    nest: tl.constexpr,
    kind: tl.constexpr,
):
    """Do ``decode_constants`` and ``decode_4bit`` in one; ``nest`` of ``constants`` share one element of ``nested``."""
    rows = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)
    inside = rows < count
    code = tl.load(constants + rows, mask=inside, other=0).to(tl.int32)
    nested_scale = tl.load(nested + rows // nest, mask=inside, other=0.0)
    scale = tl.load(nested_levels + code) * nested_scale + offset
    _decode_rows(codes, scale, levels, out, rows, inside, block, kind)


@triton.jit
def _decode_rows(codes, scale, levels, out, rows, inside, block: tl.constexpr, kind: tl.constexpr):
    """Decode blocks. One thread writes both weights of a byte: single ones would waste half of each transfer."""
    half: tl.constexpr = block // 2
    pair, place = tl.arange(0, half)[None, :], tl.arange(0, block)[None, :]
    byte = tl.load(codes + rows[:, None] * half + pair, mask=inside[:, None] & (pair < half), other=0).to(tl.int32)
    both = tl.interleave(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15)))
    tl.store(
        out + rows[:, None] * block + place, _rounded(both * scale[:, None], kind), inside[:, None] & (place < block)
    )


@triton.jit
def _decode_constants(codes, nested, levels, out, offset, count, chunk: tl.constexpr, group: tl.constexpr):
    """Decode ``count`` constants; ``group`` share one of ``nested``; ``levels`` holds the level of each code."""
    offsets = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = offsets < count
    code = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(nested + offsets // group, mask=mask, other=0.0)
    tl.store(out + offsets, tl.load(levels + code) * scale + offset, mask=mask)
