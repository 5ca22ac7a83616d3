"""Linear layers whose results nothing reads when a checkpointed layer is recomputed.

    h' = h + W x + s B (A x)           x = act(gate) · up

A recomputed layer needs what its backward pass reads. That is x and A x, but not the sum: in most architectures the
last product of a layer, a fifth to a quarter of its work, need not be computed again.

autograd's graph shows them: results that reach the layer's output through additions alone, and nothing else.
"""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adaptkit.errors import UsageError
from adaptkit.models.activations import kind_of
from adaptkit.models.assembly import find_stack
from adaptkit.models.layer_call import LayerCall
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.probing import as_in_training

_SUM, _PRODUCT = "AddBackward0", "_FrozenProductBackward"


def find_last_products(network: Any) -> frozenset[LoraLinear]:
    """Return the linear layers whose results a recomputed layer can leave out.

    The network runs once, on two tokens; of each kind of layer the first is examined.

    Args:
        network: transformers model with its adapter, whose linear layers are still plain, before it is checkpointed.
    """
    try:
        layers: list[nn.Module] = list(find_stack(network)[1])
    except UsageError:  # no stack of layers, so nothing will be checkpointed
        return frozenset()
    kinds = [kind_of(layer) for layer in layers]
    first = [kinds.index(kind) for kind in kinds]
    found: dict[int, set[str]] = {}

    def examine(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = _names_in(layers[index], LayerCall(layers[index].forward, *tree_map(_with_gradient, (args, kwargs))))
        found[index] = found.get(index, names) & names  # a layer may be called several times

    with ExitStack() as hooks, as_in_training(network):
        for index in dict.fromkeys(first):
            hooks.enter_context(layers[index].register_forward_pre_hook(partial(examine, index), with_kwargs=True))
        network(input_ids=torch.arange(2, device=network.device)[None], use_cache=False)
    answers: dict[LoraLinear, list[bool]] = {}  # one for each layer that contains the linear layer
    for layer, index in zip(layers, first, strict=True):
        for path, part in layer.named_modules():
            if isinstance(part, LoraLinear):
                answers.setdefault(part, []).append(path in found.get(index, ()))
    return frozenset(part for part, said in answers.items() if all(said))


def _with_gradient(value: Any) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_number else value


def _names_in(layer: nn.Module, call: LayerCall) -> set[str]:
    """Return the paths of the linear layers in a layer whose results reach only its output, and by additions."""
    hidden, others = call.take()
    with torch.enable_grad():
        outputs = call(hidden, others)
    roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
    readers: Counter[Any] = Counter(roots)
    waiting: list[Any] = list(dict.fromkeys(roots))
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                waiting += [] if node in readers else [node]
                readers[node] += 1
    bases = {part.base: path for path, part in layer.named_modules() if isinstance(part, LoraLinear)}
    found: set[str] = set()
    sums: list[Any] = roots[:1]  # the first output is the hidden states
    while sums:
        node = sums.pop()
        if node.name() == _SUM and readers[node] == 1:
            sums += [term for term, _ in node.next_functions if term is not None]
        elif node.name() == _PRODUCT and readers[node] == 1 and node.weight in bases:
            found.add(bases[node.weight])
    return found
