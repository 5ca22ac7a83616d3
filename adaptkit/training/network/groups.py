"""Linear layers that read the same input: find them, and let the first one that is called compute all results.

With dropout the inputs X' of their adapters differ, so each layer computes its own.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.training.network.linear import LoraLinear


def groups(network: Any, layers: Sequence[LoraLinear]) -> Iterator[list[LoraLinear]]:
    """Group the layers of one module that are called with the same tensor; other layers are groups of one.

    The network runs once, on two tokens, to find out.

    Args:
        network: transformers model, before its layers are checkpointed or sharded.
        layers: some of its layers.
    """
    if not layers:
        return
    parents = {child: module for module in network.modules() for child in module.children()}
    seen: dict[tuple[int, int, nn.Module], list[LoraLinear]] = {}
    held = []  # keeps inputs alive, so that no two have the same id

    def note(layer: Any, given: tuple[Any, ...]) -> None:
        if given:
            held.append(given[0])
            seen.setdefault((id(given[0]), given[0]._version, parents[layer]), []).append(layer)

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note))
        ids = torch.zeros((1, 2), dtype=torch.int64, device=layers[0].device)
        network(input_ids=ids, use_cache=False)
    left = dict.fromkeys(layers)
    for together in (*seen.values(), *([layer] for layer in layers)):
        group = [layer for layer in dict.fromkeys(together) if layer in left]
        for layer in group:
            del left[layer]
        if group:
            yield group


def join(
    layers: Sequence[LoraLinear],
    compute: Callable[[Sequence[LoraLinear], Tensor], Sequence[Tensor]],
    compute_one: Callable[[LoraLinear, Tensor, Tensor], Tensor],
) -> None:
    """Replace ``LoraLinear.multiply`` of layers that are called with the same input.

    Args:
        layers: modified in place.
        compute: called with all layers and an input; returns the result of each, whose graph must not hold the layers.
        compute_one: called with one layer, an input, and the input after dropout; returns the layer's result.
    """
    joined = _Joined(layers, compute, compute_one)
    for index, layer in enumerate(layers):
        replaced: Any = layer
        replaced.multiply = _Multiplication(joined, index)


class _Joined:
    """A group of layers, and their results for its last input that no layer has taken yet; see ``join``."""

    def __init__(self, layers: Sequence[LoraLinear], compute: Any, compute_one: Any) -> None:
        self.members: list[Any] = [weakref.ref(layer) for layer in layers]  # each of which holds this
        self._compute, self._compute_one = compute, compute_one
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: tuple[int | None, bool] = (None, False)
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return a layer's result for an input, computing all layers' results if this one is not there.

        Each result is handed out once.
        """
        state = None if x.is_inference() else x._version, torch.is_grad_enabled()
        is_known = self._input() is x and self._state == state
        result = self._waiting.pop(index, None) if is_known else None
        if result is None:
            waiting = dict(enumerate(self._compute([layer() for layer in self.members], x)))
            result = waiting.pop(index)
            if waiting:
                self._input, self._state, self._waiting = weakref.ref(x), state, waiting
        return result

    def apart(self, index: int, x: Tensor, dropped: Tensor) -> Tensor:
        """Return a layer's result for an input with dropout."""
        result: Tensor = self._compute_one(self.members[index](), x, dropped)
        return result

    def forget(self) -> None:
        """Drop results that no layer has taken: they keep the graph of all earlier layers alive."""
        self._waiting = {}


@dataclass(frozen=True)
class _Multiplication:
    """Replacement of a layer's ``multiply``: its group, and its index there."""

    joined: _Joined
    index: int

    def __call__(self, x: Tensor, dropped: Tensor) -> Tensor:
        return self.joined.take(self.index, x) if dropped is x else self.joined.apart(self.index, x, dropped)


def forget(network: nn.Module) -> None:
    """Drop what a failed forward pass left in a network's joined layers."""
    for module in network.modules():
        multiply = vars(module).get("multiply")
        if isinstance(multiply, _Multiplication):
            multiply.joined.forget()
