"""The contiguous run of keys that each query attends to: divided into blocks, or the samples of packed rows.

Results are kept with their mask, since all layers of a network use the same one, or alternate between two or three.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adaptkit.models.memory import ATTENTION_ROWS, ATTENTION_SCORES


@dataclass(frozen=True, eq=False)
class Spans:
    """The run of keys that each query attends to.

    Attributes:
        first: (batch, queries) int32, index of a query's first key.
        last: (batch, queries) int32, one past its last key; not above ``first`` for a query that attends to nothing.
    """

    first: Tensor
    last: Tensor

    def blocks(self, heads: int, key_heads: int) -> Iterator["Block"]:
        """Yield blocks that together cover all attended keys; a key head serves heads / key_heads query heads."""
        group = heads // key_heads
        for sample in range(self.first.shape[0]):
            for start in range(0, self.first.shape[1], ATTENTION_ROWS):
                first, last = (side[sample, start : start + ATTENTION_ROWS] for side in (self.first, self.last))
                low = int(first.min())
                high = max(low + 1, int(last.max()))
                counted = [(side - low).repeat_interleave(group).numpy() for side in (first, last)]
                step = max(1, ATTENTION_SCORES // (group * len(first) * (high - low)))
                for head in range(0, key_heads, step):
                    chosen = slice(head, min(head + step, key_heads)), slice(low, high)
                    yield Block(sample, slice(start, start + len(first)), *chosen, *counted)


@dataclass(frozen=True, eq=False)
class Block:
    """Some queries of some heads, and the keys that any of them attends to.

    Attributes:
        sample: index in the batch.
        rows: the queries.
        heads: the key heads; the block has the queries of all query heads that these serve.
        keys: smallest range that has all keys of these queries.
        first: (rows · group,) int32, a query's first key relative to the block's first; per query, the heads of the
            group are consecutive.
        last: (rows · group,) int32, one past its last key.
    """

    sample: int
    rows: slice
    heads: slice
    keys: slice
    first: Any
    last: Any

    def scores(self) -> int:
        """Return the number of pairs of a query and a key."""
        heads, keys = self.heads, self.keys
        return int(self.first.size * (heads.stop - heads.start) * (keys.stop - keys.start))

    def of_queries(self, tensor: Tensor) -> Tensor:
        """Select (heads, rows · group, …) of (batch, key_heads, queries, group, …): a view if that is contiguous."""
        return tensor[self.sample, self.heads, self.rows].flatten(1, 2)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Select (heads, keys, dim) of (batch, key_heads, keys, dim)."""
        return tensor[self.sample, self.heads, self.keys]

    def put(self, found: Tensor, result: Tensor) -> None:
        """Write (heads, rows · group, dim) into (batch, queries, key_heads, group, dim)."""
        target = result[self.sample, self.rows, self.heads]
        target.copy_(found.view(found.shape[0], -1, *result.shape[3:]).transpose(0, 1))


@lru_cache(maxsize=8)
def causal_spans(batch: int, queries: int) -> Spans:
    """Return the spans in which every query attends to itself and all earlier positions."""
    last = torch.arange(1, queries + 1, dtype=torch.int32).expand(batch, -1)
    return Spans(torch.zeros_like(last), last)


def mask_spans(mask: Tensor) -> Spans | None:
    """Return the spans of a (batch, 1, queries, keys) mask; None if a query attends to more than one run of keys."""
    found: Spans | None = _once(_runs, mask)
    return found


def packed_lengths(mask: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Return the lengths of the samples in each row, on any device; the host waits for it once per mask.

    Args:
        mask: (batch, 1, tokens, tokens) bool, True for attended keys.

    Returns:
        None unless every token attends to exactly itself and all earlier tokens of its sample.
    """
    found: tuple[tuple[int, ...], ...] | None = _once(_samples, mask)
    return found


def _once(find: Callable[[Tensor], Any], mask: Tensor) -> Any:
    """Return what a function finds in a mask; kept with the mask until that is changed."""
    if mask.is_inference():  # no version counter, so a kept result could be stale
        return find(mask)
    name = f"_adaptkit{find.__name__}"
    version, found = getattr(mask, name, (None, None))
    if version != mask._version:
        found = find(mask)
        setattr(mask, name, (mask._version, found))
    return found


def _runs(mask: Tensor) -> Spans | None:
    seen = mask[:, 0]
    count = seen.sum(-1, dtype=torch.int32)
    first = torch.where(count > 0, seen.to(torch.uint8).argmax(-1).to(torch.int32), 0)
    last = first + count
    place = torch.arange(seen.shape[-1])
    runs = (place >= first[..., None]) & (place < last[..., None])
    return Spans(first, last) if torch.equal(runs, seen) else None


def _samples(mask: Tensor) -> tuple[tuple[int, ...], ...] | None:
    tokens, keys = mask.shape[2:]
    if tokens != keys:
        return None
    place = torch.arange(tokens, device=mask.device)
    first = torch.stack([row[0].view(torch.uint8).argmax(-1) for row in mask])  # one row at a time: less memory
    earlier = torch.stack([row[0].tril().sum(-1) for row in mask])
    counts = mask[:, 0].sum(-1)
    begins = first == place
    start = torch.where(begins, place, 0).cummax(-1).values
    is_run = (counts == earlier) & (counts == place - first + 1) & (first == start)
    begun: list[list[bool]] = torch.cat((begins, is_run.all(-1, keepdim=True)), -1).tolist()
    if not all(row.pop() for row in begun):
        return None
    cuts = ([*(index for index, begin in enumerate(row) if begin), tokens] for row in begun)
    return tuple(tuple(end - start for start, end in pairwise(cut)) for cut in cuts)
