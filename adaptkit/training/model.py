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
from torch import nn

from adaptkit.checkpoint.architecture import empty_network, is_linear
from adaptkit.checkpoint.assembly import Assembly, check_shape
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.training.experts import ExpertList, Stack, pack, read_weight
from adaptkit.training.linear import LoraLinear, PlainWeight


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
        root: folder of a quantized or plain checkpoint.
        compute_dtype: of activations, norms and embeddings.
        device: where it will run.

    Raises:
        CheckpointError: a tensor that the architecture needs is missing, or one that it does not know is there.
        UsageError: transformers does not know the architecture, or is not installed.
    """
    checkpoint = Checkpoint(root)
    assembly = Assembly(empty_network(checkpoint, compute_dtype), checkpoint)
    network = assembly.network
    unknown = assembly.unknown()
    if unknown:
        raise CheckpointError(
            f"{root}: {type(network).__name__} does not know the tensor {unknown[0]}",
            hint="its config.json belongs to another model, or something was added to its files",
        )
    assembly.load_buffers(device)
    linears: dict[str, LoraLinear] = {}
    transposed = False
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if not is_linear(module) or (module is head and not assembly.is_quantized(f"{name}.weight")):
            continue
        layer = _replace(assembly, name, module)
        if module is not head:
            linears[name] = layer
            transposed |= not isinstance(module, nn.Linear)
    _load_others(assembly, compute_dtype, device)
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


def _replace(assembly: Assembly, name: str, module: Any) -> LoraLinear:
    """Put a ``LoraLinear`` in a linear layer's place."""
    weight_name, bias_name = f"{name}.weight", f"{name}.bias"
    weight, expected = read_weight(assembly, weight_name), tuple(module.weight.shape)
    if not isinstance(module, nn.Linear):  # a Conv1D, whose plain weight is (in, out), and whose packed one is not
        expected = expected[::-1]
        if isinstance(weight, PlainWeight):
            weight = PlainWeight(weight.weight.T.contiguous())
    if isinstance(weight, ExpertList):
        raise CheckpointError(f"{weight_name}: is quantized in pieces", hint="quantize it as one matrix")
    check_shape(weight_name, weight.shape, expected)
    bias = None
    if module.bias is not None:
        bias = assembly.read(bias_name)
        check_shape(bias_name, bias.shape, module.bias.shape)
    layer = LoraLinear(weight, bias)
    parent, _, child = name.rpartition(".")
    setattr(assembly.network.get_submodule(parent), child, layer)
    return layer


def _load_others(assembly: Assembly, dtype: torch.dtype, device: torch.device) -> None:
    """Put everything but linear layers in its place; what is packed stays packed."""
    stacks: dict[str, dict[str, Stack]] = {}
    for name, parameter in list(assembly.network.named_parameters()):
        if not assembly.is_quantized(name):
            assembly.load(parameter, dtype, device)
            continue
        stack = read_weight(assembly, name)
        check_shape(name, stack.shape, parameter.shape)
        parent, _, child = name.rpartition(".")
        stacks.setdefault(parent, {})[child] = stack
    for parent, found in stacks.items():
        pack(assembly.network.get_submodule(parent), found, dtype)
