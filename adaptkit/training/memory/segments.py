"""Gradient checkpointing in segments.

A segment is a range of consecutive layers. The forward pass keeps one tensor per segment, the input of its first layer.
The backward pass recomputes the inputs of the segment's other layers from it, once, and then the activations inside
each layer, one layer at a time:

    memory   layers / length segment inputs + length layer inputs + activations inside one layer
    work     one more forward pass, and nearly a second one for segments longer than one layer

With segments of √n layers both numbers of inputs grow as √n (Chen et al., arXiv:1604.06174). Unlike in plain segment
checkpointing, activations inside only one layer are alive at a time. ``models.activations`` computes the sizes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import UsageError
from adaptkit.models.activations import (
    AUTO,
    Checkpointing,
    LayerSize,
    fit_budget,
    fit_memory,
    parse_policy,
)
from adaptkit.models.assembly import find_stack
from adaptkit.models.layer_call import LayerCall
from adaptkit.models.subclassing import take_place
from adaptkit.training.memory.offload import OffloadedTensors
from adaptkit.training.network.frozen import PackedWeight


def choose_checkpointing(
    network: nn.Module,
    policy: str,
    measure: Callable[[], list[LayerSize]],
    offloaded: bool = False,
    room: int | None = None,
) -> Checkpointing:
    """Resolve a checkpointing policy for a network.

    Args:
        network: any network for ``auto`` and ``none``; otherwise it must have a stack of layers.
        policy: see ``models.activations.parse_policy``.
        measure: returns the sizes of the layers; called only for a budget, or for ``auto`` with ``room``.
        offloaded: whether the inputs of segments will be offloaded to host memory.
        room: bytes that ``auto`` may use; None if unknown.

    Raises:
        ConfigError: unknown policy.
        UsageError: the network has no stack of layers, or the budget is too small.
    """
    try:
        _, layers = find_stack(network)
    except UsageError as error:
        if policy in {AUTO, "none"}:
            return Checkpointing(0, 1)
        raise UsageError(error.message, hint="use --checkpointing none") from error
    found = parse_policy(policy, len(layers))
    if policy == AUTO and room is not None:
        with contextlib.suppress(UsageError):  # layers that cannot be measured: use the default
            return fit_memory(room, measure(), offloaded)
    return found if isinstance(found, Checkpointing) else fit_budget(found, measure(), offloaded)


def checkpoint_layers(
    network: nn.Module, checkpointing: Checkpointing, offloaded: OffloadedTensors | None = None, done: int = 0
) -> None:
    """Checkpoint a network's layers; takes effect wherever gradients are recorded.

    The mapped pages of these layers' packed weights are also released after each decoding.

    Args:
        network: modified in place.
        checkpointing: result of ``choose_checkpointing``.
        offloaded: holds the inputs of segments in host memory; None: they stay on the device.
        done: number of first layers that are checkpointed already.
    """
    checked = checkpointing.layers - checkpointing.whole
    if checked <= done:
        return
    current: list[_Segment] = []
    for index, layer in list(enumerate(find_stack(network)[1][:checked]))[done:]:
        is_last = index % checkpointing.length == checkpointing.length - 1 or index == checked - 1
        is_first = index % checkpointing.length == 0
        checkpointed = take_place(network, layer, _CheckpointedLayer)
        checkpointed.position = _Position(index // checkpointing.length, is_first, is_last, current, offloaded)
        for weight in (module for module in layer.modules() if isinstance(module, PackedWeight)):
            weight.is_transient = True
            weight.release_pages()  # earlier probes of the network may have touched them


_recomputing = False


def is_recomputing() -> bool:
    """Return whether a layer runs again for its backward pass, so that its result is not read, only its graph."""
    return _recomputing


@dataclass
class _Segment:
    """What one forward pass through one segment keeps.

    Attributes:
        number: index of the segment.
        start: returns the first layer's input.
        calls: the calls of the layers so far.
        random: the random state before each layer.
        inputs: recomputed inputs of the layers, while the backward pass is in this segment.
    """

    number: int
    start: Callable[[], Tensor]
    calls: list[LayerCall] = field(default_factory=list)
    random: list[Any] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def input_of(self, index: int) -> Tensor:
        """Return the input of a layer, recomputing the inputs of all layers up to it if needed.

        Layers must request their inputs in reverse order.
        """
        if not self.inputs:
            self.inputs = [self.start()]
            with torch.no_grad():
                for position in range(index):
                    _set_random(self.random[position], self.inputs[0].device)
                    self.inputs.append(self.calls[position](self.inputs[-1])[0])
        return self.inputs.pop()


@dataclass(frozen=True)
class _Position:
    """Where a layer stands: its segment, whether the layer is first or last in it, and what all layers share.

    Attributes:
        segment: number of the segment.
        is_first: whether the layer is the first of its segment.
        is_last: whether it is the last.
        current: the running segment.
        offloaded: keeps the inputs of segments in host memory; None: they stay on the device.
    """

    segment: int
    is_first: bool
    is_last: bool
    current: list[_Segment]
    offloaded: OffloadedTensors | None

    def enter(self, hidden: Tensor) -> _Segment:
        """Return the segment of a layer that is about to run, created if the layer is the segment's first to run."""
        if self.is_first or not self.current or self.current[0].number != self.segment:
            kept = hidden.detach()
            self.current[:] = [_Segment(self.segment, self.offloaded.put(kept) if self.offloaded else lambda: kept)]
        segment = self.current[0]
        if self.is_last:
            self.current.clear()  # from now on only the graph keeps it alive
        return segment


class _Recomputed(torch.autograd.Function):
    """One layer of a segment: forward without a graph, recomputed with one in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, trigger: Tensor, segment: _Segment, index: int, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.segment, ctx.index, ctx.device, ctx.others = segment, index, hidden.device, len(others)
        ctx.set_materialize_grads(False)  # usually only the first output gets a gradient
        with torch.no_grad():
            first, *rest = segment.calls[index](hidden)
        return first, *(output.detach() for output in rest)  # detached, since a layer may return one of its inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        device = ctx.device
        if all(grad is None for grad in grads):
            return tuple(None for _ in range(4 + ctx.others))
        before = _random(device)
        # Request the same gradients as without checkpointing: for fewer, torch may use products that round differently.
        hidden = ctx.segment.input_of(ctx.index).detach().requires_grad_(ctx.needs_input_grad[0])
        _set_random(ctx.segment.random[ctx.index], device)
        with torch.enable_grad(), _recomputation():
            call = ctx.segment.calls[ctx.index]
            others = [other.detach().requires_grad_() for other in call.others]
            outputs = call(hidden, others)
        pairs = zip(outputs, grads, strict=True)
        asked = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        torch.autograd.backward([output for output, _ in asked], [grad for _, grad in asked])
        _set_random(before, device)
        return hidden.grad, None, None, None, *(other.grad for other in others)


@contextlib.contextmanager
def _recomputation() -> Iterator[None]:
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


class _CheckpointedLayer(nn.Module):
    position: _Position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and keep only its segment's first input."""
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = LayerCall(forward, args, kwargs)
        hidden, others = call.take()
        segment = self.position.enter(hidden)
        index = len(segment.calls)
        segment.calls.append(call)
        segment.random.append(_random(hidden.device))
        # With frozen embeddings the first layer's input needs no gradient, so an empty tensor that requires grad makes
        # autograd run the backward pass for the layer's trained parameters.
        is_trained = any(parameter.requires_grad for parameter in self.parameters())
        trigger = torch.empty(0, device=hidden.device, requires_grad=is_trained)
        outputs = _Recomputed.apply(hidden, trigger, segment, index, *others)  # type: ignore[no-untyped-call]
        return call.finish(outputs)


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
