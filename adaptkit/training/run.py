"""The steps of a run; killed and begun again, it goes on."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from adaptkit.errors import NonFiniteError
from adaptkit.training.batches import Batch, Batches
from adaptkit.training.evaluate import mean_loss, pad_id, summed_loss
from adaptkit.training.history import History
from adaptkit.training.inputs import Inputs
from adaptkit.training.model import choose_device, load_model
from adaptkit.training.optimizer import PagedAdamW
from adaptkit.training.paging import PagedState
from adaptkit.training.parameters import Trainable
from adaptkit.training.report import StepReport
from adaptkit.training.resume import Snapshot, newest_checkpoint, save_checkpoint
from adaptkit.training.schedule import learning_rate
from adaptkit.training.segments import checkpoint_layers
from adaptkit.training.start import begin

_PAGES_NAME = "optimizer-pages.bin"


class Run:
    """The state of a run: model, what is trained, optimizer, history.

    Args:
        inputs: what was read.
        folder: for checkpoints, metrics and pages; a checkpoint in it is gone on from.

    Attributes:
        steps: in all.
        model: being trained.
        segments: that gradient checkpointing cuts the layers into; 0 if it is off.
        trainable: all that is trained.
        optimizer: of it.
        history: what was measured.
        resumed_from: step at which this process began; 0 if it began the run.
        tokens_per_second: of this process, padding aside.
    """

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self._config, self._inputs, self._folder = inputs.config, inputs, folder
        self._padding = pad_id(inputs.tokenizer)
        config = inputs.config
        self._batches = Batches(
            inputs.samples,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            padding=self._padding,
            group_by_length=config.group_by_length,
        )
        self.steps = config.steps or math.ceil(config.epochs * self._batches.steps_per_epoch)
        device = choose_device(config.device)
        self.model = load_model(inputs.base, getattr(torch, config.compute_dtype), device)
        begin(self.model, config, inputs.start)
        self.segments = checkpoint_layers(self.model.network, config.checkpointing)
        self.trainable = Trainable.of(self.model, config.lora_plus_ratio)
        values, gradients, groups = self.trainable.values, self.trainable.gradients, self.trainable.groups
        self.optimizer = PagedAdamW(values, gradients, groups, self._paged_state(device), config.weight_decay)
        self.tokens_per_second = 0.0
        snapshot = newest_checkpoint(folder)
        self.resumed_from = snapshot.step if snapshot else 0
        self.history = History(folder, snapshot.metrics if snapshot else b"")
        if snapshot:
            self._restore(snapshot)

    def train(self, on_step: Callable[[StepReport], None]) -> None:
        """Take the steps that are left."""
        config, tokens, seconds = self._config, 0, 0.0
        if self.resumed_from == 0:
            self._measure(0)
        for step in range(self.resumed_from, self.steps):
            start = time.monotonic()
            loss = self._step(step)
            tokens += self._batches.tokens(step)
            seconds += time.monotonic() - start
            self.tokens_per_second = tokens / seconds
            on_step(StepReport(step + 1, self.steps, loss, self.tokens_per_second))
            if self._is_due(config.eval_every, step + 1):
                self._measure(step + 1)
            if self._is_due(config.save_every, step + 1):
                save_checkpoint(self._folder, self._snapshot(step + 1))

    def close(self) -> None:
        """Remove what only a run that goes on needs."""
        (self._folder / _PAGES_NAME).unlink(missing_ok=True)

    def _is_due(self, every: int, done: int) -> bool:
        return done == self.steps or (every > 0 and done % every == 0)

    def _step(self, step: int) -> float:
        config = self._config
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout depends on the step alone, so a run can go on
        self.model.network.train()
        self.trainable.gradients.zero_()
        answers = self._batches.answer_tokens(step)
        total = 0.0
        for batch in self._batches.micro_batches(step):
            total += self._add_gradients(batch, answers, step)
        norm = self.optimizer.clip(config.max_grad_norm)
        _check_number(norm, "gradient's norm", step + 1)
        rate = learning_rate(config, step, self.steps)
        self.optimizer.step(rate)
        self.history.add(
            {
                "step": step + 1,
                "loss": total,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": self._batches.tokens(step),
                "answer_tokens": answers,
            }
        )
        return total

    def _add_gradients(self, batch: Batch, answers: int, step: int) -> float:
        """Add a micro-batch's gradients, and return its share of the loss; the graph ends with this call."""
        loss = summed_loss(self.model, batch) / answers
        value = float(loss.detach())
        _check_number(value, "loss", step + 1)
        torch.autograd.backward(loss)
        return value

    def _measure(self, step: int) -> None:
        if self._inputs.held_out:
            loss = mean_loss(self.model, self._inputs.held_out, self._config.batch_size, self._padding)
            _check_number(loss, "held-out loss", step)
            self.history.add({"step": step, "held_out_loss": loss})

    def _paged_state(self, device: torch.device) -> PagedState:
        budget = self._config.optimizer_pages_mib
        resident = None if budget is None else int(budget * 2**20)
        elements = max(1, self._config.page_kib * 1024 // 8)
        return PagedState(self.trainable.values.numel(), elements, resident, device, self._folder / _PAGES_NAME)

    def _snapshot(self, step: int) -> Snapshot:
        first, second = self.optimizer.state.moments()
        tensors = {"parameters": self.trainable.values, "first_moment": first, "second_moment": second}
        return Snapshot(step, tensors, {"updates": self.optimizer.steps}, self.history.content())

    def _restore(self, snapshot: Snapshot) -> None:
        self.trainable.values.copy_(snapshot.tensors["parameters"])
        self.optimizer.steps = snapshot.values["updates"]
        self.optimizer.state.load_moments(snapshot.tensors["first_moment"], snapshot.tensors["second_moment"])


def _check_number(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} is {value} at step {step}", hint="lower the learning rate, or look at the data"
        )
