"""The block-wise kernels of ``reference`` in Triton, for CUDA devices; all other kernels are those of ``reference``.

Every function gives the same bits as the function of that name in ``reference``, which documents it.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from adaptkit.numerics.kernels import _gpu_blocks, _whole_blocks, reference
from adaptkit.numerics.kernels._reference_blocks import GROUP, TINY, Encoded, steps_8bit
from adaptkit.numerics.kernels.codebook import Codebook
from adaptkit.numerics.kernels.reference import (
    add_rounded,
    addition_sums,
    encode_constants,
    low_rank_delta,
    merge_rows,
    prepare,
    undo,
    undo_residual,
    unmerge_rows,
)

__all__ = [
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_8bit",
    "decode_constants",
    "decode_nested_4bit",
    "decode_parts_4bit",
    "encode_4bit",
    "encode_8bit",
    "encode_constants",
    "low_rank_delta",
    "merge_rows",
    "prepare",
    "undo",
    "undo_residual",
    "unmerge_rows",
]

_WEIGHTS_PER_PROGRAM = 2048
_CONSTANTS_PER_PROGRAM = 1024
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def encode_4bit(weight: Tensor, block_size: int, book: Codebook, measure: bool = False) -> Encoded:
    """See ``reference.encode_4bit``."""
    # No file has a block size that is not a power of two; ``reference`` supports it.
    if block_size & (block_size - 1):
        return reference.encode_4bit(weight, block_size, book, measure)

    def whole(flat: Tensor, codes: Tensor, absmax: Tensor, moments: Tensor | None) -> None:
        rows = max(1, _WEIGHTS_PER_PROGRAM // block_size)
        tables, sums = _tables(book, flat.device), absmax if moments is None else moments
        static = block_size, rows, _KINDS[flat.dtype], moments is not None
        arguments = (_loadable(flat), tables, codes, absmax, sums, absmax.numel(), TINY, *static)
        with _on(flat):
            _gpu_blocks.encode_4bit[(triton.cdiv(absmax.numel(), rows),)](*arguments, **_EXACT)

    def definition(flat: Tensor, codes: Tensor, absmax: Tensor, moments: Tensor | None) -> None:
        _whole_blocks.fill(reference.encode_4bit(flat, block_size, book, measure), codes, absmax, moments)

    return _encode(weight, block_size, 4, measure, whole, definition)


def decode_4bit(
    codes: Tensor, absmax: Tensor, count: int, block_size: int, book: Codebook, dtype: torch.dtype
) -> Tensor:
    """See ``reference.decode_4bit``."""
    if block_size & (block_size - 1):
        return reference.decode_4bit(codes, absmax, count, block_size, book, dtype)
    codes, absmax = codes.reshape(-1).contiguous(), absmax.contiguous()
    out = torch.empty(count, dtype=dtype, device=codes.device)
    full, rows = count // block_size, max(1, _WEIGHTS_PER_PROGRAM // block_size)
    if full:
        arguments = (codes, absmax, _levels(book, codes.device), _bits(out), full, block_size, rows, _KINDS[dtype])
        with _on(codes):
            _gpu_blocks.decode_4bit[(triton.cdiv(full, rows),)](*arguments, **_EXACT)
    weights = full * block_size
    if weights < count:
        rest = codes[weights // 2 :], absmax[full:], count - weights
        out[weights:] = reference.decode_4bit(*rest, block_size, book, dtype)
    return out


def decode_nested_4bit(
    codes: Tensor,
    constants: tuple[Tensor, Tensor, float, Tensor],
    count: int,
    block_size: int,
    book: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """Do ``decode_constants`` and ``decode_4bit`` in one launch, with the same bits.

    A training step decodes every weight several times, and with small layers it is bound by launches.
    """
    if count % block_size or block_size & (block_size - 1):
        return decode_4bit(codes, decode_constants(*constants), count, block_size, book, dtype)
    small, nested, offset, nested_levels = constants
    out = torch.empty(count, dtype=dtype, device=codes.device)
    full, rows = count // block_size, max(1, _WEIGHTS_PER_PROGRAM // block_size)
    if full:
        arguments = (
            codes.reshape(-1).contiguous(), small.contiguous(), nested.contiguous(), nested_levels.contiguous(),
            _levels(book, codes.device), _bits(out), offset, full, block_size, rows, GROUP, _KINDS[dtype],
        )  # fmt: skip
        with _on(codes):
            _gpu_blocks.decode_nested_4bit[(triton.cdiv(full, rows),)](*arguments, **_EXACT)
    return out


def decode_parts_4bit(
    codes: Tensor,
    constants: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    count: int,
    block_size: int,
    book: Codebook,
    dtype: torch.dtype,
) -> Tensor:
    """Do ``decode_nested_4bit`` for several concatenated weights in one launch, with the same bits.

    Args:
        codes: (count / 2,) uint8, whole blocks.
        constants: (blocks,) uint8 codes; their nested constants, (groups,) float32, each weight starting a new group;
            the offset of each weight, (parts,) float32; the first block and first group of each, (2, parts) int64; the
            256 levels, float32.
        count: number of elements of all weights.
        block_size: a power of two.
        book: codebook of the codes.
        dtype: type of the result.
    """
    small, nested, offsets, places, nested_levels = constants
    out = torch.empty(count, dtype=dtype, device=codes.device)
    full, rows = count // block_size, max(1, _WEIGHTS_PER_PROGRAM // block_size)
    arguments = codes, small, nested, nested_levels, _levels(book, codes.device), _bits(out), offsets, places, full
    if full:
        with _on(codes):
            _gpu_blocks.decode_parts_4bit[(triton.cdiv(full, rows),)](
                *arguments, len(offsets), block_size, rows, GROUP, _KINDS[dtype], **_EXACT
            )
    return out


def encode_8bit(weight: Tensor, block_size: int, measure: bool = False) -> Encoded:
    """See ``reference.encode_8bit``."""

    def whole(flat: Tensor, codes: Tensor, absmax: Tensor, moments: Tensor | None) -> None:
        block = triton.next_power_of_2(block_size)
        rows, sums = max(1, _WEIGHTS_PER_PROGRAM // block), absmax if moments is None else moments
        static = block, rows, _KINDS[flat.dtype], moments is not None
        arguments = (_loadable(flat), codes, absmax, sums, absmax.numel(), block_size, *static)
        with _on(flat):
            _gpu_blocks.encode_8bit[(triton.cdiv(absmax.numel(), rows),)](*arguments, **_EXACT)

    def definition(flat: Tensor, codes: Tensor, absmax: Tensor, moments: Tensor | None) -> None:
        _whole_blocks.fill(reference.encode_8bit(flat, block_size, measure), codes, absmax, moments)

    return _encode(weight, block_size, 8, measure, whole, definition)


def _encode(
    weight: Tensor, block_size: int, bits: int, measure: bool, whole: _whole_blocks.Encode, last: _whole_blocks.Encode
) -> Encoded:
    flat = weight.reshape(-1).contiguous()
    if flat.dtype not in _KINDS:
        flat = flat.float()

    def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=flat.device)

    return _whole_blocks.encode(flat, block_size, bits, measure, empty, whole, last)


def decode_8bit(codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """See ``reference.decode_8bit``."""
    out = torch.empty(count, dtype=dtype, device=codes.device)
    codes = codes.reshape(-1).contiguous()
    steps = steps_8bit(absmax.contiguous())  # a division per weight would slow the kernel several times
    arguments = (codes, steps, _bits(out), count, block_size, _WEIGHTS_PER_PROGRAM, _KINDS[dtype])
    if count:
        with _on(codes):
            _gpu_blocks.decode_8bit[(triton.cdiv(count, _WEIGHTS_PER_PROGRAM),)](*arguments, **_EXACT)
    return out


def decode_constants(codes: Tensor, nested_absmax: Tensor, offset: float, levels: Tensor) -> Tensor:
    """See ``reference.decode_constants``; one launch, since a training step decodes every weight several times."""
    count, out = codes.numel(), torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    if count:
        arguments = (codes.contiguous(), nested_absmax.contiguous(), levels.contiguous(), out, offset, count)
        with _on(codes):
            grid = (triton.cdiv(count, _CONSTANTS_PER_PROGRAM),)
            _gpu_blocks.decode_constants[grid](*arguments, _CONSTANTS_PER_PROGRAM, GROUP, **_EXACT)
    return out


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _loadable(flat: Tensor) -> Tensor:
    return flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat


def _bits(out: Tensor) -> Tensor:
    return out if out.dtype == torch.float32 else out.view(torch.uint16)


@cache
def _tables(book: Codebook, where: torch.device) -> Tensor:
    return torch.tensor([*book.bounds, *book.order, *book.ascending], dtype=torch.float32, device=where)


@cache
def _levels(book: Codebook, where: torch.device) -> Tensor:
    return torch.tensor(book.levels, dtype=torch.float32, device=where)
