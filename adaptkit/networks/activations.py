"""What a network's layers keep between forward and backward pass, and how much of it each way of checkpointing needs.

With h the input of a layer, a what its forward pass leaves alive, and w what its passes need on top for a while:

    nothing checkpointed     Σ (h + a) + w
    a checkpoint a layer     Σ h + a + w                                of one layer
    segments of s layers     h a segment + s h + a + w                  of one layer; √n segments need least
    the last k layers whole  Σ h + the larger of Σ a of these layers and a + w of one other

a and w are measured, not derived: a layer runs forward and backward once, and every tensor's memory is followed. That
works on a real network as on one whose tensors are fake, and whatever its layers do.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptkit.checkpoint.progress import counted
from adaptkit.errors import ConfigError, UsageError
from adaptkit.networks.layer_call import LayerCall

AUTO = "auto"
POLICIES = f"{AUTO}, none, layer, sqrt, segments:K or budget:MIB"


@dataclass(frozen=True)
class LayerSize:
    """Of one layer at one shape of its input.

    Attributes:
        input_bytes: h: its input.
        kept_bytes: a: what its forward pass leaves alive for the backward pass, without input and output.
        peak_bytes: a + w: the most that is alive while it goes forward and backward, without its input.
    """

    input_bytes: int
    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are checkpointed, and how.

    Attributes:
        layers: of the network; 0 if it has no stack of them, and nothing is checkpointed.
        length: layers of a segment; 1 is a checkpoint a layer.
        whole: how many of the last layers keep everything; all of them if nothing is checkpointed.
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
        """Forward passes through a layer that the backward pass repeats, a layer of the network."""
        checked = self.layers - self.whole
        return (2 * checked - self.segments) / self.layers if self.length > 1 else checked / self.layers

    def bytes_needed(self, sizes: Sequence[LayerSize], offloaded: bool = False) -> int:
        """Peak of what all layers keep and need.

        Args:
            sizes: of every layer.
            offloaded: whether the inputs of segments wait elsewhere, but for two.
        """
        checked, whole = sizes[: self.layers - self.whole], sizes[self.layers - self.whole :]
        kept = sum(size.input_bytes + size.kept_bytes for size in whole)
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
    """What a policy says.

    Args:
        policy: ``none``, ``layer``, ``sqrt`` (segments of √n layers), ``segments:K`` or ``budget:MIB``; ``auto`` is
            ``layer`` where nothing is known of a device.
        layers: of the network.

    Returns:
        The checkpointing, or a budget in bytes.

    Raises:
        ConfigError: another policy.
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
    """The checkpointing that recomputes least within a budget.

    Args:
        budget_bytes: for what the layers keep and need.
        sizes: of every layer, as measured.
        offloaded: whether the inputs of segments wait elsewhere.
        less: what would need less, for people.

    Raises:
        UsageError: none fits; says what the least would need.
    """
    found = fit_room(budget_bytes, sizes, offloaded)
    needed = found.bytes_needed(sizes, offloaded)
    if needed <= budget_bytes:
        return found
    least = math.ceil(needed / 2**20)
    raise UsageError(
        f"checkpointing: budget:{budget_bytes >> 20} is not enough: the layers need at least {least} MiB ({found})",
        hint=f"use --checkpointing budget:{least}, or {less}",
    )


def fit_room(room_bytes: int, sizes: Sequence[LayerSize], offloaded: bool = False) -> Checkpointing:
    """The checkpointing that recomputes least within some room; if none fits, the one that needs least."""
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
    """Measure layers while a network runs: the first of every kind, and no further than that.

    Args:
        layers: of the network, in order.
        call: runs the network once; gradients need not be on, and none are collected.
        held: what lies outside of the layers and is there anyway, though a layer may use parts of it.

    Returns:
        The sizes of every layer, in order.
    """
    kinds = [kind_of(layer) for layer in layers]
    wanted = {kinds.index(kind) for kind in kinds}
    sizes: dict[int, LayerSize] = {}
    there = tuple(held)

    def replacement(index: int, forward: Any) -> Any:
        return _measuring(layers[index], forward, sizes, index, wanted, there) if index in wanted else forward

    with _replaced(layers, replacement), suppress(_Enough):
        call()
        raise UsageError("this architecture does not run all of its layers for text", hint="use --checkpointing none")
    return [sizes[kinds.index(kind)] for kind in kinds]


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """Every kind of layer was measured; the rest of the network need not run."""


def kind_of(layer: nn.Module) -> Any:
    """What layers that were built alike have in common: classes, shapes, and what they call their kind."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors if tensor is not None]
        plain = [(key, value) for key, value in vars(module).items() if isinstance(value, (int, str))]
        told = [item for item in plain if not re.search("^_|id[xs]?$|index", item[0])]  # not what number they have
        found.append((name, type(module), shapes, told))
    return found


@contextmanager
def _replaced(layers: Sequence[nn.Module], replacement: Callable[[int, Any], Any]) -> Iterator[None]:
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = replacement(index, layer.forward)  # always set, so that it can always be taken away
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _measuring(
    layer: nn.Module,
    forward: Any,
    sizes: dict[int, LayerSize],
    index: int,
    wanted: set[int],
    held: tuple[Tensor, ...],
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = LayerCall(forward, args, kwargs)
        hidden = call.take()[0].detach().requires_grad_()
        known = [hidden, *layer.parameters(), *layer.buffers(), *held, *tree_leaves((args, kwargs)), *call.constants]
        with torch.enable_grad(), Alive(known) as alive:
            outputs = call(hidden)
            output = outputs[0]
            kept = alive.total() - output.untyped_storage().nbytes()
            torch.autograd.grad(output, hidden, torch.empty_like(output))
        sizes[index] = LayerSize(hidden.untyped_storage().nbytes(), kept, alive.peak)
        if len(sizes) == len(wanted):
            raise _Enough
        return call.finish([tensor.detach() for tensor in outputs])

    return run


class Alive(TorchDispatchMode):
    """Follows the memory of every tensor that is made while it is on.

    Args:
        known: tensors that do not count.

    Attributes:
        peak: the most bytes that were alive at a time; where thousands of tensors are, to a sixty-fourth.
    """

    _FEW = 1000

    def __init__(self, known: Sequence[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {item.untyped_storage()._cdata for item in known if isinstance(item, Tensor)}
        self._found: dict[int, tuple[Any, int]] = {}
        self._most = 0  # that can be alive: those too that went since they were counted
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and look at what came out."""
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
        allowed = self.peak >> 6 if len(self._found) > self._FEW else 0  # or a loop over tokens takes quadratic time
        if self._most > self.peak + allowed:
            self.peak = max(self.peak, self.total())
        return result

    def total(self) -> int:
        """Bytes that are alive now."""
        self._found = {key: found for key, found in self._found.items() if not found[0].expired()}
        self._most = sum(size for _, size in self._found.values())
        return self._most
