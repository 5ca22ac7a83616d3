"""Linear layers whose results no gradient depends on, so that recomputation of a checkpointed layer skips them.

    h' = h + W x + s B (A x)           x = silu(gate) · up

A checkpointed layer runs a second time to recompute what its backward pass reads. That is x and A x, but not the sum:
in most architectures the last product of a layer need not be recomputed, which is a quarter of its work.

These linear layers are found by probing the network, not by name. A linear layer's result is replaced by constants:
    NaN                    the whole output must become NaN: the result is added to it, and is not something that would
                           only matter with more tokens, such as an index of the tokens to attend to
    NaN, ±infinity, 0      every gradient must stay the same: this excludes results that a norm, a clamp or a router
                           reads

Most results are read by something whose input gradient becomes NaN too. These are found first, without computing the
gradients of trained parameters, which for stacked experts take longer than all the rest.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adaptkit.errors import UsageError
from adaptkit.models.activations import kind_of
from adaptkit.models.assembly import find_stack
from adaptkit.models.layer_call import LayerCall
from adaptkit.models.probing import forked_random
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.probing import as_in_training, with_attribute

_NUMBERS = (math.nan, math.inf, -math.inf, 0.0)


def mark_unread(network: Any) -> None:
    """Set ``LoraLinear.is_unread`` in a network's layers.

    The network runs once, on two tokens; meanwhile one layer of each kind is probed by running it several times.

    Args:
        network: transformers model, ready to train, before its layers are checkpointed or sharded.
    """
    try:
        layers: list[nn.Module] = list(find_stack(network)[1])
    except UsageError:  # no stack of layers, so nothing will be checkpointed
        return
    kinds = [kind_of(layer) for layer in layers]
    first = [kinds.index(kind) for kind in kinds]
    found: dict[int, set[str]] = {}

    def ask(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tree_map(_with_gradient, (args, kwargs))  # so that the gradients of all inputs are compared
        names = _unread(layers[index], LayerCall(layers[index].forward, *given))
        found[index] = found.get(index, names) & names  # a layer may be called several times

    with ExitStack() as hooks, as_in_training(network):
        for index in dict.fromkeys(first):
            hooks.enter_context(layers[index].register_forward_pre_hook(partial(ask, index), with_kwargs=True))
        network(input_ids=torch.arange(2, device=network.device)[None], use_cache=False)
    votes: dict[LoraLinear, list[bool]] = {}  # one answer per layer that contains the linear layer
    for layer, index in zip(layers, first, strict=True):
        for path, linear in _linears(layer).items():
            votes.setdefault(linear, []).append(path in found.get(index, ()))
    for linear, answers in votes.items():
        linear.is_unread = all(answers)


def standing_in(linears: Iterable[LoraLinear], number: float = 0.0) -> AbstractContextManager[None]:
    """Make linear layers return a constant instead of their product while a block runs; gradients are unchanged."""
    return with_attribute(linears, "stand_in", number)


def _unread(layer: nn.Module, call: LayerCall) -> set[str]:
    """Return the paths of linear layers whose results a layer adds to its output and no gradient depends on."""
    hidden, others = call.take()
    given = [side.detach() for side in (hidden, *others)]
    linears = {path: linear for path, linear in _linears(layer).items() if linear.can_stand_in}
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    expected = cache(lambda: _gradients(layer, call, given, trained)[1])

    def may_be_unread(linear: LoraLinear) -> bool:
        with standing_in([linear], math.nan):
            output, gradients = _gradients(layer, call, given)
        return bool(output.isnan().all()) and not any(one is not None and bool(one.isnan().any()) for one in gradients)

    def is_unread(some: Sequence[LoraLinear]) -> bool:
        for number in _NUMBERS:
            with standing_in(some, number):
                output, gradients = _gradients(layer, call, given, trained)
            if math.isnan(number) and not bool(output.isnan().all()):
                return False
            if not _equal(gradients, expected()):
                return False
        return True

    found = {path for path, linear in linears.items() if may_be_unread(linear) and is_unread([linear])}
    return found if len(found) < 2 or is_unread([linears[path] for path in found]) else set()


def _gradients(
    layer: nn.Module, call: LayerCall, given: Sequence[Tensor], trained: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output, and the gradients of inputs and parameters; always with the same random numbers."""
    with torch.enable_grad(), forked_random(given[0].device):
        leaves = [side.clone().requires_grad_() for side in given]
        output, *more = call(leaves[0], leaves[1:])
        outputs = [side for side in (output, *more) if side.requires_grad]
        wanted = [*leaves, *trained]
        seeds = [torch.linspace(-1, 1, side.numel()).to(side).view(side.shape) for side in outputs]
        return output.detach(), list(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))


def _with_gradient(value: Any) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_number else value


def _linears(layer: nn.Module) -> dict[str, LoraLinear]:
    return {path: part for path, part in layer.named_modules() if isinstance(part, LoraLinear)}


def _equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(
        one is two if one is None or two is None else torch.equal(one, two)
        for one, two in zip(found, expected, strict=True)
    )
