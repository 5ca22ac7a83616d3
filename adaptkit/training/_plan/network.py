"""A network of fake tensors with the trainer's modules, to measure what its layers keep and need."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from adaptkit.errors import UsageError
from adaptkit.models.activations import LayerSize
from adaptkit.models.assembly import find_stack
from adaptkit.models.attention import replace_attention
from adaptkit.models.casting import hold
from adaptkit.models.kinds import is_expert, multiplies_groups
from adaptkit.models.linears import acts_as_linear
from adaptkit.training.fast import accelerate
from adaptkit.training.memory.activations import layer_sizes
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.whole import TrainedWeight

Shape = tuple[int, int]

_NAME = "adaptkit-plan"
"""Name in transformers' registry of the attention that allocates what a GPU's does."""
_NOT_PLANNED = frozenset({"tables", "entropy"})
"""Parts of ``fast`` that change nothing about a layer's memory, or whose kernels need values."""


def linear_shapes(network: Any) -> dict[str, Shape]:
    """Map the dotted path of every linear layer, except the output layer, to (out, in)."""
    head = network.get_output_embeddings()
    found = {}
    for name, module in network.named_modules():
        if acts_as_linear(module) and module is not head:
            rows, columns = module.weight.shape
            found[name] = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
    return found


def expert_stacks(network: Any) -> dict[str, nn.Parameter]:
    """Return the stacked matrices of experts, (experts, rows, columns) each, by dotted path."""
    return {
        f"{path}.{name}": parameter
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and is_expert(f"{path}.{name}", module)
    }


def measured_layers(
    network: Any,
    ranks: Mapping[str, int],
    full: bool,
    shape: tuple[int, int],
    packed_experts: bool = False,
    on_gpu: bool = False,
) -> list[LayerSize]:
    """Measure what each layer keeps and needs in a training run; the network cannot be used afterwards.

    Args:
        network: on the meta device.
        ranks: maps the linear layers with an adapter to its rank.
        full: whether all weights are trained: in float32, which a layer casts for its own use.
        shape: (rows, length) of a batch.
        packed_experts: whether experts are quantized: a layer then also needs memory for dequantized ones.
        on_gpu: whether the run uses a GPU.

    Raises:
        UsageError: there is no stack of layers, or its forward pass does not run on fake tensors.
    """
    unpacked = [_unpacked_bytes(layer, on_gpu) for layer in find_stack(network)[1]]
    if on_gpu:
        replace_attention(network, _NAME, _attend_on_gpu, lambda *args, **kwargs: None)
    dtype = network.get_input_embeddings().weight.dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Groups():
        _allocate(network)
        for name, (rows, columns) in linear_shapes(network).items():
            linear = network.get_submodule(name)
            weight: Any = _FrozenShape((rows, columns))
            layer = LoraLinear(weight, linear.bias, linear.weight.dtype, name)
            if full:
                layer.base = TrainedWeight(torch.empty(rows, columns))
            elif name in ranks:
                layer.lora_a = nn.Parameter(torch.empty(ranks[name], columns))
                layer.lora_b = nn.Parameter(torch.empty(rows, ranks[name]))
            network.set_submodule(name, layer)
        if full:
            _train_others(network)
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        before = logger.level
        logger.setLevel(logging.CRITICAL)  # it logs the traceback of errors that are raised anyway
        try:
            with warnings.catch_warnings():  # from experts, on some releases of torch; harmless here
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
                accelerate(network, dtype, torch.device("cuda" if on_gpu else "cpu"), without=_NOT_PLANNED)
                sizes = layer_sizes(network, shape, torch.device("cpu"), restarts=False)
        except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UsageError(
                f"{type(network).__name__}: its forward pass cannot be simulated without weights ({reason})",
                hint="try another --max-length",
            ) from error
        finally:
            logger.setLevel(before)
    if not packed_experts:
        return sizes
    return [replace(one, peak_bytes=one.peak_bytes + more) for one, more in zip(sizes, unpacked, strict=True)]


class _FrozenShape(nn.Module):
    """A frozen weight without values, (out, in): what it allocates when it is dequantized."""

    device: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("device", torch.empty(0))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the weight."""
        return torch.empty(self.shape, dtype=dtype)


def _allocate(network: nn.Module) -> None:
    """Replace all parameters and buffers by uninitialized ones that are not trained.

    ``to_empty`` converts meta tensors, which loads torch's compiler, and ``_apply`` of torch 2.9 leaves parameters on
    the meta device.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = nn.Parameter(_empty(parameter), False)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = _empty(buffer)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _unpacked_bytes(layer: nn.Module, on_gpu: bool) -> int:
    """Return the bytes of quantized experts that a layer dequantizes at a time; see ``training.network.routed``."""
    stacks = expert_stacks(layer)
    if on_gpu or not all(multiplies_groups(layer.get_submodule(name.rpartition(".")[0])) for name in stacks):
        return sum(stack.nbytes for stack in stacks.values())
    return max((stack[0].nbytes for stack in stacks.values()), default=0)


def _train_others(network: nn.Module) -> None:
    """Make a network's parameters outside of linear layers float32 ones, which their modules see cast."""
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(module, TrainedWeight) and parameter.dtype != torch.float32:
                hold(module, name, nn.Parameter(parameter.float()), parameter.dtype)


class _Groups(TorchFunctionMode):
    """Replaces grouped products of experts by a product that allocates as much; torch fakes only those of bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is getattr(torch, "_grouped_mm", None) and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def _attend_on_gpu(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _AttentionMemory.apply(query, key, value), None  # type: ignore[no-untyped-call]


class _AttentionMemory(torch.autograd.Function):
    """Saves its (batch, heads, rows, dim) inputs, its output and one number per row, as FlashAttention does.

    The backward pass also allocates sums of gradients of the queries in float32, and gradients of keys and values for
    every query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, _ = query.shape
        result = query.new_empty(batch, rows, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty((batch, heads, rows), dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        by_head = [side for side in (key, value) if side.shape[1] != query.shape[1]]
        space = [side.new_empty(len(side), query.shape[1], *side.shape[2:]) for side in by_head]
        space += [query.new_empty(query.shape, dtype=torch.float32)] if query.element_size() == 2 else []
        found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del space
        return found
