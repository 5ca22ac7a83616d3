"""Causal attention, on a CPU one block of queries at a time: matrix products with one fused pass between them.

On a GPU, see ``attention_gpu``. torch's CPU kernel takes several times as long as the matrix products. This one saves
for the backward pass only its inputs, its output and one number per row, and skips keys that no query of a block
attends to: later keys, keys before the sliding window, and keys of other samples in a packed row.

    S = scale · Q Kᵀ        P = softmax(S) over the keys that a query sees        Y = P V
    dV = Pᵀ dY              dP = dY Vᵀ              dS = P ∘ (dP - rowsum(dY ∘ Y))              dQ = dS K, dK = dSᵀ Q

Source: FlashAttention's recomputation (arXiv:2205.14135); scores are rounded to the compute dtype between products, as
transformers' eager attention rounds them.
"""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptkit.models.attention import asks_for_more, replace_attention
from adaptkit.models.fakes import is_fake, real_tensors
from adaptkit.training.fast.attention_gpu import attend_on_gpu
from adaptkit.training.fast.attention_spans import Block, Spans, causal_spans, mask_spans
from adaptkit.training.fast.cpu_attention import gradients, softmax

NAME = "adaptkit"
"""Name in transformers' registry of attention functions."""


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans) -> Tensor:
    """Compute attention in which every query attends to one contiguous run of keys.

    Args:
        query: (batch, heads, queries, dim), bfloat16 or float32, on a CPU.
        key: (batch, key_heads, keys, dim); each key head serves heads / key_heads query heads.
        value: (batch, key_heads, keys, value_dim).
        scale: factor of the scores.
        spans: the keys that each query attends to.

    Returns:
        (batch, queries, heads, value_dim); zero where a query attends to nothing.
    """
    result: Tensor = _Attention.apply(query, key, value, scale, spans)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans) -> Tensor:
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, queries, heads, value.shape[-1])
        by_key_heads = output.view(batch, queries, key.shape[1], -1, value.shape[-1])
        grouped, key, value = _grouped(query, key.shape[1]), key.contiguous(), value.contiguous()
        factor = np.float32(scale)  # a float64 would make the kernels compute in float64
        with real_tensors():
            ctx.blocks, ctx.log_sums = list(spans.blocks(heads, key.shape[1])), []
        if is_fake(query):  # only sizes are asked for: at most those of the largest block, and what all blocks keep
            ctx.blocks = [max(ctx.blocks, key=Block.scores)]
            ctx.all_log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        for block in ctx.blocks:
            scores = torch.bmm(block.of_queries(grouped), block.of_keys(key).transpose(1, 2))
            ctx.log_sums.append(softmax(scores, block.first, block.last, factor))
            block.put(torch.bmm(scores, block.of_keys(value)), by_key_heads)
        ctx.save_for_backward(grouped, key, value, output)
        ctx.factor = factor
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        change = _grouped(grads[0].transpose(1, 2), key.shape[1])
        means = _grouped((grads[0].float() * output).sum(-1).transpose(1, 2), key.shape[1])
        grad_query = query.new_empty(*query.transpose(1, 2).shape)
        grad_key, grad_value = (torch.zeros(side.shape, dtype=torch.float32) for side in (key, value))
        for block, sums in zip(ctx.blocks, ctx.log_sums, strict=True):
            q, y, mean = (block.of_queries(side) for side in (query, change, means))
            k, v = block.of_keys(key), block.of_keys(value)
            scores, changes = torch.bmm(q, k.transpose(1, 2)), torch.bmm(y, v.transpose(1, 2))
            gradients(scores, changes, block.first, block.last, ctx.factor, sums, mean)
            block.of_keys(grad_value).add_(torch.bmm(scores.transpose(1, 2), y))
            block.of_keys(grad_key).add_(torch.bmm(changes.transpose(1, 2), q))
            block.put(torch.bmm(changes, k), grad_query)
            del scores, changes  # before the next block's are made
        grad_query = grad_query.flatten(2, 3).transpose(1, 2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _grouped(side: Tensor, key_heads: int) -> Tensor:
    """Regroup (batch, heads, queries, …) by key head: (batch, key_heads, queries, group, …), contiguous."""
    return side.view(side.shape[0], key_heads, -1, *side.shape[2:]).transpose(2, 3).contiguous()


def use_own_attention(network: Any) -> None:
    """Make a transformers model use this attention wherever it is equivalent; other calls fall back to sdpa.

    Args:
        network: transformers model; see ``replace_attention``.
    """
    from transformers.masking_utils import sdpa_mask

    replace_attention(network, NAME, _forward, sdpa_mask)


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention for transformers: (batch, queries, heads, value_dim), and None for the attention weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = _attend(module, query, key, value, attention_mask, options)
    if found is None:
        # transformers' own masks are bool here. A float mask is computed by a layer from its hidden states (Doge). In a
        # checkpointed layer it requires grad in only one of the two forward passes, and torch would choose another
        # kernel for that one: so force the same kernel in both.
        is_made = attention_mask is not None and attention_mask.is_floating_point() and query.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if is_made else contextlib.nullcontext():
            result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    return found, None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    """Compute attention for any device; None if neither ``attend`` nor ``attend_on_gpu`` can compute this call."""
    if asks_for_more(options):
        return None
    if mask is not None:
        whole = query.shape[0], 1, query.shape[2], key.shape[2]  # a mask to be broadcast or sliced is left to sdpa
        is_known = mask.dtype == torch.bool and mask.shape == whole
    else:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        is_known = causal and query.shape[2] == key.shape[2] > 1
    if not is_known:
        return None
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.is_cuda:  # not only where the model was loaded: it may have been moved since
        return attend_on_gpu(query, key, value, scale, mask)
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float32):
        return None
    with real_tensors():
        is_causal = mask is None or is_fake(mask)  # transformers masks a planned run's rows, which are single samples
        spans = causal_spans(query.shape[0], query.shape[2]) if mask is None or is_causal else mask_spans(mask)
    return None if spans is None else attend(query, key, value, scale, spans)
