"""A network of fake tensors, with stand-ins for the linear layers of a training run.

Fake tensors have shapes and dtypes but no memory; operations on them only compute the shapes and dtypes of the results.
The stand-ins allocate, and save for the backward pass, what the trainer's linear layers do.
"""

import logging
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from adaptkit.errors import UsageError
from adaptkit.networks.activations import LayerSize, measure_layers
from adaptkit.networks.assembly import find_stack
from adaptkit.networks.kinds import is_expert
from adaptkit.networks.linears import acts_as_linear

Shape = tuple[int, int]

_NAME = "adaptkit-plan"
"""Name in transformers' registry of attention functions."""


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
    network: Any, ranks: dict[str, int], full: bool, shape: tuple[int, int], packed_experts: bool = False
) -> list[LayerSize]:
    """Measure what each layer keeps and needs in a training run; the network cannot be used afterwards.

    Args:
        network: on the meta device.
        ranks: maps the linear layers with an adapter to its rank.
        full: whether all weights are trained: in float32, which a layer casts for its own use.
        shape: (rows, length) of a batch.
        packed_experts: whether experts are quantized: a layer then dequantizes all of its experts at a time.

    Raises:
        UsageError: there is no stack of layers, or its forward pass does not run on fake tensors.
    """
    layers = list(find_stack(network)[1])
    unpacked = [sum(stack.nbytes for stack in expert_stacks(layer).values()) for layer in layers]
    _stand_in_attention(network)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Groups():
        network.to_empty(device="cpu").requires_grad_(False)
        for name, (rows, columns) in linear_shapes(network).items():
            parent, _, child = name.rpartition(".")
            linear = network.get_submodule(name)
            stand_in = _StandIn((rows, columns), ranks.get(name, 0), full, linear.bias, linear.weight.dtype)
            setattr(network.get_submodule(parent), child, stand_in)
        ids = torch.zeros(shape, dtype=torch.int64)
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        before = logger.level
        logger.setLevel(logging.CRITICAL)  # it logs the traceback of errors that are raised anyway
        try:
            with warnings.catch_warnings():  # from experts, on some releases of torch; harmless here
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
                sizes = measure_layers(layers, lambda: network.train().base_model(input_ids=ids, use_cache=False))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UsageError(
                f"{type(network).__name__}: its forward pass cannot be simulated without weights ({reason})",
                hint="try another --seq-len",
            ) from error
        finally:
            logger.setLevel(before)
    if not packed_experts:
        return sizes
    return [replace(one, peak_bytes=one.peak_bytes + more) for one, more in zip(sizes, unpacked, strict=True)]


class _Groups(TorchFunctionMode):
    """Replaces grouped products of experts by a product that allocates as much; torch fakes only those of bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is getattr(torch, "_grouped_mm", None) and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def _stand_in_attention(network: Any) -> None:
    """Make attention save what a fused kernel saves; an eager implementation is not replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if network.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        network.set_attn_implementation(_NAME)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Saves its (batch, heads, rows, dim) inputs, its output and one number per row, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, _ = query.shape
        result = query.new_empty(batch, rows, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty((batch, heads, rows), dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _StandIn(nn.Module):
    def __init__(self, shape: Shape, rank: int, full: bool, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.rank, self.bias, self.dtype = shape, rank, bias, dtype
        self.trained = nn.Parameter(torch.empty(shape, dtype=torch.float32)) if full else None

    @property
    def weight(self) -> Tensor:
        """The weight, for architectures that read it directly."""
        return torch.empty(self.shape, dtype=self.dtype) if self.trained is None else self.trained.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out), without meaningful values."""
        if self.trained is not None:
            y = nn.functional.linear(x, self.trained.to(x.dtype))
        else:
            y = _Frozen.apply(x, self.shape, self.rank)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Frozen(torch.autograd.Function):
    """Allocates the weight anew in both passes, as dequantizing does; with an adapter it saves x and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape, rank: int) -> Tensor:
        weight = x.new_empty(shape)
        if rank:
            ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], rank))
        ctx.shape = shape
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None
