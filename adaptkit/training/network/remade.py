"""Activations that are dropped after the forward pass, and made again in the backward pass.

A norm keeps its input for its own backward pass, and a gate its two. The linear layers that read what these give would
keep that too, in all their sizes. Instead they keep what it was made of, which is there anyway, and have it made again,
to the same bits, once for all of them. What is worth that travels with its recipe:

    norm, gate     y = made(recipe, ..., x)      y carries the recipe, and x
    linear         keeps x instead of y, and asks the recipe for y in its backward pass; y is held for those that will
    norm, gate     forgets y in its own backward pass, which comes after those of all that read y: some may have none
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_adaptkit_source"


class Recipe:
    """Makes a tensor again.

    Args:
        make: of what it was made of.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None
        self._readers = 0

    def attach(self, result: Tensor, *inputs: Tensor) -> Tensor:
        """Let a tensor that was made of ``inputs`` say so to whom it is given, while nobody changes any of them."""
        setattr(result, _ATTRIBUTE, (self, inputs, _versions(result, *inputs)))
        return result

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The tensor; it is held while others will ask for it, until it is forgotten."""
        made = self._make(*inputs) if self._made is None else self._made
        self._readers -= 1
        self._made = made if self._readers > 0 else None
        return made

    def read(self) -> "Recipe":
        """Itself, for somebody who will ask for the tensor once."""
        self._readers += 1
        return self

    def hold(self, result: Tensor) -> None:
        """Do not let go of the tensor before somebody has asked for it."""
        self._made = result.detach()

    def forget(self) -> None:
        """Nobody needs it any more."""
        self._made = None


def source_of(x: Tensor, is_next: bool = False) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """What to keep of a tensor for the backward pass: a function that gives it, and what that is to be called with.

    Args:
        x: the tensor.
        is_next: whether that pass begins with who asks, so that letting go of the tensor would free nothing.
    """
    recipe, inputs, versions = getattr(x, _ATTRIBUTE, (None, (), []))
    if recipe is None or _versions(x, *inputs) != versions:
        return _itself, (x,)
    if is_next:
        recipe.hold(x)
    return recipe.read(), inputs


def _versions(*tensors: Tensor) -> list[int]:
    return [tensor._version for tensor in tensors]


def _itself(x: Tensor) -> Any:
    return x
