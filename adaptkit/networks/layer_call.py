"""One call of a network's layer, taken apart so that it can be made again with other tensors.

A layer is given hidden states, and maybe other tensors with gradients: as further arguments (Gemma 4's input of every
layer), or in a mapping that layers share (keys and values that some layers of Gemma 3n take over from earlier ones).
It returns hidden states, and maybe more: attention weights, which Bloom's layers return unasked, and what it puts into
such a mapping.

    call = LayerCall(forward, args, kwargs)
    hidden, others = call.take()            what it is given
    outputs = call(hidden, others)          the next hidden states first; as often as one likes
    call.finish(outputs)                    what the layer would have returned, and shared mappings get their entries

After that nothing is kept that has a history, so that only the graph keeps a layer's tensors alive.
"""

import copy
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from adaptkit.errors import UsageError


class LayerCall:
    """A call of a layer, not made yet.

    Args:
        forward: the layer's.
        args: as it is called; the hidden states come first, or are named ``hidden_states``.
        kwargs: as it is called.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names, positional = list(kwargs), len(args)
        place = 0 if args else names.index("hidden_states")
        given = [*args, *kwargs.values()]
        hidden, given[place] = given[place], None
        leaves, structure = tree_flatten(given, is_leaf=_is_shared)
        self._shared = [leaf for leaf in leaves if _is_shared(leaf)]
        self._entries = _Frame([dict(mapping) for mapping in self._shared])
        self._arguments = _Frame([None if _is_shared(leaf) else leaf for leaf in leaves])
        self._blanks = {n: _emptied(leaf) for n, leaf in enumerate(leaves) if _is_shared(leaf)}
        tensors = [*self._arguments.take(), *self._entries.take()]
        self._asked = [n for n, tensor in enumerate(tensors) if tensor.requires_grad]
        self._tensors = [tensor.detach() for tensor in tensors]
        self._given: list[Tensor] = [hidden, *(tensors[n] for n in self._asked)]
        self._results: list[_Frame] = []

        def run(hidden: Tensor, arguments: list[Any]) -> Any:
            rebuilt = tree_unflatten(arguments, structure)
            rebuilt[place] = hidden
            return forward(*rebuilt[:positional], **dict(zip(names, rebuilt[positional:], strict=True)))

        self._run = run

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """The hidden states of the call, and the other tensors with a gradient, with their history; once."""
        hidden, *others = self._given
        self._given = []
        return hidden, others

    @property
    def others(self) -> list[Tensor]:
        """The other tensors with a gradient that the layer was given, without their history."""
        return [self._tensors[n] for n in self._asked]

    @property
    def constants(self) -> list[Tensor]:
        """All floating-point tensors that the layer was given beside the hidden states, without their history."""
        return self._tensors

    def __call__(self, hidden: Tensor, others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Make the call.

        Args:
            hidden: the hidden states.
            others: instead of ``others``.

        Returns:
            What may have a gradient: the next hidden states, whatever else is returned, new entries of shared mappings.

        Raises:
            UsageError: the layer does not return hidden states first.
        """
        tensors = list(self._tensors)
        for n, other in zip(self._asked, self.others if others is None else others, strict=True):
            tensors[n] = other
        count = len(tensors) - self._entries.count
        arguments, before = self._arguments.fill(tensors[:count]), self._entries.fill(tensors[count:])
        mappings = []
        for (n, blank), entries in zip(self._blanks.items(), before, strict=True):
            arguments[n] = copy.copy(blank)
            arguments[n].update(entries)
            mappings.append(arguments[n])
        held = [{key: tree_leaves(value) for key, value in entries.items()} for entries in before]
        returned = _Frame(self._run(hidden, arguments))
        if not returned.is_sequence:
            raise UsageError(
                "this architecture's layers do not return hidden states first", hint="use --checkpointing none"
            )
        pairs = list(zip(mappings, before, strict=True))
        if any(_changed(now, was, leaves) for (now, was), leaves in zip(pairs, held, strict=True)):
            raise UsageError(
                "this architecture's layers modify a mapping that other layers share", hint="use --checkpointing none"
            )
        added = _Frame([{k: v for k, v in now.items() if v is not was.get(k)} for now, was in pairs])
        self._results = [returned, added]
        return [*returned.take(), *added.take()]

    def finish(self, outputs: Sequence[Tensor]) -> Any:
        """What the layer returns, with these in the places of what the call gave; to be called once."""
        returned, added = self._results
        for mapping, entries in zip(self._shared, added.fill(outputs[returned.count :]), strict=True):
            mapping.update(entries)
        self._shared = []  # which hold what other layers made
        return returned.fill(outputs[: returned.count])


class _Frame:
    """Containers around the tensors in them that may have gradients.

    Args:
        value: the containers.

    Attributes:
        count: of the tensors.
        is_sequence: whether the value is a tensor, or a sequence that begins with one.
    """

    def __init__(self, value: Any) -> None:
        leaves, self._structure = tree_flatten(value)
        self._places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self._tensors = [leaves[n] for n in self._places]
        self._rest = [None if n in self._places else leaf for n, leaf in enumerate(leaves)]
        self.count = len(self._places)
        self.is_sequence = isinstance(value, (Tensor, tuple, list)) and self._places[:1] == [0]

    def take(self) -> list[Tensor]:
        """The tensors, which this does not hold any more."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """The containers, around others."""
        leaves = list(self._rest)
        for n, tensor in zip(self._places, tensors, strict=True):
            leaves[n] = tensor
        return tree_unflatten(leaves, self._structure)


def _is_shared(value: Any) -> bool:
    return isinstance(value, MutableMapping)


def _changed(now: Any, before: dict[Any, Any], leaves: dict[Any, list[Any]]) -> bool:
    """Whether an entry was taken away, or something inside of one was replaced; new entries may take its place."""
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
