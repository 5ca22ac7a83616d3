"""A language model on packed weights.

transformers builds the architecture on the meta device, without memory; its linear layers are replaced by
``LoraLinear`` layers that hold the weights as stored in the files, and the other tensors are loaded.
"""

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from adaptkit.checkpoint.quantization import hint_for_plain, quantization_found
from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint
from adaptkit.errors import CheckpointError
from adaptkit.models.architecture import empty_network
from adaptkit.models.assembly import Assembly, check_shape
from adaptkit.models.linears import acts_as_linear
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.experts import ExpertList, PackedModule, Stack, pack, read_weight
from adaptkit.training.network.frozen import PlainWeight, transient_weights
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.loss import OutputLayer, find_output_layer
from adaptkit.training.network.probing import require_causal
from adaptkit.training.network.whole import TrainedRows, Whole


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        network: transformers model, on its device.
        linears: its replaced linear layers by dotted path, without the output layer.
        assembly: maps its parameters to the checkpoint's tensors.
        dtype: compute dtype.
        stores_transposed: whether the plain checkpoint keeps the linear weights as (in, out), as GPT-2's Conv1D does.
        whole: parameters that are trained in full or that an adapter replaces, by name; see ``network.whole``.
        rows: trained rows of embeddings and output layers, by module; a tied head uses its embedding's.
        output_layer: computes logits from the last hidden state; None if only the whole network can.
    """

    network: Any
    linears: Mapping[str, LoraLinear]
    assembly: Assembly
    dtype: torch.dtype
    stores_transposed: bool = False
    whole: dict[str, Whole] = field(default_factory=dict)
    rows: dict[str, TrainedRows] = field(default_factory=dict)
    output_layer: OutputLayer | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint that the weights were read from."""
        return self.assembly.checkpoint

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        tensor: Tensor = next(chain(self.network.parameters(), self.network.buffers()))
        return tensor.device

    def adapted(self) -> dict[str, LoraLinear]:
        """Return the layers that have an adapter, by dotted path, sorted."""
        return {name: layer for name, layer in sorted(self.linears.items()) if layer.lora_a is not None}

    def changes(self) -> dict[str, LowRank]:
        """Return the LoRA updates of the linear layers, by module."""
        return {
            name: LowRank.of_tensors(layer.lora_a.detach(), layer.lora_b.detach(), layer.scaling)
            for name, layer in self.adapted().items()
            if layer.lora_a is not None and layer.lora_b is not None
        }

    def stacks(self) -> dict[str, nn.Module]:
        """Return the modules that hold 3-D parameters (stacked matrices), by the parameter's dotted path, sorted."""
        found = {}
        for path, module in self.network.named_modules():
            if isinstance(module, (_ConvNd, ParametrizationList)):
                continue  # convolution filters may be 3-D, too; a ParametrizationList holds a fully trained parameter
            held: dict[str, Any] = dict(module.named_parameters(recurse=False))
            if isinstance(module, PackedModule):
                held |= module.packed.items()
            found.update({f"{path}.{name}": module for name, stack in held.items() if len(stack.shape) == 3})
        return dict(sorted(found.items()))


_SMALL_BYTES = 1 << 25
"""Smaller networks are not worth a garbage collection, which takes a few tenths of a second."""
_loaded: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
"""Maps each living module of a loaded network to the bytes of the network's checkpoint."""


def free_former_network() -> None:
    """Free previously loaded networks that are no longer used.

    Layers and the functions that call them form reference cycles, so they stay in memory until the garbage collector
    runs; without this, the next network would be loaded in addition to them.
    """
    if max(_loaded.values(), default=0) > _SMALL_BYTES:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_model(root: Path, compute_dtype: torch.dtype, device: torch.device) -> Model:
    """Build a checkpoint's model with packed weights; every linear layer inside it becomes a ``LoraLinear``.

    Args:
        root: folder of a quantized or plain checkpoint.
        compute_dtype: dtype of activations, norms and embeddings.
        device: device that it will run on.

    Raises:
        CheckpointError: a tensor that the architecture needs is missing, a tensor is unknown to it, or the checkpoint
            is quantized by another tool's method.
        UsageError: transformers does not know the architecture or is not installed, or the model is not causal.
    """
    free_former_network()
    checkpoint = MappedCheckpoint(root)
    assembly = Assembly(empty_network(checkpoint, compute_dtype), checkpoint)
    network = assembly.network
    _check_known(assembly)
    assembly.load_buffers(device)
    linears: dict[str, LoraLinear] = {}
    transposed = False
    head = network.get_output_embeddings()
    layers = {
        name: (_layer(assembly, name, module), module)
        for name, module in network.named_modules()
        if acts_as_linear(module) and (module is not head or assembly.is_quantized(f"{name}.weight"))
    }
    for name, (layer, module) in layers.items():  # after reading all: a tensor to be split needs the original shapes
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)
        if module is not head:
            linears[name] = layer
            transposed |= not isinstance(module, nn.Linear)
    _load_others(assembly, compute_dtype, device)
    network.requires_grad_(False)
    network.to(device).eval()
    _loaded.update(dict.fromkeys(network.modules(), checkpoint.nbytes))
    with transient_weights(network):
        require_causal(network)
    output = find_output_layer(network)
    return Model(network, linears, assembly, compute_dtype, transposed, output_layer=output)


def _check_known(assembly: Assembly) -> None:
    """Refuse a checkpoint with tensors that the network has no place for.

    Raises:
        CheckpointError: names a tensor, or the method of another tool that quantized the checkpoint.
    """
    unknown, root = assembly.unknown(), assembly.checkpoint.root
    method = quantization_found(assembly.checkpoint) if unknown and not assembly.quantized else None
    if method is not None:
        raise CheckpointError(
            f"{root}: is quantized with {method}, which train and evaluate cannot use",
            hint=hint_for_plain(method, root, "use"),
        )
    if unknown:
        raise CheckpointError(
            f"{root}: {unknown[0]}: unknown to {type(assembly.network).__name__}",
            hint="check that config.json belongs to this model, and that no tensor was added",
        )


def _layer(assembly: Assembly, name: str, module: Any) -> LoraLinear:
    """Return the replacement of a linear layer."""
    weight_name, bias_name = f"{name}.weight", f"{name}.bias"
    weight, expected = read_weight(assembly, weight_name), tuple(module.weight.shape)
    if not isinstance(module, nn.Linear):  # a Conv1D: its plain weight is (in, out), its packed weight (out, in)
        expected = expected[::-1]
        if isinstance(weight, PlainWeight):
            weight = PlainWeight(weight.weight.T)
    if isinstance(weight, ExpertList):
        raise CheckpointError(f"{weight_name}: is quantized in parts", hint="quantize it as one matrix")
    check_shape(assembly.checkpoint.root, weight_name, weight.shape, expected)
    bias = None
    if module.bias is not None:
        bias = assembly.read(bias_name)
        check_shape(assembly.checkpoint.root, bias_name, bias.shape, module.bias.shape)
    return LoraLinear(weight, bias, module.weight.dtype, name)


def _load_others(assembly: Assembly, dtype: torch.dtype, device: torch.device) -> None:
    """Load all parameters outside of linear layers; quantized stacks stay packed."""
    stacks: dict[str, dict[str, Stack]] = {}
    for name, parameter in list(assembly.network.named_parameters()):
        if not assembly.is_quantized(name):
            assembly.load(parameter, dtype, device)
            continue
        stack = read_weight(assembly, name)
        check_shape(assembly.checkpoint.root, name, stack.shape, parameter.shape)
        parent, _, child = name.rpartition(".")
        stacks.setdefault(parent, {})[child] = stack
    for parent, found in stacks.items():
        pack(assembly.network, assembly.network.get_submodule(parent), found, dtype)
