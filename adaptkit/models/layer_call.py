"""One call of a network's layer, with its tensors separated so that it can be repeated with others.

A layer's input is hidden states and possibly other tensors that require gradients: further arguments (Gemma 4's
per-layer inputs), or entries of a mapping that layers share (keys and values that some layers of Gemma 3n reuse from
earlier ones). It returns hidden states and possibly more: attention weights, which Bloom's layers always return. It may
also add entries to a shared mapping.

    call = LayerCall(forward, args, kwargs)
    hidden, others = call.take()            the inputs that require gradients
    outputs = call(hidden, others)          the next hidden states first; may be repeated
    call.finish(outputs)                    returns what the layer would return, and updates the shared mappings

After that the call holds no tensor with autograd history, so that only the graph keeps a layer's tensors alive.
"""

import copy
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from adaptkit.errors import UsageError


class LayerCall:
    """A call of a layer that has not run yet.

    Args:
        forward: the layer's forward.
        args: its positional arguments; the first is the hidden states, unless they are in ``kwargs``.
        kwargs: its keyword arguments; if ``args`` is empty, ``hidden_states`` is one of them.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names, positional = list(kwargs), len(args)
        place = 0 if args else names.index("hidden_states")
        given = [*args, *kwargs.values()]
        hidden, given[place] = given[place], None
        leaves, structure = tree_flatten(given, is_leaf=_is_shared)
        self._shared = [leaf for leaf in leaves if _is_shared(leaf)]
        self._entries = _Template([dict(mapping) for mapping in self._shared])
        self._arguments = _Template([None if _is_shared(leaf) else leaf for leaf in leaves])
        self._blanks = {n: _emptied(leaf) for n, leaf in enumerate(leaves) if _is_shared(leaf)}
        tensors = [*self._arguments.take(), *self._entries.take()]
        self._with_gradient = [n for n, tensor in enumerate(tensors) if tensor.requires_grad]
        self._tensors = [tensor.detach() for tensor in tensors]
        self._given: list[Tensor] = [hidden, *(tensors[n] for n in self._with_gradient)]
        self._results: list[_Template] = []

        def run(hidden: Tensor, arguments: list[Any]) -> Any:
            rebuilt = tree_unflatten(arguments, structure)
            rebuilt[place] = hidden
            return forward(*rebuilt[:positional], **dict(zip(names, rebuilt[positional:], strict=True)))

        self._run = run

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """Return the hidden states and the other inputs that require gradients, with their history. Call only once."""
        hidden, *others = self._given
        self._given = []
        return hidden, others

    @property
    def others(self) -> list[Tensor]:
        """The other inputs that require gradients, detached."""
        return [self._tensors[n] for n in self._with_gradient]

    @property
    def constants(self) -> list[Tensor]:
        """All floating-point inputs except the hidden states, detached."""
        return self._tensors

    def __call__(self, hidden: Tensor, others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Run the layer.

        Args:
            hidden: the hidden states.
            others: replacements for the tensors of ``self.others``; those if None.

        Returns:
            All floating-point outputs: the next hidden states, other returned tensors, new entries of shared mappings.

        Raises:
            UsageError: the layer does not return hidden states first, or modifies an entry of a shared mapping.
        """
        tensors = list(self._tensors)
        for n, other in zip(self._with_gradient, self.others if others is None else others, strict=True):
            tensors[n] = other
        count = len(tensors) - self._entries.count
        arguments, before = self._arguments.fill(tensors[:count]), self._entries.fill(tensors[count:])
        mappings = []
        for (n, blank), entries in zip(self._blanks.items(), before, strict=True):
            arguments[n] = copy.copy(blank)
            arguments[n].update(entries)
            mappings.append(arguments[n])
        held = [{key: tree_leaves(value) for key, value in entries.items()} for entries in before]
        returned = _Template(self._run(hidden, arguments))
        if not returned.is_sequence:
            raise UsageError(
                "this architecture's layers do not return hidden states first", hint="use --checkpointing none"
            )
        pairs = list(zip(mappings, before, strict=True))
        if any(_changed(now, was, leaves) for (now, was), leaves in zip(pairs, held, strict=True)):
            raise UsageError(
                "this architecture's layers modify a mapping that other layers share", hint="use --checkpointing none"
            )
        added = _Template([{k: v for k, v in now.items() if v is not was.get(k)} for now, was in pairs])
        self._results = [returned, added]
        return [*returned.take(), *added.take()]

    def finish(self, outputs: Sequence[Tensor]) -> Any:
        """Return the layer's result with its tensors replaced by ``outputs``, and update shared mappings. Call once."""
        returned, added = self._results
        for mapping, entries in zip(self._shared, added.fill(outputs[returned.count :]), strict=True):
            mapping.update(entries)
        self._shared = []  # they hold tensors of other layers
        return returned.fill(outputs[: returned.count])


class _Template:
    """A nested value with its floating-point tensors taken out.

    Args:
        value: the nested value.

    Attributes:
        count: number of these tensors.
        is_sequence: whether the value is such a tensor, or a tuple or list that begins with one.
    """

    def __init__(self, value: Any) -> None:
        leaves, self._structure = tree_flatten(value)
        self._places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self._tensors = [leaves[n] for n in self._places]
        self._rest = [None if n in self._places else leaf for n, leaf in enumerate(leaves)]
        self.count = len(self._places)
        self.is_sequence = isinstance(value, (Tensor, tuple, list)) and self._places[:1] == [0]

    def take(self) -> list[Tensor]:
        """Return the tensors, and drop the references to them."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """Return the value with ``tensors`` in place of its own."""
        leaves = list(self._rest)
        for n, tensor in zip(self._places, tensors, strict=True):
            leaves[n] = tensor
        return tree_unflatten(leaves, self._structure)


def _is_shared(value: Any) -> bool:
    return isinstance(value, MutableMapping)


def _changed(now: Any, before: dict[Any, Any], leaves: dict[Any, list[Any]]) -> bool:
    """Whether an entry was removed or modified in place. An entry may be replaced by a new object."""
    for key, value in before.items():
        if key not in now:
            return True
        found = tree_leaves(now[key])
        same = len(found) == len(leaves[key]) and all(a is b for a, b in zip(found, leaves[key], strict=True))
        if now[key] is value and not same:
            return True
    return False


def _emptied(mapping: Any) -> Any:
    blank = copy.copy(mapping)
    blank.clear()
    return blank
