"""A language model on packed weights.

transformers builds the architecture on the meta device, without memory; its linear layers are replaced by
``LoraLinear`` layers that hold the weights as the shards have them, and the other tensors are put in place.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.architecture import empty_network, is_linear
from adaptkit.checkpoint.assembly import compute_buffers
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.training.experts import Stack, combine, pack
from adaptkit.training.linear import LoraLinear
from adaptkit.training.source import Source


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        network: transformers' model, on its device.
        linears: by dotted path, its replaced linear layers.
        checkpoint: where the weights came from.
        stores_transposed: whether the plain checkpoint keeps the linear weights as (in, out), as GPT-2's Conv1D does.
    """

    network: Any
    linears: Mapping[str, LoraLinear]
    checkpoint: Checkpoint
    stores_transposed: bool = False

    def adapted(self) -> dict[str, LoraLinear]:
        """The layers that carry an adapter, by dotted path, sorted."""
        return {name: layer for name, layer in sorted(self.linears.items()) if layer.lora_a is not None}

    def changes(self) -> dict[str, LowRank]:
        """The adapter, by module."""
        return {
            name: LowRank(layer.lora_a.detach(), layer.lora_b.detach(), layer.scaling)
            for name, layer in self.adapted().items()
            if layer.lora_a is not None and layer.lora_b is not None
        }


def load_model(root: Path, compute_dtype: torch.dtype, device: torch.device) -> Model:
    """Build a checkpoint's model with packed weights; every linear layer inside it becomes a ``LoraLinear``.

    Args:
        root: folder of an NF4 or plain checkpoint.
        compute_dtype: of activations, norms and embeddings.
        device: where it will run.

    Raises:
        CheckpointError: a tensor that the architecture needs is missing, or one that it does not know is there.
        UsageError: transformers does not know the architecture, or is not installed.
    """
    checkpoint = Checkpoint(root)
    network = empty_network(checkpoint, compute_dtype)
    compute_buffers(network)  # first: it would overwrite the parameters beside them
    source = Source(checkpoint, network)
    linears: dict[str, LoraLinear] = {}
    transposed = False
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if not is_linear(module) or (module is head and not source.is_packed(f"{name}.weight")):
            continue
        layer = _replace(network, name, module, source)
        if module is not head:
            linears[name] = layer
            transposed |= not isinstance(module, nn.Linear)
    _load_others(network, source, compute_dtype)
    network.tie_weights()
    missing = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{root}: has no {missing[0]}, which {type(network).__name__} needs")
    unknown = source.unused(network)
    if unknown:
        raise CheckpointError(f"{root}: {type(network).__name__} does not know the tensor {unknown[0]}")
    network.requires_grad_(False)
    return Model(network.to(device).eval(), linears, checkpoint, transposed)


def new_adapter(
    model: Model, targets: Sequence[str], rank: int, alpha: float, init: str, dropout: float, seed: int
) -> None:
    """Give every layer that matches a pattern a fresh adapter: A random, B zero.

    Args:
        model: to change.
        targets: shell patterns of module paths, or of their last parts; ``*`` is all.
        rank: of the matrices.
        alpha: scaling is alpha / rank.
        init: ``kaiming`` (uniform within ±1/√in, as PEFT) or ``normal`` (standard deviation 1 / rank).
        dropout: of the adapters' input.
        seed: of A.

    Raises:
        UsageError: a pattern matches no layer.
    """
    chosen: set[str] = set()
    for pattern in targets:
        matched = {n for n in model.linears if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)}
        if not matched:
            known = sorted({name.rpartition(".")[2] for name in model.linears})
            raise UsageError(f"the target {pattern!r} matches no linear layer", hint=f"there are: {', '.join(known)}")
        chosen |= matched
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(chosen):
        layer = model.linears[name]
        out_features, in_features = layer.base.shape
        if init == "normal":
            lora_a = torch.randn(rank, in_features, generator=generator) / rank
        else:
            lora_a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
        change = LowRank(lora_a, torch.zeros(out_features, rank), alpha / rank)
        layer.attach(change, dropout)
        layer.to(next(layer.base.buffers()).device)


def attach_adapter(model: Model, changes: Mapping[str, LowRank], where: str, dropout: float = 0.0) -> None:
    """Give a model an existing adapter.

    Raises:
        BaseMismatchError: the adapter changes a module that the model lacks, or of another shape.
    """
    for name, change in changes.items():
        if name not in model.linears:
            raise BaseMismatchError(f"{where}: changes {name}, which {model.checkpoint.root} does not have")
        try:
            model.linears[name].attach(change, dropout)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{where}: {name}: {error.message}") from error
        model.linears[name].to(next(model.linears[name].base.buffers()).device)


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        UsageError: the device is not there.
    """
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", name) if torch.cuda.is_available() else None
    if name not in {"auto", "cpu"} and not (gpu and int(gpu[1] or 0) < torch.cuda.device_count()):
        raise UsageError(f"device {name!r}: not available here", hint="use cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _replace(network: Any, name: str, module: Any, source: Source) -> LoraLinear:
    weight_name, bias_name = f"{name}.weight", f"{name}.bias"
    transposed = not isinstance(module, nn.Linear)
    needed = [weight_name] if module.bias is None else [weight_name, bias_name]
    for needed_name in needed:
        if needed_name not in source.files:
            raise CheckpointError(f"{source.root}: has no {needed_name}, which {type(network).__name__} needs")
    weight = source.weight(source.files[weight_name], transposed)
    expected = tuple(module.weight.shape[::-1] if transposed else module.weight.shape)
    _check_shape(weight_name, weight.shape, expected)
    bias = None
    if module.bias is not None:
        bias = source.read(source.files[bias_name])
        _check_shape(bias_name, bias.shape, module.bias.shape)
    layer = LoraLinear(weight, bias)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)
    return layer


def _load_others(network: Any, source: Source, dtype: torch.dtype) -> None:
    """Put everything but linear layers in its place; what is packed stays packed."""
    stacks: dict[str, dict[str, Stack]] = {}
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        parent, _, child = name.rpartition(".")
        if not parameter.is_meta:
            continue
        if source.is_packed(name):
            stack: Stack = source.weight(source.files[name])
        elif name in source.pieces:
            stack = combine(source.pieces[name], source.weight)
        elif name in source.files:
            _assign(network, name, source.read(source.files[name]).to(dtype))
            continue
        else:
            continue
        _check_shape(name, stack.shape, parameter.shape)
        stacks.setdefault(parent, {})[child] = stack
    for parent, found in stacks.items():
        pack(network.get_submodule(parent), found, dtype)


def _assign(network: Any, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = network.get_submodule(parent)
    _check_shape(name, value.shape, module._parameters[child].shape)
    module._parameters[child] = nn.Parameter(value, requires_grad=False)


def _check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{name} is {list(found)} in the file; the architecture expects {list(expected)}")
