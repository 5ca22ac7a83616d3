"""Causal attention on a GPU: torch's kernels, called so that it can choose one that keeps no matrix of scores.

packed rows            each sample apart, by FlashAttention: with a mask, all tokens of a row are multiplied by all
                       others, and every layer converts the mask to the dtype of the scores
shared key heads       only FlashAttention takes them, and it takes no float32; they are repeated for other kernels
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptkit.training.fast.attention_spans import packed_lengths

_TOKENS_APART = 128
"""Samples are attended to apart if they are at least this long on average: every one takes a launch per pass."""
_FLASH_HEADS = (*range(1, 193), *range(225, 257))
"""Widths of heads for which torch uses FlashAttention in training; those between only on some GPUs."""


def attend_on_gpu(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor | None:
    """Compute causal attention without a matrix of scores.

    Args:
        query: (batch, heads, tokens, dim).
        key: (batch, key_heads, tokens, dim); each key head serves heads / key_heads query heads.
        value: (batch, key_heads, tokens, value_dim).
        scale: factor of the scores.
        mask: (batch, 1, tokens, tokens) bool, True for attended keys; None if every token attends to itself and all
            earlier ones.

    Returns:
        (batch, tokens, heads, value_dim); None if the mask asks for something else than packed samples, or if they are
        so short that one pass with the mask is better.
    """
    if mask is None:
        return _causal(query, key, value, scale)
    rows = packed_lengths(mask)
    if rows is None or not all(map(_are_long, rows)):
        return None
    heads = query.shape[1]
    pieces: list[Tensor] = []
    by_row = zip(*(torch.split(side, 1) for side in (query, key, value)), strict=True)
    for lengths, row in zip(rows, by_row, strict=True):
        cuts = list(_cuts(lengths))
        sizes = [tokens for tokens, _ in cuts]
        sides = (torch.split(side, sizes, dim=2) for side in row)  # unlike slices' gradients, one concatenation
        for (_, is_sample), q, k, v in zip(cuts, *sides, strict=True):
            pieces.append(_causal(q, k, v, scale) if is_sample else _repeated(v, heads).transpose(1, 2))
    return torch.cat(pieces, dim=1).view(len(query), -1, heads, value.shape[3])


def _are_long(lengths: tuple[int, ...]) -> bool:
    samples = [length for length in lengths if length > 1]
    return sum(samples) >= _TOKENS_APART * len(samples)


def _cuts(lengths: tuple[int, ...]) -> Iterator[tuple[int, bool]]:
    """Yield tokens of a sample and True, or the number of adjacent samples of one token and False.

    Each token of a row's padding is such a sample; it attends to itself only, so that the result is its value.
    """
    for is_single, group in groupby(lengths, lambda length: length == 1):
        if is_single:
            yield len(list(group)), False
        else:
            yield from ((length, True) for length in group)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads, dim = query.shape[1], query.shape[3]
    is_flash = query.dtype in (torch.bfloat16, torch.float16) and dim == value.shape[3] and dim in _FLASH_HEADS
    shared = is_flash and key.shape[1] != heads
    if not shared:
        key, value = _repeated(key, heads), _repeated(value, heads)
    options: Any = {"is_causal": True, "scale": scale, "enable_gqa": shared}
    return functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def _repeated(side: Tensor, heads: int) -> Tensor:
    return side if side.shape[1] == heads else side.repeat_interleave(heads // side.shape[1], dim=1)
