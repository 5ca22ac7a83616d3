"""Gradient accumulation over the micro-batches of a step."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.data.batches import Batch
from adaptkit.training.config import TrainConfig
from adaptkit.training.distributed import World
from adaptkit.training.network.model import Model
from adaptkit.training.network.neftune import EmbeddingNoise


class Gradients:
    """Accumulates the gradients of a step.

    Args:
        model: its parameters' gradients are views of ``vector``.
        vector: (N,) float32, overwritten in place.
        config: settings of the run.
        world: processes that divide each step among them.
    """

    def __init__(self, model: Model, vector: Tensor, config: TrainConfig, world: World) -> None:
        self._model, self._vector, self._seed, self._world = model, vector, config.seed, world
        self._method = config.training_method
        self._noise = EmbeddingNoise(model.network, config.neftune_alpha) if config.neftune_alpha else None
        self._sources: list[str] = []
        self._non_finite: list[str] = []

    def collect(self, batches: Sequence[Batch], weight: int, step: int) -> dict[str, float]:
        """Compute the gradient of a step's loss into the vector.

        Args:
            batches: this process's share of the step.
            weight: weight of all samples of the whole step, over which the metrics are means.
            step: number of the step, from 0.

        Returns:
            The metrics of the whole step, first ``loss``. It is NaN or infinite if that of any micro-batch is; the
            gradients are then unusable. Gradients and metrics are the same in all processes.
        """
        if not self._model.network.training:  # evaluation ends with all modules in another mode
            self._model.network.train()
        self._vector.zero_()
        self._sources = [source for batch in batches for source in batch.sources]
        self._non_finite = []
        shares = [self._add(batch, weight, step, index) for index, batch in enumerate(batches)]
        # The host waits for the device only here.
        values = torch.stack([torch.stack(list(share.values())) for share in shares]).tolist()
        for batch, (loss, *_) in zip(batches, values, strict=True):
            if not math.isfinite(loss):
                self._non_finite += batch.sources
        self._world.all_reduce(self._vector)
        return {name: self._world.total(sum(column)) for name, *column in zip(shares[0], *values, strict=True)}

    def blamed(self) -> list[str]:
        """Return file and line of the samples with non-finite loss in any process, or of all if there are none."""
        return self._world.gather(self._non_finite) or self._world.gather(self._sources)

    def _add(self, batch: Batch, weight: int, step: int, index: int) -> dict[str, Tensor]:
        """Add a micro-batch's gradients, and return its share of the metrics, detached so that the graph is freed."""
        torch.manual_seed(random_seed(self._seed, step, self._world.rank, index))
        if self._noise is not None:
            self._noise.expect(batch)
        sums = self._method.loss(self._model, batch, 1 / weight)
        shares = {name: value / weight for name, value in sums.items()}
        torch.autograd.backward(shares["loss"])  # even if it is not finite: a sharded base needs all processes here
        return {name: share.detach() for name, share in shares.items()}


def random_seed(seed: int, step: int, rank: int, index: int) -> int:
    """Return the seed of a micro-batch's dropout and noise; it has no state, so a run can resume at any step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank} {index}".encode()).digest()[:8], "little") >> 1
