"""Linear layers whose results no gradient reads, so that they are left out where a layer runs again.

    h' = h + W x + s B (A x)           x = silu(gate) · up

A layer that is checkpointed runs a second time, for what its backward pass reads. That is x and A x, and never the sum:
in most architectures the last product of a layer need not be made again, which is a quarter of its work.

Which layers they are is asked of the network, not told by names: with NaN, with infinities and with zero in the place
of what a linear layer gives, every gradient has to be to the bit what it is with the result. So a result that a norm
reads, or a bound, or a router, is found out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.activations import kind_of
from adaptkit.checkpoint.assembly import find_stack
from adaptkit.checkpoint.compiler import without_compiler
from adaptkit.checkpoint.layer_call import LayerCall
from adaptkit.errors import UsageError
from adaptkit.training.network.linear import LoraLinear

_NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0)


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
    kinds = [kind_of(layer) for layer in layers]
    first = [kinds.index(kind) for kind in kinds]
    found: dict[int, list[str]] = {}

    def ask(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = LayerCall(layers[index].forward, args, kwargs)
        found[index] = _unread(layers[index], call, call.take()[0].detach())

    hooks = [
        layers[index].register_forward_pre_hook(lambda _, *given, index=index: ask(index, *given), with_kwargs=True)
        for index in dict.fromkeys(first)
    ]
    was_training = network.training
    try:
        with without_compiler(), torch.no_grad():
            ids = torch.arange(2, device=network.get_input_embeddings().weight.device)[None]
            network.train()(input_ids=ids, use_cache=False)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    for layer, index in zip(layers, first, strict=True):
        for name in found.get(index, ()):
            linear: Any = layer.get_submodule(name)
            linear.is_unread = True


@contextmanager
def left_out(linears: Sequence[LoraLinear], number: float = 0.0) -> Iterator[None]:
    """Let linear layers give a number in every place of their results; gradients go through them as before."""
    for linear in linears:
        linear.stand_in = number
    try:
        yield
    finally:
        for linear in linears:
            linear.stand_in = None


def _unread(layer: nn.Module, call: LayerCall, hidden: Tensor) -> list[str]:
    """The linear layers of a layer, by path, whose results its gradients do not depend on."""
    linears = {path: part for path, part in layer.named_modules() if isinstance(part, LoraLinear) and part.can_stand_in}
    ran: set[nn.Module] = set()  # of one that did not, as an expert that no token was sent to, nothing is known
    hooks = [linear.register_forward_hook(lambda module, *_: ran.add(module)) for linear in linears.values()]
    expected = _gradients(layer, call, hidden)
    for hook in hooks:
        hook.remove()

    def is_unread(some: Sequence[LoraLinear], number: float) -> bool:
        with left_out(some, number):
            return _equal(_gradients(layer, call, hidden), expected)

    asked = [path for path, linear in linears.items() if linear in ran]
    found = [path for path in asked if all(is_unread([linears[path]], number) for number in _NUMBERS)]
    together = [linears[path] for path in found]
    return found if all(is_unread(together, number) for number in _NUMBERS) else []


def _gradients(layer: nn.Module, call: LayerCall, hidden: Tensor) -> list[Tensor | None]:
    """By what the layer is given and by what is trained in it, from the same random numbers every time."""
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        given = [hidden.clone().requires_grad_(), *(other.clone().requires_grad_() for other in call.others)]
        outputs = [output for output in call(given[0], given[1:]) if output.requires_grad]
        wanted = [*given, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        seeds = [torch.linspace(-1, 1, output.numel()).to(output).view(output.shape) for output in outputs]
        return list(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))


def _equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(
        one is two if one is None or two is None else torch.equal(one, two)
        for one, two in zip(found, expected, strict=True)
    )
