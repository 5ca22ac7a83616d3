"""Causal attention on a CPU, block by block of queries, as bfloat16 matrix products with one pass between them.

torch's own kernel for a CPU takes several times as long as the products alone. This one keeps nothing between the
forward and the backward pass but its inputs, its output and one number a row, and skips the keys that no query of a
block attends to: what lies behind it, before its window, or in another document of a packed row.

    S = scale · Q Kᵀ        P = softmax(S) over the keys that a query sees        Y = P V
    dV = Pᵀ dY              dP = dY Vᵀ              dS = P ∘ (dP - rowsum(dY ∘ Y))              dQ = dS K, dK = dSᵀ Q

Source: FlashAttention's recomputation (arXiv:2205.14135); scores are rounded to the compute dtype between products, as
transformers' eager attention rounds them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptkit.numerics.kernels._cpu_attention import gradient_block, softmax_block
from adaptkit.numerics.kernels._cpu_float import float_bits

NAME = "adaptkit"
"""In transformers' registry of attention functions."""

_ROWS = 128
"""Queries in a block."""

_SCORES = 1 << 20
"""Scores in a block: what a processor's cache holds."""


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor) -> Tensor:
    """Attention in which every query sees one run of keys.

    Args:
        query: (batch, heads, queries, dim), bfloat16 or float32, on a CPU.
        key: (batch, key_heads, keys, dim); each serves heads / key_heads heads.
        value: (batch, key_heads, keys, value_dim).
        scale: of the scores.
        spans: (2, batch, queries) int32, the first key that a query sees, and one past the last.

    Returns:
        (batch, queries, heads, value_dim); zero where a query sees nothing.
    """
    result: Tensor = _Attention.apply(query, key, value, scale, spans)  # type: ignore[no-untyped-call]
    return result


def causal_spans(batch: int, queries: int) -> Tensor:
    """Every query sees itself and what is before it: (2, batch, queries) int32."""
    last = torch.arange(1, queries + 1, dtype=torch.int32).expand(batch, -1)
    return torch.stack((torch.zeros_like(last), last))


def mask_spans(mask: Tensor) -> Tensor | None:
    """The runs of keys of a mask.

    Args:
        mask: (batch, 1, queries, keys) bool, True for what is seen.

    Returns:
        (2, batch, queries) int32, or None if some query sees more than one run.
    """
    seen = mask[:, 0]
    count = seen.sum(-1, dtype=torch.int32)
    first = torch.where(count > 0, seen.to(torch.uint8).argmax(-1).to(torch.int32), 0)
    last = first + count
    place = torch.arange(seen.shape[-1])
    runs = (place >= first[..., None]) & (place < last[..., None])
    return torch.stack((first, last)) if torch.equal(runs, seen) else None


class _Attention(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor) -> Tensor:
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, queries, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, queries, dtype=torch.float32)
        for block in _blocks(spans, heads, key.shape[1]):
            q, k, v = block.of_queries(query), block.of_keys(key), block.of_keys(value)
            scores = torch.bmm(q, k.transpose(1, 2))
            sums = torch.empty((len(block), *block.first.shape))
            softmax_block(float_bits(scores.view(*sums.shape, -1)), block.first, block.last, scale, sums.numpy())
            log_sums[block.sample, block.heads, block.rows] = sums
            output[block.sample, block.rows, block.heads] = block.split(torch.bmm(scores, v)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, log_sums, spans)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums, spans = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)
        means = (grad.float() * output.transpose(1, 2)).sum(-1)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(side.shape, dtype=torch.float32) for side in (key, value))
        for block in _blocks(spans, query.shape[1], key.shape[1]):
            q, y = block.of_queries(query), block.of_queries(grad)
            k, v = block.of_keys(key), block.of_keys(value)
            scores, changes = torch.bmm(q, k.transpose(1, 2)), torch.bmm(y, v.transpose(1, 2))
            place = block.sample, block.heads, block.rows
            sums, mean = (side[place].contiguous().numpy() for side in (log_sums, means))
            bits = (float_bits(side.view(*sums.shape, -1)) for side in (scores, changes))
            gradient_block(*bits, block.first, block.last, ctx.scale, sums, mean)
            block.of_keys(grad_value).add_(torch.bmm(scores.transpose(1, 2), y))
            block.of_keys(grad_key).add_(torch.bmm(changes.transpose(1, 2), q))
            grad_query[place] = block.split(torch.bmm(changes, k))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


@dataclass(frozen=True)
class _Block:
    """Some queries of some heads, and the keys that any of them sees.

    Attributes:
        sample: of the batch.
        rows: the queries.
        heads: of the queries.
        key_heads: that serve those heads.
        keys: what any of the queries sees.
        first: (rows,) int32, the first key that a query sees, counted from the block's first.
        last: (rows,) int32, one past the last.
    """

    sample: int
    rows: slice
    heads: slice
    key_heads: slice
    keys: slice
    first: Any
    last: Any

    def __len__(self) -> int:
        return int(self.heads.stop - self.heads.start)

    def of_queries(self, tensor: Tensor) -> Tensor:
        """(key heads, heads of each times rows, dim) of (batch, heads, queries, dim)."""
        chosen = tensor[self.sample, self.heads, self.rows]
        return chosen.reshape(self.key_heads.stop - self.key_heads.start, -1, tensor.shape[-1])

    def of_keys(self, tensor: Tensor) -> Tensor:
        """(key heads, keys, dim) of (batch, key_heads, keys, dim)."""
        return tensor[self.sample, self.key_heads, self.keys]

    def split(self, tensor: Tensor) -> Tensor:
        """(heads, rows, dim) of what ``of_queries`` made."""
        return tensor.view(len(self), -1, tensor.shape[-1])


def _blocks(spans: Tensor, heads: int, key_heads: int) -> Iterator[_Block]:
    group = heads // key_heads
    for sample in range(spans.shape[1]):
        for start in range(0, spans.shape[2], _ROWS):
            first, last = (side[sample, start : start + _ROWS] for side in spans)
            low = int(first.min())
            high = max(low + 1, int(last.max()))
            counted = (first - low).numpy(), (last - low).numpy()
            step = max(1, _SCORES // (group * len(first) * (high - low)))
            for head in range(0, key_heads, step):
                end = min(head + step, key_heads)
                chosen = slice(head * group, end * group), slice(head, end), slice(low, high)
                yield _Block(sample, slice(start, start + len(first)), *chosen, *counted)


def use_own_attention(network: Any) -> None:
    """Make a transformers model on a CPU take this attention wherever it computes the same; elsewhere sdpa stays.

    With more than two threads it stays everywhere, since the passes between the products take one here.

    Args:
        network: transformers' model; one whose attention is not sdpa stays as it is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if network.config._attn_implementation == "sdpa" and torch.get_num_threads() <= 2:
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        network.set_attn_implementation(NAME)


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls; (batch, queries, heads, dim), and no weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    spans = _spans(module, query, key, attention_mask, options)
    if spans is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    scale = options.get("scaling")
    return attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, spans), None


def _spans(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """The keys that queries see, or None if this is not the attention that is computed here."""
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    is_here = query.device.type == "cpu"  # a model that was loaded here may have been moved
    if unknown or options.get("dropout") or not is_here or query.dtype not in (torch.bfloat16, torch.float32):
        return None
    if mask is not None:
        return mask_spans(mask) if mask.dtype == torch.bool and mask.shape[1] == 1 else None
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    same = query.shape[2] == key.shape[2] > 1
    return causal_spans(query.shape[0], query.shape[2]) if causal and same else None
