"""Linear layers whose results no gradient reads, so that they are left out where a layer runs again.

    h' = h + W x + s B (A x)           x = silu(gate) · up

A layer that is checkpointed runs a second time, for what its backward pass reads. That is x and A x, and never the sum:
in most architectures the last product of a layer need not be made again, which is a quarter of its work.

Which layers they are is asked of the network, not told by names. With NaN in the place of what a linear layer gives,
all of the output has to be NaN: so it is added there, and is nothing that only more tokens would make use of, as an
index of those to attend to. And with NaN, infinities and zero every gradient has to be what it is with the result: so a
result that a norm reads, or a bound, or a router, is found out.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adaptkit.errors import UsageError
from adaptkit.networks.activations import kind_of
from adaptkit.networks.assembly import find_stack
from adaptkit.networks.layer_call import LayerCall
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.probing import as_in_training, forked_random

_NUMBERS = (math.nan, math.inf, -math.inf, 0.0)


def mark_unread(network: Any) -> None:
    """Set ``LoraLinear.is_unread`` in a network's layers.

    The network runs once, on two tokens, and in it one layer of every kind some times.

    Args:
        network: of transformers, ready to train, before its layers are checkpointed or divided.
    """
    try:
        layers: list[nn.Module] = list(find_stack(network)[1])
    except UsageError:  # nothing will be checkpointed
        return
    kinds = [(kind_of(layer), [parameter.requires_grad for parameter in layer.parameters()]) for layer in layers]
    first = [kinds.index(kind) for kind in kinds]
    found: dict[int, set[str]] = {}

    def ask(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tree_map(_with_gradient, (args, kwargs))  # so that gradients by all that it is given are compared
        names = _unread(layers[index], LayerCall(layers[index].forward, *given))
        found[index] = found.get(index, names) & names  # of one that is called several times

    hooks = [
        layers[index].register_forward_pre_hook(lambda _, *given, index=index: ask(index, *given), with_kwargs=True)
        for index in dict.fromkeys(first)
    ]
    try:
        with as_in_training(network):
            network(input_ids=torch.arange(2, device=network.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    told: dict[LoraLinear, list[bool]] = {}  # by all the layers that it is in
    for layer, index in zip(layers, first, strict=True):
        for path, linear in _linears(layer).items():
            told.setdefault(linear, []).append(path in found.get(index, ()))
    for linear, answers in told.items():
        linear.is_unread = all(answers)


@contextmanager
def standing_in(linears: Sequence[LoraLinear], number: float = 0.0) -> Iterator[None]:
    """Let linear layers give a number in every place of their results; gradients go through them as before."""
    for linear in linears:
        linear.stand_in = number
    try:
        yield
    finally:
        for linear in linears:
            linear.stand_in = None


def _unread(layer: nn.Module, call: LayerCall) -> set[str]:
    """The linear layers of a layer, by path, whose results it adds to what it gives, and its gradients do not read."""
    hidden, others = call.take()
    given = [side.detach() for side in (hidden, *others)]
    linears = {path: linear for path, linear in _linears(layer).items() if linear.can_stand_in}
    expected = _gradients(layer, call, given)[1]

    def is_unread(some: Sequence[LoraLinear]) -> bool:
        for number in _NUMBERS:
            with standing_in(some, number):
                output, gradients = _gradients(layer, call, given)
            if math.isnan(number) and not bool(output.isnan().all()):
                return False
            if not _equal(gradients, expected):
                return False
        return True

    found = {path for path, linear in linears.items() if is_unread([linear])}
    return found if len(found) < 2 or is_unread([linears[path] for path in found]) else set()


def _gradients(layer: nn.Module, call: LayerCall, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and gradients by what the layer is given and what is trained in it; with the same random numbers."""
    with torch.enable_grad(), forked_random(given[0].device):
        leaves = [side.clone().requires_grad_() for side in given]
        output, *more = call(leaves[0], leaves[1:])
        outputs = [side for side in (output, *more) if side.requires_grad]
        wanted = [*leaves, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
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
