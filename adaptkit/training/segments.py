"""Gradient checkpointing in segments.

A segment is a run of consecutive layers. The forward pass keeps one tensor a segment, the input of its first layer.
The backward pass recomputes the inputs of the segment's layers from it, once, and then each layer's inside, one layer
at a time:

    memory   layers / length segment inputs + length layer inputs + the inside of one layer
    work     one more forward pass, and nearly another one for segments longer than one layer

With segments of √n layers both sums of inputs grow as √n (Chen et al., arXiv:1604.06174), and the inside of only one
layer is alive at a time, which flat segments do not give.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.assembly import find_stack
from adaptkit.errors import ConfigError, UsageError

Run = Callable[[Tensor], Tensor]


def segment_length(policy: str, layers: int) -> int | None:
    """How many layers a segment has.

    Args:
        policy: ``none``, ``layer``, ``sqrt`` or ``segments:K``.
        layers: of the model.

    Returns:
        None if nothing is checkpointed.

    Raises:
        ConfigError: another policy.
    """
    if policy == "none":
        return None
    if policy == "layer":
        return 1
    if policy == "sqrt":
        return max(1, round(math.sqrt(layers)))
    kind, _, count = policy.partition(":")
    if kind == "segments" and count.isdecimal() and int(count) >= 1:
        return math.ceil(layers / int(count))
    raise ConfigError(f"checkpointing: {policy!r} is none of none, layer, sqrt, segments:K")


def checkpoint_layers(model: nn.Module, policy: str) -> int:
    """Make a model's layers keep only what the policy says. Takes effect wherever gradients are recorded.

    Returns:
        The number of segments; 0 if nothing is checkpointed.

    Raises:
        ConfigError: no such policy.
        UsageError: the model has no stack of layers, and the policy needs one.
    """
    if policy == "none":
        return 0
    try:
        _, layers = find_stack(model)
    except UsageError as error:
        raise UsageError(error.message, hint="checkpointing: none") from error
    length = segment_length(policy, len(layers)) or len(layers)
    current: list[_Segment] = []
    for index, layer in enumerate(layers):
        is_last = index % length == length - 1 or index == len(layers) - 1
        layer.forward = _checkpointed(layer.forward, index % length, is_last, current)
    return math.ceil(len(layers) / length)


@dataclass
class _Segment:
    """What one forward pass through one segment keeps.

    Attributes:
        start: the first layer's input.
        runs: the layers so far, each with its other arguments.
        random: the random state before each layer.
        inputs: of the layers, while the backward pass is in this segment.
    """

    start: Tensor
    runs: list[Run] = field(default_factory=list)
    random: list[Any] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def input_of(self, index: int) -> Tensor:
        """The input of a layer, recomputed if need be."""
        if not self.inputs:
            self.inputs = [self.start]
            with torch.no_grad():
                for position in range(index):
                    _set_random(self.random[position], self.start.device)
                    self.inputs.append(self.runs[position](self.inputs[-1]))
        return self.inputs.pop()


class _Layer(torch.autograd.Function):
    """One layer of a segment: forward without a graph, backward by running it again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, trigger: Tensor, segment: _Segment, index: int) -> Tensor:
        ctx.segment, ctx.index = segment, index
        with torch.no_grad():
            return segment.runs[index](hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = grads[0].device
        before = _random(device)
        hidden = ctx.segment.input_of(ctx.index).detach().requires_grad_()
        _set_random(ctx.segment.random[ctx.index], device)
        with torch.enable_grad():
            output = ctx.segment.runs[ctx.index](hidden)
        torch.autograd.backward(output, grads[0])
        _set_random(before, device)
        return hidden.grad, None, None, None


def _checkpointed(
    forward: Callable[..., Any], index: int, is_last: bool, current: list[_Segment]
) -> Callable[..., Any]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return _only_tensor(forward(hidden, *args, **kwargs))
        if index == 0:
            current[:] = [_Segment(hidden.detach())]
        segment = current[0]
        if is_last:
            current.clear()  # from here on only the graph keeps it
        segment.runs.append(lambda x: _only_tensor(forward(x, *args, **kwargs)))
        segment.random.append(_random(hidden.device))
        # The embeddings are frozen, so the first input needs no gradient; without one the layers would get none.
        trigger = torch.empty(0, device=hidden.device, requires_grad=True)
        result: Tensor = _Layer.apply(hidden, trigger, segment, index)  # type: ignore[no-untyped-call]
        return result

    return run


def _only_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise UsageError("this architecture's layers return more than a tensor", hint="checkpointing: none")
    return output


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
