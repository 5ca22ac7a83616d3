"""Activation memory of a network's layers, and the choice of a gradient checkpointing scheme for a memory budget.

With h the size of a layer's input, a the activations that its forward pass keeps for the backward pass, and w the
additional temporary memory of its passes, the peak is as follows. Terms without a sum are those of the largest layer.

    no checkpointing         Σ (h + a) + w
    every layer              Σ h + (a + w)
    segments of s layers     Σ h + (s - 1) h + (a + w)          Σ over segments' first layers; √n segments need least
    all but the last k       Σ h + max(Σ' (h + a) + w, a + w)   Σ over the checkpointed layers, Σ' over the last k

a and w are measured: a layer runs forward and backward once while the memory of every tensor is tracked. This works
for any layer, with real or fake tensors.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptkit.errors import ConfigError, UsageError
from adaptkit.models.layer_call import LayerCall
from adaptkit.wording import counted

AUTO = "auto"
POLICIES = f"{AUTO}, none, layer, sqrt, segments:K or budget:MIB"


@dataclass(frozen=True)
class LayerSize:
    """Memory of one layer for one input shape.

    Attributes:
        input_bytes: h, the layer's input.
        kept_bytes: a, what its forward pass keeps for the backward pass, without input and output.
        peak_bytes: a + w, the peak during forward and backward pass, without the input.
    """

    input_bytes: int
    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are checkpointed, and how.

    Attributes:
        layers: number of layers; 0 if the network has no stack of layers, so that nothing is checkpointed.
        length: layers per segment; 1 to checkpoint every layer separately.
        whole: how many of the last layers are not checkpointed.
    """

    layers: int
    length: int
    whole: int = 0

    @property
    def segments(self) -> int:
        """Number of segments."""
        return math.ceil((self.layers - self.whole) / self.length)

    @property
    def recomputed(self) -> float:
        """Layer forward passes that the backward pass repeats, divided by the number of layers."""
        checked = self.layers - self.whole
        return (2 * checked - self.segments) / self.layers if self.length > 1 else checked / self.layers

    def kept_whole(self, sizes: Sequence[LayerSize]) -> int:
        """Return the bytes that the layers that are not checkpointed keep for the backward pass."""
        return sum(size.input_bytes + size.kept_bytes for size in sizes[self.layers - self.whole :])

    def bytes_needed(self, sizes: Sequence[LayerSize], offloaded: bool = False) -> int:
        """Return the peak activation memory of all layers.

        Args:
            sizes: sizes of every layer, in order.
            offloaded: whether the inputs of all segments but two are offloaded to the host.
        """
        checked, whole = sizes[: self.layers - self.whole], sizes[self.layers - self.whole :]
        kept = self.kept_whole(sizes)
        workspace = max((size.peak_bytes - size.kept_bytes for size in whole), default=0)
        if not checked:
            return kept + workspace
        starts = [size.input_bytes for size in checked[:: self.length]]
        held = sum(sorted(starts)[-2:] if offloaded else starts)
        segments = (checked[start : start + self.length] for start in range(0, len(checked), self.length))
        inputs = max(sum(size.input_bytes for size in segment[1:]) for segment in segments)
        return held + max(kept + workspace, inputs + max(size.peak_bytes for size in checked))

    def __str__(self) -> str:
        if self.layers == 0:
            return "no layers to checkpoint"
        checked = self.layers - self.whole
        first = f"the first {checked}" if checked > 1 else "the first"
        which = first if 0 < self.whole < self.layers else f"{checked}"
        how = f" in segments of {self.length}" if self.length > 1 and checked else ""
        return f"{which} of {counted(self.layers, 'layer')} checkpointed{how}"


def parse_policy(policy: str, layers: int) -> Checkpointing | int:
    """Parse a checkpointing policy.

    Args:
        policy: ``none``, ``layer``, ``sqrt`` (segments of √n layers), ``segments:K`` or ``budget:MIB``; ``auto`` is
            treated as ``layer``, for callers that do not know the device's free memory.
        layers: number of the network's layers.

    Returns:
        The checkpointing, or a budget in bytes.

    Raises:
        ConfigError: the policy is none of these.
    """
    kind, _, number = policy.partition(":")
    if policy in {AUTO, "none", "layer"}:
        return Checkpointing(layers, 1, layers if policy == "none" else 0)
    if policy == "sqrt":
        return Checkpointing(layers, max(1, round(math.sqrt(layers))))
    if number.isascii() and number.isdecimal() and 1 <= int(number) < 1 << 40:
        if kind == "segments":
            return Checkpointing(layers, math.ceil(layers / int(number)))
        if kind == "budget":
            return int(number) << 20
    raise ConfigError(f"checkpointing: must be {POLICIES}, found {policy!r}")


def fit_budget(
    budget_bytes: int,
    sizes: Sequence[LayerSize],
    offloaded: bool = False,
    less: str = "a smaller --micro-batch-size or --max-length",
) -> Checkpointing:
    """Return the checkpointing that recomputes least within a budget.

    Args:
        budget_bytes: budget for the peak activation memory of the layers.
        sizes: measured sizes of every layer.
        offloaded: whether the inputs of segments are offloaded.
        less: what the user can change to need less memory, for the hint.

    Raises:
        UsageError: no checkpointing fits; the message says how much the smallest needs.
    """
    found = fit_memory(budget_bytes, sizes, offloaded)
    needed = found.bytes_needed(sizes, offloaded)
    if needed <= budget_bytes:
        return found
    least = math.ceil(needed / 2**20)
    raise UsageError(
        f"checkpointing: budget:{budget_bytes >> 20} is not enough: the layers need at least {least} MiB ({found})",
        hint=f"use --checkpointing budget:{least}, or {less}",
    )


def fit_memory(room_bytes: int, sizes: Sequence[LayerSize], offloaded: bool = False) -> Checkpointing:
    """Return the checkpointing that recomputes least within ``room_bytes``; if none fits, the one that needs least."""
    count = len(sizes)
    choices = [Checkpointing(count, 1, whole) for whole in range(count, -1, -1)]
    choices += [Checkpointing(count, length) for length in range(2, count + 1)]
    fitting = [choice for choice in choices if choice.bytes_needed(sizes, offloaded) <= room_bytes]
    if not fitting:
        return min(choices, key=lambda choice: choice.bytes_needed(sizes, offloaded))
    return min(fitting, key=lambda choice: choice.recomputed)


def measure_layers(
    layers: Sequence[nn.Module], call: Callable[[], Any], held: Iterable[Tensor] = ()
) -> list[LayerSize]:
    """Measure the first layer of every kind while a network runs; the run stops once all kinds are measured.

    Args:
        layers: the network's layers, in order.
        call: runs the network once. Autograd need not be enabled; no gradients are accumulated.
        held: tensors outside the layers that are not counted, though a layer may use parts of them.

    Returns:
        The sizes of every layer, in order.

    Raises:
        UsageError: the network does not run all of its layers, or a layer cannot be measured.
    """
    kinds = [kind_of(layer) for layer in layers]
    first = {kinds.index(kind) for kind in kinds}
    sizes: dict[int, LayerSize] = {}
    there = tuple(held)

    def measure(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes[index] = _layer_size(layer, args, kwargs, there)
        if len(sizes) == len(first):
            raise _AllMeasured

    with ExitStack() as hooks, torch.no_grad(), suppress(_AllMeasured):
        for index in first:
            hooks.enter_context(layers[index].register_forward_pre_hook(partial(measure, index), with_kwargs=True))
        call()
        message = "this architecture does not run all of its layers for text"
        raise UsageError(message, hint="use --checkpointing none")
    return [sizes[kinds.index(kind)] for kind in kinds]


class _AllMeasured(Exception):  # noqa: N818 - nothing is wrong
    """Raised to stop the network's run once every kind of layer is measured."""


def kind_of(layer: nn.Module) -> Any:
    """Return a key that is equal for layers built alike.

    It consists of classes, integer and string attributes, and each tensor's shape, dtype and whether it is trained.
    """
    found: list[Any] = []
    for name, module in layer.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(key, tuple(one.shape), one.dtype, one.requires_grad) for key, one in tensors if one is not None]
        plain = [(key, value) for key, value in vars(module).items() if isinstance(value, (int, str))]
        settings = [item for item in plain if not re.search("^_|id[xs]?$|index", item[0])]  # without the layer's number
        found.append((name, type_before_parametrizations(module), shapes, settings))
    return found


def _layer_size(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], held: tuple[Tensor, ...]) -> LayerSize:
    """Run a layer forward and backward on its arguments, without effect on what it shares with other layers."""
    call = LayerCall(layer.forward, args, kwargs)
    hidden = call.take()[0].detach().requires_grad_()
    known = [hidden, *layer.parameters(), *layer.buffers(), *held, *tree_leaves((args, kwargs)), *call.constants]
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.enable_grad(), Alive(known) as alive, ExitStack() as hooks:
        for parameter in trained:
            hooks.callback(parameter.register_hook(_without_memory).remove)  # type: ignore[no-untyped-call]
        outputs = call(hidden)
        output = outputs[0]
        kept = alive.total() - output.untyped_storage().nbytes()
        torch.autograd.grad(output, [hidden, *trained], torch.empty_like(output), allow_unused=True)
    return LayerSize(hidden.untyped_storage().nbytes(), kept, alive.peak)


def _without_memory(gradient: Tensor | None) -> Tensor | None:
    """Replace the gradient of a parameter, which a run adds to another tensor and frees at once."""
    return None if gradient is None else gradient.new_zeros(()).expand_as(gradient)


class Alive(TorchDispatchMode):
    """Tracks the memory of every tensor that is created while the mode is active.

    Args:
        known: tensors that are not counted.

    Attributes:
        peak: peak of bytes alive; once more than 1000 storages are tracked, it may be too low by 1/64.
    """

    _FEW = 1000

    def __init__(self, known: Sequence[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {item.untyped_storage()._cdata for item in known if isinstance(item, Tensor)}
        self._found: dict[int, tuple[Any, int]] = {}
        self._most = 0  # upper bound on bytes alive: includes storages freed since the last count
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and track the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                if storage._cdata not in self._known:
                    _, before = self._found.get(storage._cdata, (None, 0))
                    self._most += storage.nbytes() - before
                    self._found[storage._cdata] = (
                        StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                        storage.nbytes(),
                    )
        allowed = self.peak >> 6 if len(self._found) > self._FEW else 0  # else a loop over tokens takes quadratic time
        if self._most > self.peak + allowed:
            self.peak = max(self.peak, self.total())
        return result

    def total(self) -> int:
        """Return the bytes that are alive now."""
        self._found = {key: found for key, found in self._found.items() if not found[0].expired()}
        self._most = sum(size for _, size in self._found.values())
        return self._most
