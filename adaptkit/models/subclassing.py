"""Modules that take another one's place in a network, with other methods and the same name, weights and hooks."""

from functools import cache
from typing import Any

from torch import nn


def take_place(network: nn.Module, module: nn.Module, mixin: type[nn.Module], below: type | None = None) -> Any:
    """Replace a module on its parents by an instance of a subclass, which shares everything that it holds.

    Args:
        network: network that contains the module, under one name or several.
        module: the module; not to be used afterwards.
        mixin: class whose methods come before those of the module's class, and reach these by ``super()``.
        below: if given, ``mixin`` derives from this class of torch, and comes before it but after the module's own
            class: so that a model's embedding still scales the rows that ``mixin`` looks up.

    Returns:
        The instance.
    """
    kind: Any = type(module)  # mypy does not take a class for hashable
    first: Any = mixin
    place = object.__new__(_subclass(kind, first, below))
    place.__dict__.update(vars(module))
    for parent in network.modules():
        for name, child in parent._modules.items():
            if child is module:
                setattr(parent, name, place)
    return place


@cache
def _subclass(kind: type[nn.Module], mixin: type[nn.Module], below: type | None) -> Any:
    """Return the subclass: one for each class, so that layers built alike stay alike."""
    bases = (mixin, kind) if below is None else (mixin,) if kind is below else (kind, mixin)
    return type(kind.__name__, bases, {})
