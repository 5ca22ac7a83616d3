"""The inputs of a model's linear layers, measured with one layer's weights in memory at a time; see ``replay``."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import NonFiniteError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.tensors import as_array
from adaptkit.operations._calibrate.replay import Replay

SUM_ROWS = 128
"""Number of tokens whose squares are in memory in float64 at a time."""

PRODUCT_COLUMNS = 512
"""Columns of x xᵀ that are computed together, from the diagonal down: the part above it follows from symmetry."""


@dataclass(frozen=True)
class InputMoments:
    """Second moments of one linear layer's input x, over every token that reached it.

    Attributes:
        mean_square: (in,) float32, E[x²], summed in float64.
        second_moment: (in, in) float32, E[x xᵀ]; None if it was not asked for.
    """

    mean_square: Array
    second_moment: Array | None


def layer_moments(
    checkpoint: Checkpoint, tokens: Tensor, *, second_moments: bool = False, progress: Progress = no_progress
) -> Iterator[dict[str, InputMoments]]:
    """Run a 16- or 32-bit checkpoint over tokens, and measure the inputs of its linear layers.

    Args:
        checkpoint: a causal language model that transformers knows.
        tokens: (windows, window) int64; every window is a separate sequence.
        second_moments: also collect E[x xᵀ], in² numbers per distinct input.
        progress: called with steps done, each one batch through one layer.

    Yields:
        The moments of each layer's linears, in the order of the layers, then of every linear outside them (an untied
        head): by dotted path in the files, which may lack a prefix or store one matrix of the network as several.
        Linears that read the same tensor share one ``InputMoments``; one that no token reached is absent.

    Raises:
        UsageError: transformers cannot build the checkpoint, it does not run its layers once each, in
            order, or a token is not in its vocabulary.
        CheckpointError: a tensor that the architecture needs is missing, or has another shape.
        NonFiniteError: an activation is NaN or infinite; names the linear layer.
    """
    replay = Replay(checkpoint, tokens)
    count = len(replay.prefixes)
    outputs: list[Any] = [None] * len(replay.batches)
    with replay.outside():
        for index in range(count):
            collector = Collector(second_moments)
            with replay.layer(index), collector.watching(replay.linears(index)), torch.no_grad():
                for batch, before in enumerate(outputs):
                    outputs[batch] = replay.run(index, batch, before)
                    progress(index * len(outputs) + batch + 1, count * len(outputs))
            yield replay.as_in_files(collector.moments())
        for name, moments in _outside(replay, outputs, second_moments).items():
            yield replay.as_in_files({name: moments})


def _outside(replay: Replay, outputs: list[Any], second_moments: bool) -> dict[str, InputMoments]:
    """Measure the inputs of linear layers outside the stack of layers: an untied head, a projection of embeddings."""
    linears = replay.linears(len(replay.prefixes))
    collector = Collector(second_moments)
    with collector.watching(linears), torch.no_grad():
        for batch, before in enumerate(outputs if linears else outputs[:1]):  # one shows whether a layer runs again
            replay.run_to_head(batch, before)
    return collector.moments()


class Sums:
    """Running sums of x² and, if asked for, of x xᵀ over the rows of tensors; their means are arrays."""

    def __init__(self, features: int, products: bool) -> None:
        self._square = torch.zeros(features, dtype=torch.float64)
        self._product = torch.zeros(features, features) if products else None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add (…, features)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        for start in range(0, len(rows), SUM_ROWS):
            self._square += rows[start : start + SUM_ROWS].double().square().sum(0)
        if self._product is not None:
            wide = rows.float()
            for left, right in self._columns():
                self._product[left:, left:right].addmm_(wide.T[left:], wide[:, left:right])
        self.tokens += len(rows)

    def mean_square(self, what: str) -> Array:
        """Return the mean of x², (features,) float32.

        Raises:
            NonFiniteError: it is not finite; ``what`` names the summed tensors in the message.
        """
        mean = as_array((self._square / self.tokens).float())
        if not all_finite(mean):
            raise NonFiniteError(f"{what} is NaN or infinite", hint="download the checkpoint again")
        return mean

    def mean_product(self) -> Array | None:
        """Return the mean of x xᵀ, (features, features) float32, or None. Nothing may be added afterwards."""
        if self._product is None:
            return None
        for left, right in self._columns():
            self._product[left:right, right:] = self._product[right:, left:right].T
        return as_array(self._product.div_(self.tokens))

    def _columns(self) -> list[tuple[int, int]]:
        features = len(self._square)
        return [(left, min(left + PRODUCT_COLUMNS, features)) for left in range(0, features, PRODUCT_COLUMNS)]


class Collector:
    """Sums over the inputs of linear layers, once for layers that read the same tensor."""

    def __init__(self, products: bool) -> None:
        self._products = products
        self._sums: dict[str, Sums] = {}
        self._latest: tuple[Tensor, Sums] | None = None

    @contextlib.contextmanager
    def watching(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Sum over the forward passes in the block."""
        with contextlib.ExitStack() as hooks:
            for name, module in linears.items():
                hooks.enter_context(module.register_forward_pre_hook(self._hook(name)))
            yield
        self._latest = None

    def moments(self) -> dict[str, InputMoments]:
        """Return the moments by layer; nothing may be added afterwards."""
        done: dict[int, InputMoments] = {}
        seen = {name: sums for name, sums in self._sums.items() if sums.tokens}
        for name, sums in seen.items():
            if id(sums) not in done:
                mean_square = sums.mean_square(f"{name}: its input")
                done[id(sums)] = InputMoments(mean_square, sums.mean_product())
        return {name: done[id(sums)] for name, sums in seen.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            same = self._latest[1] if self._latest is not None and self._latest[0] is x else None
            if same is not None and self._sums.setdefault(name, same) is same:
                return  # already added
            sums = self._sums.setdefault(name, Sums(x.shape[-1], self._products))
            if x.numel():
                sums.add(x)
            self._latest = x, sums

        return see
