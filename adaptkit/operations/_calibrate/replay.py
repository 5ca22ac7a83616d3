"""A model's forward pass, restarted for every layer, with one layer's weights in memory at a time.

The network is built on the meta device. To run one layer, the model's own forward pass is started: the layers before
that one immediately return the stored output of the last of them, the layer runs with its weights read from the shards,
and an exception ends the pass. So everything that the model computes before its layers (embeddings, positions, several
kinds of masks) reaches each layer as the model itself passes it, and no code here depends on the architecture. The
work outside the layers is repeated, but small; the layers' own is done once.

    in memory  weights outside the layers, such as embeddings; one layer's weights; one hidden state per token; and
               values that layers read from earlier ones

Layers that reuse keys and values of earlier ones read them from a mutable mapping that the model passes to all layers.
The entries that a layer writes are stored, and put into the mapping again when later layers run.
"""

import contextlib
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.models.architecture import empty_network
from adaptkit.models.assembly import Assembly, find_stack
from adaptkit.models.linears import is_linear
from adaptkit.models.probing import InPlaceOf, exchanged

Found = TypeVar("Found")
EntryKey = tuple[int, int, Any]
"""Identifies an entry: (layer that wrote it, index of the mapping among the layer's mapping arguments, key)."""

_CPU = torch.device("cpu")
BATCH_TOKENS = 1024
"""Tokens per batch; fixed, so that sums over tokens are always computed in the same order."""


class Replay:
    """A checkpoint's model and the tokens that it runs over, on the CPU and in float32.

    Args:
        checkpoint: of 16- or 32-bit tensors.
        tokens: (windows, window) int64; every window is a separate sequence.

    Attributes:
        network: transformers' model, on the meta device except for its buffers and the weights in memory.
        prefixes: the layers' dotted paths, in order.
        batches: of the tokens, each (windows, window).
        read: by place, the mapping entries given to the layer that ran last; leaves that collect gradients, if enabled.
        wrote: by place, the entries that it wrote.

    Raises:
        UsageError: transformers cannot build the checkpoint, or a token is not in its vocabulary.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor) -> None:
        self.network = empty_network(checkpoint, torch.float32).eval()
        _check_tokens(self.network, tokens)
        stack, layers = find_stack(self.network)
        self.prefixes = [f"{stack}.{index}" for index in range(len(layers))]
        self._assembly = Assembly(self.network, checkpoint)
        self._assembly.load_buffers(_CPU)
        size = max(1, BATCH_TOKENS // tokens.shape[1])
        self.batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        self._parameters = [name for name, _ in self.network.named_parameters()]
        self._head = self._untied_head()
        self._current, self._calls, self._before = 0, 0, None
        self._entries: list[dict[EntryKey, Any]] = [{} for _ in self.batches]
        self.read: dict[EntryKey, Any] = {}
        self.wrote: dict[EntryKey, Any] = {}
        parent, _, self._stack = stack.rpartition(".")
        self._body = self.network.get_submodule(parent)
        self._replayed = nn.ModuleList(_Replayed(layer, self, index) for index, layer in enumerate(layers))

    def outside(self) -> AbstractContextManager[None]:
        """Keep the weights outside the layers in memory, except those of an untied head."""
        names = [name for name in self._parameters if not name.startswith((*self._dotted(), *self._head))]
        return self._assembly.resident(names, torch.float32, _CPU)

    def head(self) -> AbstractContextManager[None]:
        """Keep the weights of an untied head in memory."""
        names = [name for name in self._parameters if name.startswith(tuple(self._head))]
        return self._assembly.resident(names, torch.float32, _CPU)

    def layer(self, index: int) -> AbstractContextManager[None]:
        """Keep one layer's weights in memory."""
        names = [name for name in self._parameters if name.startswith(f"{self.prefixes[index]}.")]
        return self._assembly.resident(names, torch.float32, _CPU)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Return a layer's linears by dotted path; those outside the layers if ``index`` is the number of layers."""
        found = {name: module for name, module in self.network.named_modules() if is_linear(module)}
        if index < len(self.prefixes):
            return {name: module for name, module in found.items() if name.startswith(f"{self.prefixes[index]}.")}
        tied = None if self._head else self.network.get_output_embeddings()
        return {n: module for n, module in found.items() if not n.startswith(self._dotted()) and module is not tied}

    def run(self, index: int, batch: int, before: Any) -> Any:
        """Run a batch through one layer, whose weights must be in memory.

        Args:
            index: of the layer.
            batch: its index.
            before: output of the layer before; ignored for the first layer.

        Returns:
            The layer's output.

        Raises:
            UsageError: the model does not run its layers once each, in their order.
        """
        known = {place: value for place, value in self._entries[batch].items() if place[0] < index}
        self.read = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(torch.is_grad_enabled()), known)
        try:
            self._forward(index, batch, before)
        except _ReachedError as reached:
            self._entries[batch] |= tree_map_only(Tensor, Tensor.detach, self.wrote)
            return reached.output
        raise self._out_of_order()

    def finish(self, batch: int, before: Any, positions: Tensor) -> Tensor:
        """Run a batch through the part after the layers; the head must be in memory.

        Args:
            batch: its index.
            before: output of the last layer.
            positions: (count,) int64, of the tokens whose logits are wanted.

        Returns:
            (windows, count, vocabulary) logits.

        Raises:
            UsageError: the model runs a layer again after the last one.
        """
        logits: Tensor = self._forward(len(self.prefixes), batch, before, logits_to_keep=positions).logits
        return logits

    def run_to_head(self, batch: int, before: Any) -> None:
        """Run a batch through the part after the layers as ``finish``, but only up to the head's input."""

        def reached(*_: Any) -> None:
            raise _ReachedError(None)

        head = self.network.get_output_embeddings()
        stop = contextlib.nullcontext() if head is None else head.register_forward_pre_hook(reached)
        with stop, contextlib.suppress(_ReachedError):
            self._forward(len(self.prefixes), batch, before)

    def as_in_files(self, found: Mapping[str, Found]) -> dict[str, Found]:
        """Convert results by linear layer to results by matrix in the files; several may make up one layer's weight."""
        return {
            file_name.removesuffix(".weight"): value
            for name, value in found.items()
            for file_name in self._assembly.sources[f"{name}.weight"]
        }

    def _dotted(self) -> tuple[str, ...]:
        return tuple(f"{prefix}." for prefix in self.prefixes)

    def _untied_head(self) -> list[str]:
        """Return the prefix of an untied head's parameters; empty if there is none."""
        head = self.network.get_output_embeddings()
        if head is None or head.weight is self.network.get_input_embeddings().weight:
            return []
        return [f"{name}." for name, module in self.network.named_modules() if module is head]

    def _forward(self, index: int, batch: int, before: Any, **options: Any) -> Any:
        self._current, self._calls, self._before = index, 0, before
        try:
            with exchanged(self._body, {self._stack: self._replayed}):
                return self.network(input_ids=self.batches[batch], use_cache=False, **options)
        finally:
            self._before = None

    def called(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output before the current layer to the model that calls one of those, or run the current one."""
        if index != self._calls:
            raise self._out_of_order()
        self._calls += 1
        if index < self._current:
            return self._before
        mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
        for (_, number, key), value in self.read.items():
            mappings[number][key] = value
        given = [dict(mapping) for mapping in mappings]
        output = layer(*args, **kwargs)
        self.wrote = {
            (index, number, key): value
            for number, (now, before) in enumerate(zip(mappings, given, strict=True))
            for key, value in now.items()
            if value is not before.get(key)
        }
        raise _ReachedError(output)

    def _out_of_order(self) -> UsageError:
        return UsageError(
            f"{type(self.network).__name__} does not run its layers once each, in order",
            hint="quantize it without --calibrate",
        )


class _Replayed(InPlaceOf):
    def __init__(self, layer: nn.Module, replay: Replay, index: int) -> None:
        super().__init__(layer)
        self.replay, self.index = replay, index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replay.called(self.index, self.original, args, kwargs)


class _ReachedError(Exception):
    """Ends a forward pass at the current layer, with its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _check_tokens(network: Any, tokens: Tensor) -> None:
    if tokens.dim() != 2 or not tokens.numel():
        raise UsageError(f"tokens of shape {list(tokens.shape)}: expected (windows, window)")
    known = network.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= known:
        raise UsageError(
            f"token id {int(tokens.max())} is outside the model's vocabulary of {known}",
            hint="use the model's own tokenizer",
        )
