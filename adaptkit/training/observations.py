"""What a run observes between its steps: the loss of held-out samples, and answers to prompts."""

from collections.abc import Sequence

import torch

from adaptkit.data.batches import rows_by_length
from adaptkit.data.encoding import Sample, prompt_ids
from adaptkit.data.limits import pad_id
from adaptkit.training.distributed import World
from adaptkit.training.evaluation.generation import generate
from adaptkit.training.inputs import Inputs
from adaptkit.training.memory.pressure import Pressure
from adaptkit.training.methods._method import TrainingMethod
from adaptkit.training.network.model import Model


class Observations:
    """Observes a model that is being trained.

    Args:
        inputs: inputs of the run.
        model: the model.
        world: processes of the run.
        pressure: frees memory if an observation runs out of it.
    """

    def __init__(self, inputs: Inputs, model: Model, world: World, pressure: Pressure) -> None:
        self._inputs, self._model, self._world, self._pressure = inputs, model, world, pressure
        self._batch_size = inputs.config.micro_batch_size or inputs.config.batch_size  # samples per forward pass
        self._padding = pad_id(inputs.tokenizer, inputs.base)

    def held_out_metrics(self) -> dict[str, float]:
        """Return the mean loss and other metrics of the held-out samples, the same in all processes."""
        everything, world, method = self._inputs.held_out, self._world, self._inputs.config.training_method
        divided = world.size > 1 and not self._inputs.config.shard_base  # sharded: every batch needs all processes
        mine = everything[world.rank :: world.size] if divided else everything
        means = self._pressure.make_room(
            "while held-out samples were evaluated",
            "use a smaller --micro-batch-size or --max-length",
            lambda: mean_losses(method, self._model, mine, self._batch_size, self._padding),
        )
        if not divided:
            return world.broadcast_object(means)  # devices may round differently, but all must stop together
        weight, total = (sum(map(method.weight, samples)) for samples in (mine, everything))
        names = world.broadcast_object(list(means))  # a process may have no samples, the first has some
        return {name: world.total(means.get(name, 0.0) * weight) / total for name in names}

    def answers(self) -> dict[str, str]:
        """Return the answers to the run's prompts."""
        config, tokenizer = self._inputs.config, self._inputs.tokenizer
        asked = [prompt_ids(prompt, tokenizer) for prompt in config.sample_prompts]
        options = {"max_new_tokens": config.sample_tokens, "batch_size": self._batch_size}
        found = self._pressure.make_room(
            "while prompts were answered",
            "use a smaller --micro-batch-size or --sample-tokens",
            lambda: generate(self._model, tokenizer, asked, **options),
        )
        return {prompt: answer.text for prompt, answer in zip(config.sample_prompts, found, strict=True)}


@torch.no_grad()
def mean_losses(
    method: TrainingMethod, model: Model, samples: Sequence[Sample], batch_size: int, padding: int
) -> dict[str, float]:
    """Return the means of a method's loss and other metrics, by name; of no samples, none."""
    model.network.eval()
    sums: dict[str, float] = {}
    for rows in rows_by_length(samples, batch_size):
        for name, value in method.loss(model, method.collate(rows, padding)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sum(map(method.weight, samples))
    return {name: total / weight for name, total in sums.items()}
