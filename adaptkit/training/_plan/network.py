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
from adaptkit.models.activations import LayerSize, measure_layers
from adaptkit.models.assembly import find_stack
from adaptkit.models.attention import asks_for_more, replace_attention
from adaptkit.models.casting import hold
from adaptkit.models.kinds import is_expert, multiplies_groups
from adaptkit.models.linears import acts_as_linear
from adaptkit.models.memory import ATTENTION_ROWS, ATTENTION_SCORES
from adaptkit.models.recompute import source_of
from adaptkit.training._plan.fused import fuse_stand_ins

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
    network: Any,
    ranks: dict[str, int],
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
    layers = list(find_stack(network)[1])
    unpacked = [_unpacked_bytes(layer, on_gpu) for layer in layers]
    _stand_in_attention(network, on_gpu)
    shapes = linear_shapes(network)
    fuse_stand_ins(network, shapes, full, on_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Groups():
        _allocate(network)
        for name, (rows, columns) in shapes.items():
            linear = network.get_submodule(name)
            stand_in = _StandIn((rows, columns), ranks.get(name, 0), full, linear.bias, linear.weight.dtype)
            network.set_submodule(name, stand_in)
        if full:
            _train_others(network)
        ids = torch.zeros(shape, dtype=torch.int64)
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        before = logger.level
        logger.setLevel(logging.CRITICAL)  # it logs the traceback of errors that are raised anyway
        try:
            with warnings.catch_warnings():  # from experts, on some releases of torch; harmless here
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
                sizes = measure_layers(layers, lambda: network.train().base_model(input_ids=ids, use_cache=False))
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
            if not isinstance(module, _StandIn) and parameter.dtype != torch.float32:
                hold(module, name, nn.Parameter(parameter.float()), parameter.dtype)


class _Groups(TorchFunctionMode):
    """Replaces grouped products of experts by a product that allocates as much; torch fakes only those of bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is getattr(torch, "_grouped_mm", None) and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def _stand_in_attention(network: Any, on_gpu: bool) -> None:
    """Make attention save what a fused kernel saves; an eager implementation, or one that must be sdpa, stays."""
    attend = _attend_on_gpu if on_gpu else _attend_on_cpu
    replace_attention(network, _NAME, attend, lambda *args, **kwargs: None)


def _attend_on_gpu(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value, 0), None  # type: ignore[no-untyped-call]


def _attend_on_cpu(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Allocate what ``training.network.attention`` does, which leaves some calls to transformers."""
    has_own_mask = attention_mask is not None and attention_mask.is_floating_point()
    if has_own_mask or asks_for_more(options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    key_heads, keys = key.shape[1:3]
    of_one_head = query.shape[1] // key_heads * min(query.shape[2], ATTENTION_ROWS) * keys
    scores = of_one_head * min(key_heads, max(1, ATTENTION_SCORES // of_one_head))
    found: Tensor = _Attention.apply(query.contiguous(), key.contiguous(), value.contiguous(), scores)  # type: ignore[no-untyped-call]
    return found, None


class _Attention(torch.autograd.Function):
    """Saves its (batch, heads, rows, dim) inputs, its output and one number per row, as FlashAttention does.

    The backward pass on a CPU also allocates copies of its inputs, and two blocks of scores; FlashAttention's sums of
    gradients of the queries in float32, and gradients of keys and values for every query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: int) -> Tensor:
        batch, heads, rows, _ = query.shape
        result = query.new_empty(batch, rows, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty((batch, heads, rows), dtype=torch.float32))
        ctx.scores = scores
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, _ = ctx.saved_tensors
        if not ctx.scores:
            by_head = [side for side in (key, value) if side.shape[1] != query.shape[1]]
            space = [side.new_empty(len(side), query.shape[1], *side.shape[2:]) for side in by_head]
            space += [query.new_empty(query.shape, dtype=torch.float32)] if query.element_size() == 2 else []
            grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
            del space
            return *grads, None
        copies = [torch.empty_like(result), torch.empty_like(query)]
        grads = tuple(side.new_empty(side.shape, dtype=torch.float32) for side in (key, value))
        blocks = [query.new_empty(ctx.scores) for _ in range(2)]
        del blocks
        return copies[1], *(side.to(query.dtype) for side in grads), None


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
    """Allocates the weight anew in both passes, as dequantizing does; with an adapter it saves x Aᵀ and x's source."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape, rank: int) -> Tensor:
        weight = x.new_empty(shape)
        if rank:
            ctx.make, kept = source_of(x)
            ctx.save_for_backward(x.new_empty(*x.shape[:-1], rank), *kept)
        ctx.rank, ctx.shape = rank, shape
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.rank:
            ctx.make(*ctx.saved_tensors[1:])
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None
