"""Products of the linear layers that read one input, with their adapters: one node of autograd for all of them.

    [Y₁ | Y₂ | …] = [s₁ I₁ B₁ᵀ | s₂ I₂ B₂ᵀ | …] + X [W₁; W₂; …]ᵀ            I = X' [A₁; A₂; …]ᵀ
    J = [s₁ G₁ B₁ | s₂ G₂ B₂ | …]        dX = Σ Gᵢ Wᵢ + J [A₁; A₂; …]        Gᵢ: the gradient of Yᵢ; X': after dropout
    d[A₁; A₂; …] = Jᵀ X'        dBᵢ = sᵢ Gᵢᵀ Iᵢ

The first layer that is called computes the results of all, and the others take theirs; with dropout, where the X'
differ, each computes its own. Against the plain layers of ``network.linear``:

    launches   on a GPU, A and B are cast to the compute dtype all at once before each pass of the network
    memory     the input is not saved if it can be made again, see ``norms_and_gates``
    work       a recomputed layer leaves out results that nothing reads, see ``last_products``
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.training.fast.norms_and_gates import source_of
from adaptkit.training.memory.segments import is_recomputing
from adaptkit.training.network.linear import LoraLinear

_ALIGNED = 64
"""Each matrix begins at a multiple of this many elements, since matrix products read sixteen bytes at a time."""


def join_products(network: Any, last_products: frozenset[LoraLinear], dtype: torch.dtype, on_gpu: bool) -> None:
    """Replace the products of a network's layers that have an adapter, but no DoRA, or that are last products.

    The network runs once, on two tokens, to see which layers read the same input.

    Args:
        network: transformers model with its adapter, before its layers are checkpointed or sharded.
        last_products: layers whose result a recomputed layer leaves out.
        dtype: compute dtype.
        on_gpu: whether it will run on a GPU.
    """
    groups: list[_Group] = []
    layers = [part for part in network.modules() if isinstance(part, LoraLinear) and part.magnitude is None]
    adapted = [layer for layer in layers if layer.lora_a is not None]
    together = _called_together(network, [layer for layer in adapted if not layer.dropout])
    for members in (*together, *([layer] for layer in adapted if layer.dropout)):
        groups.append(_Group(members, last_products))
        for index, layer in enumerate(members):
            _set_product(layer, groups[-1].product_of(index))
    for layer in last_products.difference(adapted).intersection(layers):
        _set_product(layer, _skipping(weakref.ref(layer)))

    def begin(*_: Any) -> None:
        for group in groups:
            group.begin()
        if on_gpu and dtype != torch.float32:
            narrow(network, groups, dtype)

    begin()
    # Both: the loss calls the body directly, and some networks (OPT) bypass their body's forward.
    for called in {network, network.base_model}:
        called.register_forward_pre_hook(begin)


def _set_product(layer: Any, product: Callable[[Tensor], Tensor]) -> None:
    layer.multiply = product


def _called_together(network: Any, layers: Sequence[LoraLinear]) -> Iterator[list[LoraLinear]]:
    """Group the layers of one module that are called with the same tensor; other layers are groups of one."""
    if not layers:
        return
    parents = {child: module for module in network.modules() for child in module.children()}
    seen: dict[tuple[int, int, nn.Module], list[LoraLinear]] = {}
    inputs = []  # alive, so that no two have the same id

    def note(layer: Any, given: tuple[Any, ...]) -> None:
        if given:
            inputs.append(given[0])
            seen.setdefault((id(given[0]), given[0]._version, parents[layer]), []).append(layer)

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note))
        network(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=network.device), use_cache=False)
    left = set(layers)
    for together in (*seen.values(), *([layer] for layer in layers)):
        group = [layer for layer in dict.fromkeys(together) if layer in left]
        left.difference_update(group)
        if group:
            yield group


class _Group:
    """Layers that are called with the same input, and results of its last one that no layer has taken yet.

    Attributes:
        a: the A of each layer.
        b: the B of each layer.
        scales: the scaling of each layer.
        weights: the weight of each layer.
        narrow_a: all A in the compute dtype, concatenated along rows; None: they are cast.
        narrow_b: every B in the compute dtype.
    """

    def __init__(self, layers: Sequence[LoraLinear], last_products: frozenset[LoraLinear]) -> None:
        self._layers: list[Any] = [weakref.ref(layer) for layer in layers]  # each of which holds this
        self.a, self.b = ([getattr(layer, name) for layer in layers] for name in ("lora_a", "lora_b"))
        self.scales = [layer.scaling for layer in layers]
        self.narrow_a: Tensor | None = None
        self.narrow_b: Sequence[Tensor] = ()
        self._is_last = last_products.issuperset(layers)
        self.weights = [layer.base for layer in layers]
        self.begin()

    def begin(self) -> None:
        """Drop results that no layer took, because a pass failed: they keep the graph of earlier layers alive."""
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: tuple[int | None, bool] = (None, False)
        self._waiting: dict[int, Tensor] = {}

    def product_of(self, index: int) -> Callable[[Tensor], Tensor]:
        """Return what replaces ``LoraLinear.multiply`` of a layer."""

        def multiply(x: Tensor) -> Tensor:
            layer = self._layers[index]()
            if layer.dropout and layer.training:  # then it is the only one
                result: Tensor = _Product.apply(x, functional.dropout(x, layer.dropout), self, *self.a, *self.b)  # type: ignore[no-untyped-call]
                return result
            return self._take(index, x)

        return multiply

    def _take(self, index: int, x: Tensor) -> Tensor:
        state = None if x.is_inference() else x._version, torch.is_grad_enabled()
        is_known = self._input() is x and self._state == state
        result = self._waiting.pop(index, None) if is_known else None
        if result is None:
            found = _Product.apply(x, x, self, *self.a, *self.b)  # type: ignore[no-untyped-call]
            waiting = dict(enumerate(found if isinstance(found, tuple) else (found,)))
            result = waiting.pop(index)
            if waiting:
                self._input, self._state, self._waiting = weakref.ref(x), state, waiting
        return result

    @property
    def skips(self) -> bool:
        """Whether nothing reads the results now."""
        return self._is_last and is_recomputing()

    def cast_a(self, dtype: torch.dtype) -> Tensor:
        """Return all A concatenated along rows, (sum of ranks, in)."""
        is_there = self.narrow_a is not None and self.narrow_a.dtype == dtype
        return self.narrow_a if is_there else torch.cat(self.a).to(dtype)  # type: ignore[return-value]

    def cast_b(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return every B, (out, rank)."""
        is_there = self.narrow_b and self.narrow_b[0].dtype == dtype
        return self.narrow_b if is_there else [b.to(dtype) for b in self.b]

    def dequantized(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield every weight, (out, in), decoded one after the other."""
        return (weight.dequantize(dtype) for weight in self.weights)


class _Product(torch.autograd.Function):
    """The module docstring's formulas; saves the input's source, I and the adapters, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, group: Any, *factors: Tensor) -> Any:
        count = len(factors) // 2
        ranks = [len(a) for a in factors[:count]]
        flat, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        inner = dropped.reshape(-1, width) @ group.cast_a(x.dtype).T
        results = tuple(x.new_empty(*x.shape[:-1], len(b)) for b in factors[count:])
        if group.skips:
            for result in results:
                result.zero_()
        else:
            shares = torch.split(inner, ranks, 1), group.cast_b(x.dtype), group.scales, group.dequantized(x.dtype)
            for result, part, b, scale, weight in zip(results, *shares, strict=True):
                result.view(-1, len(b)).addmm_(part, b.T, beta=0, alpha=scale).addmm_(flat, weight.T)
        # What is left out is added to its layer's output: the layer's backward pass begins here, and needs X' at once.
        ctx.make, sources = (None, (dropped,)) if group.skips else source_of(dropped)
        ctx.save_for_backward(inner, *factors, *sources)
        ctx.group, ctx.count, ctx.ranks, ctx.shape, ctx.is_shared = group, count, ranks, x.shape, dropped is x
        return tuple(results) if count > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, count, width = ctx.group, ctx.count, ctx.shape[-1]
        inner, *saved = ctx.saved_tensors
        lora_a, lora_b, sources = saved[:count], saved[count : 2 * count], saved[2 * count :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_inner = torch.empty_like(inner)
        by_b, columns = [], (torch.split(side, ctx.ranks, 1) for side in (grad_inner, inner))
        parts = zip(*columns, flat, lora_b, group.cast_b(inner.dtype), group.scales, strict=True)
        for into, part, grad, b, narrow_b, scale in parts:
            into.addmm_(grad, narrow_b, beta=0, alpha=scale)
            by_b.append(_added(b, grad.T @ part, scale))
        made = sources[0] if ctx.make is None else ctx.make(*sources)
        grad_a = grad_inner.T @ made.reshape(-1, width)
        del made  # free it before W is dequantized
        by_a = [_added(a, grad) for a, grad in zip(lora_a, torch.split(grad_a, ctx.ranks), strict=True)]
        by_x = by_dropped = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            by_dropped = grad_inner @ group.cast_a(inner.dtype)
            by_x = by_dropped if ctx.is_shared else torch.zeros_like(by_dropped)
            for grad, weight in zip(flat, group.dequantized(inner.dtype), strict=True):
                by_x.addmm_(grad, weight)
            by_x, by_dropped = by_x.view(ctx.shape), None if ctx.is_shared else by_dropped.view(ctx.shape)
        return by_x, by_dropped, None, *by_a, *by_b


def _added(factor: nn.Parameter, grad: Tensor, scale: float = 1.0) -> Tensor | None:
    """Add a scaled gradient to a factor's ``grad``; return it for autograd if there is none yet."""
    if factor.grad is None:
        return grad.to(factor.dtype).mul(scale)
    factor.grad.add_(grad, alpha=scale)
    return None


def _skipping(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return the product of a layer without an adapter that is a last product."""
    plain = LoraLinear.multiply

    def multiply(x: Tensor) -> Tensor:
        if not is_recomputing():
            return plain(layer(), x)
        result: Tensor = _LeftOut.apply(x, layer().base)  # type: ignore[no-untyped-call]
        return result

    return multiply


class _LeftOut(torch.autograd.Function):
    """Zeros in place of X Wᵀ, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.dequantize(grads[0].dtype), None


def narrow(network: nn.Module, groups: Sequence[_Group], dtype: torch.dtype) -> None:
    """Cast all A and B of some groups at once, into one block of memory: a launch casts sixty-four matrices.

    Cast where they are used, every layer would launch two kernels in each of three passes. The copies are never stale:
    this runs before every pass of the network, and a backward pass runs before the parameters change.
    """
    if not groups:
        return
    units = [unit for group in groups for unit in (group.a, *([b] for b in group.b))]
    sizes = [sum(half.numel() for half in unit) for unit in units]
    spans = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    if groups[0].narrow_a is None or groups[0].narrow_a.device != units[0][0].device:
        flat = torch.empty(sum(spans), dtype=dtype, device=units[0][0].device)
        network.register_buffer("narrow_adapters", flat, persistent=False)  # so that predictions of memory count it
        blocks = [block[:size] for block, size in zip(torch.split(flat, spans), sizes, strict=True)]
        copies = iter([block.view(-1, unit[0].shape[1]) for block, unit in zip(blocks, units, strict=True)])
        for group in groups:
            group.narrow_a, group.narrow_b = next(copies), [next(copies) for _ in group.b]
    targets: list[Tensor] = []
    for group in groups:
        targets += (*torch.split(group.cast_a(dtype), [len(a) for a in group.a]), *group.narrow_b)
    with torch.no_grad():
        torch._foreach_copy_(targets, [half for unit in units for half in unit])
