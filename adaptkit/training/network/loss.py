"""Cross-entropy of a model's answers, without the full matrix of logits.

Only positions that carry loss go through the output layer, some hundreds at a time. A chunk's logits are overwritten
with their gradient, from which the gradients of the hidden states (and of the output layer, if it is trained) are
computed before the next chunk: only one chunk of logits exists at a time, and the backward pass only scales.

Source: the fused linear cross-entropy of Liger (arXiv:2410.10989), restricted to rows that carry loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.data.batches import Batch
from adaptkit.data.encoding import IGNORED
from adaptkit.models.casting import held
from adaptkit.models.memory import rows_at_a_time
from adaptkit.models.probing import InPlaceOf, exchanged
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.pinned import sent

_BLOCK_BYTES = 2 * 2**20
"""Size of a block of float32 logits on a CPU: fits its cache."""


def summed_loss(model: Any, batch: Batch, share: float = 1.0) -> Tensor:
    """Return the cross-entropy summed over a batch's answer tokens.

    No mask is passed: rows are padded at the end, and a causal model's other tokens do not attend to that padding. On a
    GPU the host waits before the first layer, where transformers checks whether positions restart (a mask would avoid
    that, but make attention slower in every layer), and for packed rows where the first layer with a mask reads the
    samples' lengths from it. All inputs are sent before that.

    Args:
        model: the ``Model``.
        batch: the batch; its labels mark the positions that carry loss.
        share: factor of the result in the loss that is to be minimized: a trained output layer that has a ``grad`` adds
            to it with this factor before the backward pass.

    Returns:
        () float32, in nats; differentiable if gradients are recorded.
    """
    network, device, output = model.network, model.device, model.output_layer
    places = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    labels = batch.labels[:, 1:][places]
    ids, row, column, wanted = (sent(side, device) for side in (batch.ids, *places, labels))
    positions = None if batch.positions is None else sent(batch.positions, device)
    body = network if output is None else network.base_model
    found = body(input_ids=ids, position_ids=positions, use_cache=False)
    if output is None:
        return functional.cross_entropy(found.logits[row, column].float(), wanted, reduction="sum")
    hidden = found.last_hidden_state
    chosen = hidden[row, column]
    trained = _trained(model, output, chosen)
    total: Tensor = _Loss.apply(chosen, wanted, output, share, *trained)  # type: ignore[no-untyped-call]
    return total


class OutputLayer:
    """Computes logits from hidden states.

    Args:
        network: transformers model.
        is_head: whether the logits are exactly the head's output for the last hidden state. Some architectures scale
            or cap them afterwards; then the whole network is run, with its body replaced.

    Attributes:
        cross_entropy: called with contiguous logits, (rows, vocabulary), their (rows,) int64 labels, and whether to
            overwrite the logits with the loss's gradient; returns the loss summed over the rows, () float32.
    """

    def __init__(self, network: Any, is_head: bool) -> None:
        self._network, self.is_head = network, is_head
        self.cross_entropy: Callable[[Tensor, Tensor, bool], Tensor] = cross_entropy

    @property
    def head(self) -> Any:
        """The output embeddings: the module with one row per token of the vocabulary."""
        return self._network.get_output_embeddings()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map (rows, dim) to (rows, vocabulary)."""
        if self.is_head:
            head = self.head
            if isinstance(head, nn.Linear):
                hidden = hidden.to(held(head, "weight")[1])  # Mamba's hidden states are always float32
            return head(hidden)  # type: ignore[no-any-return]
        body = self._network.base_model_prefix
        given = _FixedBody(self._network.get_submodule(body), hidden[None])
        with exchanged(self._network, {body: given}):
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._network(input_ids=ids, use_cache=False).logits
        return logits[0]


@torch.no_grad()
def find_output_layer(network: Any) -> OutputLayer | None:
    """Probe how a network computes logits from hidden states; None if they cannot be passed in."""
    if network.base_model_prefix not in network._modules or network.get_output_embeddings() is None:
        return None
    embedding = network.get_input_embeddings().weight
    size = network.config.get_text_config().hidden_size
    hidden = torch.linspace(-60, 60, 2 * size, device=embedding.device).view(2, size).to(embedding.dtype)
    run, head = OutputLayer(network, False), OutputLayer(network, True)
    logits = run(hidden)
    if torch.equal(logits, run(hidden.flip(1))):  # input ignored: it calls a part of its body directly, as OPT does
        return None
    if _shape(head.head)[1] != size:  # other layers precede the head, as in Electra
        return run
    return head if torch.equal(logits, head(hidden)) else run


class _FixedBody(InPlaceOf):
    """Replaces a network's body, which does not run: returns the given hidden states, (1, rows, dim)."""

    def __init__(self, body: nn.Module, hidden: Tensor) -> None:
        super().__init__(body)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states, whatever the arguments."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class _BodyOutput(BaseModelOutputWithPast):  # type: ignore[misc]
            def __getattr__(self, name: str) -> None:  # other outputs of some bodies, such as router logits: None
                if name.startswith("__"):
                    raise AttributeError(name)

        return _BodyOutput(last_hidden_state=self.hidden)


class _Loss(torch.autograd.Function):
    """The summed loss; its forward pass also computes the gradients of hidden states and trained output parameters."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, wanted: Tensor, output: OutputLayer, share: float, *trained: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        wants = any(ctx.needs_input_grad)
        grads: list[Tensor | None] = [torch.zeros_like(hidden), *(None for _ in trained)] if wants else []
        ctx.share = share if trained else 1.0
        rows = rows_at_a_time(_shape(output.head)[0], hidden.element_size(), hidden.is_cuda)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_(wants)
            with torch.set_grad_enabled(wants):
                logits = output(part)
            # Copied unless from a plain head: the network may have saved its logits for its backward pass.
            chunk = logits.detach().contiguous() if output.is_head else logits.detach().clone()
            total += output.cross_entropy(chunk, wanted[start : start + len(part)], wants)
            if wants:
                chunk = chunk.mul_(share) if trained else chunk
                found = torch.autograd.grad(logits, (part, *trained), chunk, allow_unused=True)
                _add(grads, found, start)
                del found
            del logits, chunk  # free them before the next ones are allocated
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = (None if grad is None else grad.mul_(grads[0] / ctx.share) for grad in ctx.grads)
        del ctx.grads
        return hidden, None, None, None, *trained


def _add(grads: list[Tensor | None], found: Sequence[Tensor | None], start: int) -> None:
    """Add a chunk's gradients: those of its rows, from ``start``, and those of others that were not added yet."""
    rows, *others = found
    if grads[0] is not None and rows is not None:
        grads[0][start : start + len(rows)] = rows
    for index, more in enumerate(others, 1):
        if more is not None:
            total = grads[index]
            total = torch.zeros_like(more) if total is None else total  # a copy: torch may return one tensor twice
            grads[index] = total.add_(more)


def _shape(head: Any) -> tuple[int, int]:
    """Return (vocabulary, dim) of an output layer's weight."""
    weight = head.base if isinstance(head, LoraLinear) else held(head, "weight")[0]
    rows, columns = weight.shape
    return int(rows), int(columns)


def _trained(model: Any, output: OutputLayer, rows: Tensor) -> list[Tensor]:
    """Return the trained parameters that the output layer's result depends on; most runs train none."""
    beside = (*model.network.children(), output.head)  # in BERT another layer and a norm precede the output layer
    parts = (part.parameters() for part in beside if part is not model.network.base_model)
    if not torch.is_grad_enabled() or not (model.rows or any(p.requires_grad for side in parts for p in side)):
        return []
    found: list[Tensor] = []
    logits = output(rows[:1].detach())  # keeps the graph: in torch 2.9 the Python objects of its nodes do not
    nodes = [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            variable = getattr(node, "variable", None)
            if variable is not None and all(variable is not other for other in found):
                found.append(variable)
            nodes += [inner for inner, _ in node.next_functions]
    return found


def cross_entropy(logits: Tensor, wanted: Tensor, keep: bool) -> Tensor:
    """Return the summed loss of some rows; with ``keep``, overwrite their logits with its gradient.

    Args:
        logits: (rows, vocabulary), contiguous.
        wanted: (rows,) int64, the labels.
        keep: whether to write the gradient.

    Returns:
        () float32.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    size = len(logits) if logits.is_cuda else max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), size):
        block, target = logits[start : start + size], wanted[start : start + size, None]
        work = block.to(torch.float32, copy=True)
        label_logits = work.gather(1, target)
        largest = work.amax(1, keepdim=True)
        sums = work.sub_(largest).exp_().sum(1, keepdim=True)
        total += (sums.log() + largest - label_logits).sum()
        if keep:
            work.mul_(1 / sums)
            block.copy_(work.scatter_add_(1, target, torch.full_like(label_logits, -1.0)))
    return total
