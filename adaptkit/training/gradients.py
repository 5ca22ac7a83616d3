"""The gradients of a step, micro-batch by micro-batch."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.training.config import TrainConfig
from adaptkit.training.data.batches import Batch
from adaptkit.training.distributed import World
from adaptkit.training.network.accumulation import adding_up
from adaptkit.training.network.groups import forget
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import Model
from adaptkit.training.network.neftune import EmbeddingNoise


class Gradients:
    """Collects the gradients of a step.

    Args:
        model: whose parameters' gradients are views of ``vector``.
        vector: (N,) float32.
        config: of the run.
        world: the processes among which a step is divided.
    """

    def __init__(self, model: Model, vector: Tensor, config: TrainConfig, world: World) -> None:
        self._model, self._vector, self._seed, self._world = model, vector, config.seed, world
        self._noise = EmbeddingNoise(model.network, config.neftune_alpha) if config.neftune_alpha else None
        self._sources: list[str] = []
        self._spoiled: list[str] = []

    def collect(self, batches: Sequence[Batch], answers: int, step: int) -> float:
        """Make the vector the gradient of the loss of a step.

        Args:
            batches: this process's share of the step.
            answers: tokens that carry loss, of the whole step: what the loss is the mean over.
            step: from 0.

        Returns:
            The loss of the whole step; no number if that of a micro-batch is none, and the gradients are then
            incomplete. Gradients and loss are the same in all processes.
        """
        self._model.network.train()
        self._vector.zero_()
        self._sources = [source for batch in batches for source in batch.sources]
        self._spoiled = []
        try:
            shares = [self._add(batch, answers, step, index) for index, batch in enumerate(batches)]
        except BaseException:
            forget(self._model.network)  # or a second try would have no more room than the first
            raise
        values = torch.stack(shares).tolist()  # only now does the host wait for the device
        for batch, value in zip(batches, values, strict=True):
            if not math.isfinite(value):
                self._spoiled += batch.sources
        self._world.add_up(self._vector)
        return self._world.total(sum(values))

    def blamed(self) -> list[str]:
        """File and line of the samples whose loss was no number, in any process; of the whole step if it was none's."""
        return self._world.collect(self._spoiled) or self._world.collect(self._sources)

    def _add(self, batch: Batch, answers: int, step: int, index: int) -> Tensor:
        """Add a micro-batch's gradients, and return its share of the loss; the graph ends with this call."""
        torch.manual_seed(random_seed(self._seed, step, self._world.rank, index))
        if self._noise is not None:
            self._noise.expect(batch)
        loss = summed_loss(self._model, batch) / answers
        with adding_up():
            torch.autograd.backward(loss)  # even if it is no number: processes that share the base need each other here
        return loss.detach()


def random_seed(seed: int, step: int, rank: int, index: int) -> int:
    """The seed of a micro-batch's dropout and noise: depends on nothing before it, so a run can go on anywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank} {index}".encode()).digest()[:8], "little") >> 1
