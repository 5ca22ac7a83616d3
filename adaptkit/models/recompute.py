"""Activations that are not saved by the forward pass, but recomputed in the backward pass.

A norm saves its input for its backward pass, and a gate its two inputs. The linear layers that read the output would
save that output as well. Instead they save the norm's or gate's inputs, which are saved anyway, and the output is
recomputed from them, bit for bit, once for all layers that read it. The output carries a recipe for that:

    norm, gate     y = f(x)      the recipe and x are attached to y as an attribute
    linear         saves x instead of y; its backward pass calls the recipe, which caches y for the remaining readers
    norm, gate     its backward pass drops the cached y: it runs after those of all readers, some of which may have none
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_adaptkit_source"


class Recipe:
    """Recomputes a tensor.

    Args:
        make: computes the tensor from its inputs.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None
        self._readers = 0

    def attach(self, result: Tensor, *inputs: Tensor) -> Tensor:
        """Attach this recipe and ``inputs`` to their ``result``; valid until one of these tensors is modified."""
        setattr(result, _ATTRIBUTE, (self, inputs, _versions(result, *inputs)))
        return result

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the tensor; it stays cached while further readers are expected, or until ``forget``."""
        made = self._make(*inputs) if self._made is None else self._made
        self._readers -= 1
        self._made = made if self._readers > 0 else None
        return made

    def read(self) -> "Recipe":
        """Register a reader that will call the recipe once; return the recipe."""
        self._readers += 1
        return self

    def hold(self, result: Tensor) -> None:
        """Keep the tensor for its readers, instead of recomputing it."""
        self._made = result.detach()

    def forget(self) -> None:
        """Drop the cached tensor: all readers are done."""
        self._made = None


def source_of(x: Tensor, is_next: bool = False) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return what to save of a tensor for the backward pass: a function that returns it, and the function's inputs.

    Args:
        x: the tensor.
        is_next: whether the backward pass begins with the caller, so that freeing the tensor in between gains nothing.
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
