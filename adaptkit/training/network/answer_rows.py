"""The last layer's MLP, computed only for the positions that carry loss.

    h' = h + mlp(norm(h))        in the last layer no position attends to h' of another one

In most instruction data less than half of the positions carry loss. The MLP is found by probing the network: a NaN in
its result for one position must reach the final hidden state of that position, and of no other. In an earlier layer it
would reach later positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.data.batches import Batch
from adaptkit.data.encoding import IGNORED
from adaptkit.training.network.fused import fused_gates
from adaptkit.training.network.model import Model
from adaptkit.training.network.probing import as_in_training

_MOST = 0.9
"""Largest share of positions with loss for which selecting them is worth copying them."""
_PROBED = (0, 1)
"""Sample and position of the probe's NaN: in two samples of three tokens, neither its sample's first nor last."""


class AnswerRows:
    """Lets the MLP of a model's last layer compute only some positions, on a CPU, where it can be recognized.

    Args:
        model: ready to train; the MLP's forward is replaced.
    """

    def __init__(self, model: Model) -> None:
        self._mlp: _Chosen | None = None
        gates = fused_gates(model.network)
        if gates and model.device.type == "cpu" and model.output_layer is not None and _is_last(gates[-1], model):
            self._mlp = gates[-1].forward = _Chosen(gates[-1].forward)

    @contextmanager
    def only(self, batch: Batch) -> Iterator[None]:
        """Compute only the positions of a batch that carry loss while the block runs, a backward pass included.

        All are computed if more than nine in ten carry loss, or none.
        """
        if self._mlp is None:
            yield
            return
        carries = torch.zeros(batch.labels.shape, dtype=torch.bool)
        carries[:, :-1] = batch.labels[:, 1:] != IGNORED
        chosen = carries.flatten().nonzero().squeeze(1)
        if 0 < chosen.shape[0] <= _MOST * carries.numel():
            self._mlp.choose(carries.numel(), chosen)
        try:
            yield
        finally:
            self._mlp.choose(0, None)


class _Chosen:
    """A forward pass that computes only chosen positions; the result for the others is zero.

    Args:
        full: the forward pass for all.
    """

    def __init__(self, full: Callable[[Tensor], Tensor]) -> None:
        self._full = full
        self.choose(0, None)

    def choose(self, positions: int, chosen: Tensor | None) -> None:
        """Set the positions to compute in inputs that have so many: (N,) int64; None for all."""
        self._positions, self._chosen = positions, chosen

    def __call__(self, x: Tensor) -> Tensor:
        if self._chosen is None or x.shape[:-1].numel() != self._positions:
            return self._full(x)
        part = self._full(_Take.apply(x, self._chosen))  # type: ignore[no-untyped-call]
        result: Tensor = _Put.apply(part, self._chosen, x.shape)  # type: ignore[no-untyped-call]
        return result


def _is_last(mlp: nn.Module, model: Model) -> bool:
    """Return whether a module's result for a position affects only the final hidden state of that position."""

    def spoil(_: nn.Module, args: Any, result: Tensor) -> Tensor:
        spoiled = result.clone()
        spoiled.view(-1, result.shape[-1])[_PROBED[1]] = torch.nan
        return spoiled

    ids = torch.arange(6, device=model.device).view(2, 3) % model.network.get_input_embeddings().weight.shape[0]
    hook = mlp.register_forward_hook(spoil)
    try:
        with as_in_training(model.network):
            hidden = model.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[_PROBED] = True
    found = hidden.isnan()
    return torch.equal(found.any(-1), expected) and torch.equal(found.all(-1), expected)


class _Take(torch.autograd.Function):
    """Select rows of (…, dim): (rows, dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor) -> Tensor:
        ctx.shape, ctx.chosen = x.shape, chosen
        return x.reshape(-1, x.shape[-1])[chosen]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _spread(grads[0], ctx.chosen, ctx.shape), None


class _Put(torch.autograd.Function):
    """Put selected rows into a tensor of zeros."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, chosen: Tensor, shape: torch.Size) -> Tensor:
        ctx.chosen = chosen
        return _spread(part, chosen, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].reshape(-1, grads[0].shape[-1])[ctx.chosen], None, None


def _spread(part: Tensor, chosen: Tensor, shape: torch.Size) -> Tensor:
    whole = part.new_zeros(shape)
    whole.view(-1, shape[-1])[chosen] = part
    return whole
