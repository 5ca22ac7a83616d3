"""Gradient checkpointing in segments.

A segment is a run of consecutive layers. The forward pass keeps one tensor a segment, the input of its first layer.
The backward pass recomputes the inputs of the segment's layers from it, once, and then each layer's inside, one layer
at a time:

    memory   layers / length segment inputs + length layer inputs + the inside of one layer
    work     one more forward pass, and nearly another one for segments longer than one layer

With segments of √n layers both sums of inputs grow as √n (Chen et al., arXiv:1604.06174), and the inside of only one
layer is alive at a time, which flat segments do not give. ``networks.activations`` has the arithmetic.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import UsageError
from adaptkit.networks.activations import (
    AUTO,
    Checkpointing,
    LayerSize,
    fit_budget,
    fit_room,
    parse_policy,
)
from adaptkit.networks.assembly import find_stack
from adaptkit.networks.layer_call import LayerCall
from adaptkit.training.memory.offload import Shelf
from adaptkit.training.network.linear import LoraLinear, PackedWeight
from adaptkit.training.network.unread import standing_in


def choose_checkpointing(
    network: nn.Module,
    policy: str,
    measure: Callable[[], list[LayerSize]],
    offloaded: bool = False,
    room: int | None = None,
) -> Checkpointing:
    """What a policy means for a network.

    Args:
        network: of any kind if nothing is checkpointed, else with a stack of layers.
        policy: see ``networks.activations.parse_policy``.
        measure: gives the sizes of the layers; asked only where there is a budget or a room to keep to.
        offloaded: whether the inputs of segments will wait in host memory.
        room: bytes that ``auto`` may fill, if that is known.

    Raises:
        ConfigError: no such policy.
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
        with contextlib.suppress(UsageError):  # of layers that cannot be followed
            return fit_room(room, measure(), offloaded)
    return found if isinstance(found, Checkpointing) else fit_budget(found, measure(), offloaded)


def checkpoint_layers(
    network: nn.Module, checkpointing: Checkpointing, shelf: Shelf | None = None, done: int = 0
) -> None:
    """Make a network's layers keep only what is said. Takes effect wherever gradients are recorded.

    Nor do the packed weights of those layers stay resident between the passes.

    Args:
        network: to change.
        checkpointing: what ``choose_checkpointing`` gave.
        shelf: where the inputs of segments wait; None: where they are.
        done: of how many layers that is said already.
    """
    checked = checkpointing.layers - checkpointing.whole
    if checked <= done:
        return
    current: list[_Segment] = []
    for index, layer in list(enumerate(find_stack(network)[1][:checked]))[done:]:
        is_last = index % checkpointing.length == checkpointing.length - 1 or index == checked - 1
        place = _Place(index // checkpointing.length, index % checkpointing.length == 0, is_last, current, shelf)
        layer.forward = _checkpointed(layer, layer.forward, place)
        for weight in (module for module in layer.modules() if isinstance(module, PackedWeight)):
            weight.is_transient = True
            weight.was_decoded()  # by whatever looked at the network before


@dataclass
class _Segment:
    """What one forward pass through one segment keeps.

    Attributes:
        number: of the segment.
        start: gives the first layer's input.
        calls: of the layers so far.
        random: the random state before each layer.
        unread: the linear layers of each that need not run again.
        inputs: of the layers, while the backward pass is in this segment.
    """

    number: int
    start: Callable[[], Tensor]
    calls: list[LayerCall] = field(default_factory=list)
    random: list[Any] = field(default_factory=list)
    unread: list[list[LoraLinear]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def input_of(self, index: int) -> Tensor:
        """The input of a layer, recomputed if need be."""
        if not self.inputs:
            self.inputs = [self.start()]
            with torch.no_grad():
                for position in range(index):
                    _set_random(self.random[position], self.inputs[0].device)
                    self.inputs.append(self.calls[position](self.inputs[-1])[0])
        return self.inputs.pop()


@dataclass(frozen=True)
class _Place:
    """Where a layer is: in which segment, and whether it begins or ends it; the segment being run, and the shelf."""

    segment: int
    is_first: bool
    is_last: bool
    current: list[_Segment]
    shelf: Shelf | None

    def enter(self, hidden: Tensor) -> _Segment:
        """The segment of a layer that is about to run."""
        if self.is_first or not self.current or self.current[0].number != self.segment:
            kept = hidden.detach()
            self.current[:] = [_Segment(self.segment, self.shelf.put(kept) if self.shelf else lambda: kept)]
        segment = self.current[0]
        if self.is_last:
            self.current.clear()  # from here on only the graph keeps it
        return segment


class _Layer(torch.autograd.Function):
    """One layer of a segment: forward without a graph, backward by running it again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, trigger: Tensor, segment: _Segment, index: int, *others: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.segment, ctx.index, ctx.device, ctx.others = segment, index, hidden.device, len(others)
        ctx.set_materialize_grads(False)  # mostly nobody asks for other outputs than the first
        with torch.no_grad():
            first, *rest = segment.calls[index](hidden)
        return first, *(output.detach() for output in rest)  # one may be what the layer was given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        device = ctx.device
        if all(grad is None for grad in grads):
            return tuple(None for _ in range(4 + ctx.others))
        before = _random(device)
        # As many gradients as without checkpointing: there are other products for fewer, which round otherwise.
        hidden = ctx.segment.input_of(ctx.index).detach().requires_grad_(ctx.needs_input_grad[0])
        _set_random(ctx.segment.random[ctx.index], device)
        with torch.enable_grad(), standing_in(ctx.segment.unread[ctx.index]):
            call = ctx.segment.calls[ctx.index]
            others = [other.detach().requires_grad_() for other in call.others]
            outputs = call(hidden, others)
        pairs = zip(outputs, grads, strict=True)
        asked = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        torch.autograd.backward([output for output, _ in asked], [grad for _, grad in asked])
        _set_random(before, device)
        return hidden.grad, None, None, None, *(other.grad for other in others)


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], place: _Place) -> Callable[..., Any]:
    unread = [part for part in layer.modules() if isinstance(part, LoraLinear) and part.is_unread]

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call = LayerCall(forward, args, kwargs)
        hidden, others = call.take()
        segment = place.enter(hidden)
        index = len(segment.calls)
        segment.calls.append(call)
        segment.random.append(_random(hidden.device))
        segment.unread.append(unread)
        # The embeddings are frozen, so the first input needs no gradient; what is trained in the layer does.
        is_trained = any(parameter.requires_grad for parameter in layer.parameters())
        trigger = torch.empty(0, device=hidden.device, requires_grad=is_trained)
        outputs = _Layer.apply(hidden, trigger, segment, index, *others)  # type: ignore[no-untyped-call]
        return call.finish(outputs)

    return run


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
