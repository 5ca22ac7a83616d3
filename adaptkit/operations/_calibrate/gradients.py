"""How much the prediction depends on the output of each linear layer, with one layer's weights in memory at a time.

With g the gradient of log p(y | x) in a linear layer's output, where y is drawn from the model's own prediction,
E[g gᵀ] is that output's Fisher information, and a small change ΔW of its weight moves the prediction by about

    KL ≈ ½ · E[(gᵀ ΔW x)²]  ≈  ½ · Σᵢ E[gᵢ²] · ΔWᵢ E[x xᵀ] ΔWᵢᵀ

nats per token; the last step assumes independent g and x, and a diagonal E[g gᵀ]. Source: the factored Fisher
information of K-FAC (Martens and Grosse, arXiv:1503.05671), with the diagonal of its output factor.

The forward pass stores every layer's output in a folder, which the caller provides and removes; the backward pass runs
the layers from the last to the first.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import DISK_HINTS, NonFiniteError
from adaptkit.numerics.dtypes import Array
from adaptkit.operations._calibrate.layerwise import Collector, InputMoments, Sums
from adaptkit.operations._calibrate.replay import EntryKey, Replay

LOGIT_POSITIONS = 64
"""Tokens of each window whose logits are in memory at a time."""


@dataclass(frozen=True)
class LayerGradients:
    """Measurements of one layer's linears.

    Attributes:
        gradient_square: maps a linear's dotted path in the files to (out,) float32: E[g²] over the tokens that reached
            it, in nats² per squared unit of its output. A linear that no token reached is absent.
        inputs: by the same paths, the moments of the linear's input, as in ``layer_moments``.
    """

    gradient_square: Mapping[str, Array]
    inputs: Mapping[str, InputMoments]


def layer_gradients(
    checkpoint: Checkpoint,
    tokens: Tensor,
    folder: Path,
    *,
    reserve: Callable[[int], None] = lambda nbytes: None,
    progress: Progress = no_progress,
) -> Iterator[LayerGradients]:
    """Run a 16- or 32-bit checkpoint forward and backward, and measure the gradients of its linears' outputs.

    Args:
        checkpoint: a causal language model that transformers knows.
        tokens: (windows, window) int64; every window is a separate sequence.
        folder: an empty folder for the layers' outputs.
        reserve: called once, early, with the total bytes that will be written there; may raise.
        progress: called with steps done, each one batch forward or backward through one layer.

    Yields:
        Every linear after the layers (an untied head) on its own, then the layers from the last to the first. Linears
        that only compute inputs of the layers are not measured.

    Raises:
        UsageError: transformers cannot build the checkpoint, or a token is not in its vocabulary.
        CheckpointError: a tensor that the architecture needs is missing, or has another shape.
        NonFiniteError: a gradient is NaN or infinite; names the linear layer.
        DiskError: a layer's output cannot be written.
    """
    replay = Replay(checkpoint, tokens)
    count, batches = len(replay.prefixes), len(replay.batches)
    with replay.outside():
        outputs = _Outputs(folder)
        for index in range(count):
            with replay.layer(index), torch.no_grad():
                for batch in range(batches):
                    nbytes = outputs.put(index, batch, replay.run(index, batch, outputs.get(index - 1, batch)))
                    if index == batch == 0:  # no batch is larger, and the outputs of all layers have the same size
                        reserve(count * batches * nbytes)
                    progress(index * batches + batch + 1, 2 * count * batches)
        collector, inputs = _Collector(), Collector(products=False)
        linears = replay.linears(count)
        with replay.head(), collector.watching(linears), inputs.watching(linears):
            generator = torch.Generator().manual_seed(0)
            grads = [
                _head_backward(replay, batch, outputs.get(count - 1, batch), generator) for batch in range(batches)
            ]
        for name, square in collector.mean_squares().items():
            entered = {name: inputs.moments()[name]}
            yield LayerGradients(replay.as_in_files({name: square}), replay.as_in_files(entered))
        shared_grads: list[dict[EntryKey, list[Tensor]]] = [{} for _ in range(batches)]
        for index in reversed(range(count)):
            collector, inputs = _Collector(), Collector(products=False)
            linears = replay.linears(index)
            with replay.layer(index), collector.watching(linears), inputs.watching(linears):
                for batch in range(batches):
                    before, owed = outputs.get(index - 1, batch), shared_grads[batch]
                    grads[batch] = _layer_backward(replay, index, batch, before, grads[batch], owed)
                    progress((2 * count - 1 - index) * batches + batch + 1, 2 * count * batches)
            squares, entered = collector.mean_squares(), inputs.moments()
            yield LayerGradients(replay.as_in_files(squares), replay.as_in_files(entered))


class _Outputs:
    """The outputs of the layers, on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._others: dict[tuple[int, int], tuple[list[Any], TreeSpec]] = {}

    def put(self, index: int, batch: int, output: Any) -> int:
        """Write a layer's output, and return the size of its file.

        Raises:
            DiskError: it cannot be written.
        """
        parts, shape = tree_flatten(output)
        held = {str(n): part.detach().contiguous() for n, part in enumerate(parts) if isinstance(part, Tensor)}
        self._others[index, batch] = [None if isinstance(part, Tensor) else part for part in parts], shape
        try:
            return (self._folder / f"{index}-{batch}").write_bytes(save(held))
        except OSError as error:
            hint = DISK_HINTS.get(error.errno or 0, "")
            raise DiskError(
                f"{self._folder}: cannot write the outputs of layer {index}: {error.strerror}",
                hint=hint and f"{hint}, and run the same command again; it repeats the measurement",
            ) from error

    def get(self, index: int, batch: int) -> Any:
        """Read a layer's output; None for index -1, before the first layer."""
        if index < 0:
            return None
        held, (others, shape) = load_file(self._folder / f"{index}-{batch}"), self._others[index, batch]
        return tree_unflatten([held.get(str(n), part) for n, part in enumerate(others)], shape)


def _hidden(output: Any) -> Tensor:
    """Return the hidden states in a layer's output, which is a tensor or a tuple that begins with them."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _leaf(output: Any) -> tuple[Any, Tensor]:
    """Return a layer's output with its hidden states as a leaf that collects gradients, and this leaf."""
    hidden = _hidden(output).detach().requires_grad_()
    return (hidden if isinstance(output, Tensor) else (hidden, *output[1:])), hidden


def _head_backward(replay: Replay, batch: int, output: Any, generator: torch.Generator) -> Tensor:
    """Return the gradient of drawn tokens' log-likelihood by the last layer's output, (windows, window, hidden)."""
    before, hidden = _leaf(output)
    for positions in torch.split(torch.arange(replay.batches[batch].shape[1]), LOGIT_POSITIONS):
        predicted = replay.finish(batch, before, positions).float().log_softmax(-1).flatten(0, 1)
        if bool(predicted.isnan().any()):
            raise NonFiniteError("the model's predictions are NaN", hint="download the checkpoint again")
        torch.autograd.backward(predicted.gather(1, _drawn(predicted.detach().exp(), generator)).sum())
    return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token from each distribution, (N, 1)."""
    return torch.multinomial(probabilities, 1, generator=generator)


def _layer_backward(
    replay: Replay, index: int, batch: int, output: Any, grad: Tensor, shared_grads: dict[EntryKey, list[Tensor]]
) -> Tensor:
    """Return the gradient by a layer's input, from that by its output; meaningless for the first layer.

    Args:
        replay: the model.
        index: of the layer.
        batch: its index.
        output: of the layer before; None for the first layer.
        grad: by the hidden states in this layer's output.
        shared_grads: by place, gradients by values that later layers read from earlier ones. Those by values that this
            layer wrote are removed, and those by values that it read are added.
    """
    before, hidden = (None, None) if output is None else _leaf(output)
    given = _hidden(replay.run(index, batch, before))
    owed = [pair for place, value in replay.wrote.items() for pair in _pairs(value, shared_grads.pop(place, []))]
    torch.autograd.backward([given, *(tensor for tensor, _ in owed)], [grad, *(more for _, more in owed)])
    for place, value in replay.read.items():
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in tree_leaves(value)]
        earlier = shared_grads.get(place)
        shared_grads[place] = found if earlier is None else [a + b for a, b in zip(earlier, found, strict=True)]
    return grad if hidden is None or hidden.grad is None else hidden.grad


def _pairs(value: Any, grads: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tree_leaves(value), grads, strict=True)) if grads else []


class _Collector:
    """Sums the squares of the gradients of linear layers' outputs."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}

    @contextlib.contextmanager
    def watching(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Sum over the backward passes in the block."""
        with contextlib.ExitStack() as hooks:
            for name, module in linears.items():
                hooks.enter_context(module.register_forward_hook(self._hook(name)))
            yield

    def mean_squares(self) -> dict[str, Array]:
        return {name: sums.mean_square(f"{name}: the gradient of its output") for name, sums in self._sums.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def add(grad: Tensor) -> None:
            if grad.numel():
                self._sums.setdefault(name, Sums(grad.shape[-1], False)).add(grad)

        def see(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]
                return None
            leaf = output.requires_grad_()  # as in the first layer, where no input requires gradients
            leaf.register_hook(add)  # type: ignore[no-untyped-call]
            return leaf.clone()  # the model may change it in place, which torch forbids for a leaf

        return see
