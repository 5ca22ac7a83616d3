"""Cross-entropy of a model's answers, without the matrix of logits.

Only positions that carry loss go through the output layer, some hundreds at a time. A chunk's logits become their own
gradient in place, which is folded into the gradients of the hidden states (and of the output layer, where that is
trained) before the next chunk is made: the largest thing that exists is one chunk of logits, and the backward pass has
nothing left to do but to scale.

Source: the fused linear cross-entropy of Liger (arXiv:2410.10989), on rows that carry loss only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.checkpoint.memory import rows_at_a_time
from adaptkit.training.data.batches import Batch
from adaptkit.training.data.samples import IGNORED
from adaptkit.training.network.linear import LoraLinear

_BLOCK_BYTES = 2 * 2**20
"""Of logits in float32, on a CPU: what its cache holds."""


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over a batch's answer tokens.

    Rows are padded at the end, where a causal model's other tokens do not see the padding; so no mask is passed.

    Args:
        model: the ``Model``.
        batch: whose labels say what carries loss.

    Returns:
        () float32, in nats; with a gradient if gradients are recorded.
    """
    network = model.network
    device, labels = model.device, batch.labels[:, 1:]
    inputs = {
        "input_ids": batch.ids.to(device),
        "position_ids": None if batch.positions is None else batch.positions.to(device),
        "use_cache": False,
    }
    if not model.logits_are_the_heads:
        positions = (labels != IGNORED).any(dim=0).nonzero().reshape(-1)
        logits = network(**inputs, logits_to_keep=positions.to(device)).logits
        wanted = labels[:, positions].to(device).reshape(-1)
        flat = logits.float().reshape(-1, logits.shape[-1])
        return functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    hidden = network.base_model(**inputs).last_hidden_state
    chosen = (labels != IGNORED).to(device)
    head = network.get_output_embeddings()
    rows, wanted = hidden[:, :-1][chosen], labels.to(device)[chosen]
    total: Tensor = _Loss.apply(rows, wanted, head, *_trained(model, head, rows))  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def logits_are_the_heads(network: Any) -> bool:
    """Whether a network's logits are what its output layer makes of the last hidden state, and nothing else.

    Some architectures scale or bound them afterwards. Asked of the network itself: it gets a hidden state in place of
    its body's.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:  # what else some bodies give: attentions, routers' logits
            if name.startswith("__"):
                raise AttributeError(name)

    body, head = network.base_model, network.get_output_embeddings()
    if body is network or head is None:
        return False
    embedding = network.get_input_embeddings().weight
    hidden = torch.linspace(-60, 60, 2 * network.config.get_text_config().hidden_size, device=embedding.device)
    hidden = hidden.view(1, 2, -1).to(embedding.dtype)
    body.forward = lambda *args, **kwargs: Output(last_hidden_state=hidden)
    try:
        logits = network(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=embedding.device)).logits
    finally:
        del body.forward
    return torch.equal(logits, head(hidden))


class _Loss(torch.autograd.Function):
    """The sum, and while it is made its gradients, by hidden states and by what is trained in the output layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: nn.Module, *trained: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        wants = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(side) for side in (hidden, *trained)] if wants else []
        rows = _rows(hidden, head)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_(wants)
            with torch.set_grad_enabled(wants):
                logits = head(part)
            total += _fold(logits.detach(), wanted[start : start + len(part)], wants)
            if wants:
                found = torch.autograd.grad(logits, (part, *trained), logits.detach())
                grads[0][start : start + len(part)] = found[0]
                for grad, more in zip(grads[1:], found[1:], strict=True):
                    grad += more
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = (grad.mul_(grads[0]) for grad in ctx.grads)
        del ctx.grads
        return hidden, None, None, *trained


def _rows(hidden: Tensor, head: Any) -> int:
    """How many positions go through the output layer at a time."""
    vocabulary = head.base.shape[0] if isinstance(head, LoraLinear) else head.out_features
    return rows_at_a_time(int(vocabulary), hidden.element_size())


def _trained(model: Any, head: nn.Module, rows: Tensor) -> list[Tensor]:
    """The parameters that the output layer's result depends on and that are trained; most runs train none."""
    if not torch.is_grad_enabled() or not (model.rows or any(p.requires_grad for p in head.parameters())):
        return []
    found: list[Tensor] = []
    nodes = [head(rows[:1].detach()).grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            variable = getattr(node, "variable", None)
            if variable is not None and all(variable is not other for other in found):
                found.append(variable)
            nodes += [inner for inner, _ in node.next_functions]
    return found


def _fold(logits: Tensor, wanted: Tensor, keep: bool) -> Tensor:
    """The loss of a chunk; its logits become the loss's gradient by them if that is to be kept.

    Args:
        logits: (rows, vocabulary).
        wanted: (rows,) int64.
        keep: whether to write the gradient.

    Returns:
        () float32.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    size = len(logits) if logits.is_cuda else max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), size):
        block, target = logits[start : start + size], wanted[start : start + size, None]
        work = block.to(torch.float32, copy=True)
        said = work.gather(1, target)
        largest = work.amax(1, keepdim=True)
        sums = work.sub_(largest).exp_().sum(1, keepdim=True)
        total += (sums.log() + largest - said).sum()
        if keep:
            work.mul_(1 / sums)
            block.copy_(work.scatter_add_(1, target, torch.full_like(said, -1.0)))
    return total
