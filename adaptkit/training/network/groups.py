"""Linear layers that read the same input: which they are, and how the first that is called computes for the others.

With dropout the inputs X' of their adapters differ, and each layer is by itself.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptkit.training.network.linear import LoraLinear

Member = TypeVar("Member")


def groups(network: Any, layers: Sequence[LoraLinear]) -> Iterator[list[LoraLinear]]:
    """Divide layers into those of one module that are given the very same input; others are groups of one.

    The network runs once, on two tokens, to see that.

    Args:
        network: of transformers, before its layers are checkpointed or divided.
        layers: some of its layers.
    """
    if not layers:
        return
    parents = {child: module for module in network.modules() for child in module.children()}
    seen: dict[tuple[int, int, nn.Module], list[LoraLinear]] = {}
    held = []  # so that no two inputs have the same address

    def note(layer: Any, given: tuple[Any, ...]) -> None:
        if given:
            held.append(given[0])
            seen.setdefault((id(given[0]), given[0]._version, parents[layer]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.int64, device=layers[0].device)
            network(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    left = dict.fromkeys(layers)
    for together in (*seen.values(), *([layer] for layer in layers)):
        group = [layer for layer in dict.fromkeys(together) if layer in left]
        for layer in group:
            del left[layer]
        if group:
            yield group


def join(
    layers: Sequence[LoraLinear],
    members: Sequence[Member],
    compute: Callable[[tuple[Member, ...], Tensor], Sequence[Tensor]],
    alone: Callable[[Member, Tensor, Tensor], Tensor],
) -> None:
    """Replace ``LoraLinear.multiply`` of layers that are given the same input.

    Args:
        layers: to change.
        members: what stands for each of them, and does not keep it: the layer keeps all of these.
        compute: what each of them gives for an input.
        alone: what one of them gives for an input, and for the same after dropout.
    """
    joined = _Joined(tuple(members), compute)
    for index, (layer, member) in enumerate(zip(layers, members, strict=True)):
        replaced: Any = layer
        replaced.multiply = _Multiplication(joined, index, partial(alone, member))


class _Joined:
    """A group of layers, and what they give for the input that one of them was called with last."""

    def __init__(self, members: tuple[Any, ...], compute: Callable[[Any, Tensor], Sequence[Tensor]]) -> None:
        self.members, self._compute = members, compute
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: tuple[int | None, bool] = (None, False)
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        """What a layer gives for an input, to be taken once."""
        state = None if x.is_inference() else x._version, torch.is_grad_enabled()
        is_known = self._input() is x and self._state == state
        result = self._waiting.pop(index, None) if is_known else None
        if result is None:
            waiting = dict(enumerate(self._compute(self.members, x)))
            result = waiting.pop(index)
            if waiting:
                self._input, self._state, self._waiting = weakref.ref(x), state, waiting
        return result

    def forget(self) -> None:
        """Drop what waits to be taken: it holds the graph of all layers before."""
        self._waiting = {}


@dataclass(frozen=True)
class _Multiplication:
    """What takes the place of a layer's ``multiply``: its place in a group, and how it multiplies by itself."""

    joined: _Joined
    index: int
    alone: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, dropped: Tensor) -> Tensor:
        return self.joined.take(self.index, x) if dropped is x else self.alone(x, dropped)


def forget(network: nn.Module) -> None:
    """After a pass that failed: nothing of it stays in a network's joined layers."""
    for module in network.modules():
        multiply = vars(module).get("multiply")
        if isinstance(multiply, _Multiplication):
            multiply.joined.forget()
