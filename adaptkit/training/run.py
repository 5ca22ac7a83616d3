"""The steps of a run, which resumes from its newest checkpoint."""

import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import ConflictError, NonFiniteError
from adaptkit.training.config import LOWER_THE_RATE
from adaptkit.training.device import free_memory, memory_warning, triton_warning
from adaptkit.training.distributed import World
from adaptkit.training.gradients import Gradients
from adaptkit.training.history import History
from adaptkit.training.inputs import Inputs
from adaptkit.training.memory.activations import PeakMemory
from adaptkit.training.memory.optimizer import make_optimizer
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.memory.pressure import Pressure
from adaptkit.training.memory.vector import Vector
from adaptkit.training.network.model import free_former_network
from adaptkit.training.network.start import cannot_be_merged, first_names, left_out, peft_drops
from adaptkit.training.observations import Observations
from adaptkit.training.preparation import batches_of, begin_run, build, expected_memory, largest_batch, total_steps
from adaptkit.training.report import StepProgress
from adaptkit.training.resume import PAGES_NAME, Snapshot, newest_checkpoint, save_checkpoint, share_snapshot
from adaptkit.training.schedule import learning_rate
from adaptkit.training.signals import signals_deferred
from adaptkit.training.trackers import Tracker
from adaptkit.wording import counted

_SKIPPED_IN_A_ROW = 5
"""Fail at so many skips in a row: data cannot explain them; the parameters are NaN, or soon will be."""


@dataclass(frozen=True)
class Chosen:
    """An adapter of a run.

    Attributes:
        name: ``best`` or ``last``.
        step: step after which it had these parameters.
        parameters: (N,) float32.
    """

    name: str
    step: int
    parameters: Tensor


class Run:
    """The state of a run: model, flat parameters, optimizer, history.

    Args:
        inputs: inputs of the run.
        folder: folder for checkpoints, metrics and pages; the run resumes from a checkpoint in it. Processes other
            than rank 0 use it only for pages, and may share it.
        note: called with a one-line message on everything besides steps.
        world: processes of the run.

    Attributes:
        batches: batches of every step.
        steps: number of steps, unless the run stops early.
        model: model being trained.
        activations: which activations the model saves.
        trainable: all trained parameters.
        optimizer: optimizer of ``trainable``.
        history: metrics so far.
        resumed_from: step at which this process resumed; 0 if it started the run.
        done: number of steps taken.
        tokens_per_second: mean rate since this process started, without padding.
    """

    def __init__(self, inputs: Inputs, folder: Path, note: Callable[[str], None], world: World) -> None:
        self._config, self._inputs, self._folder, self._note = inputs.config, inputs, folder, note
        self._world, self.batches = world, batches_of(inputs)
        self.steps = total_steps(inputs.config, self.batches)
        begin_run(inputs, world.device)
        free_former_network()
        self._peak, free = PeakMemory(world.device), free_memory(world.device)
        self.model, self.activations = build(inputs, world, largest_batch(inputs.config, self.batches, world.size))
        inputs.require_base()
        self.trainable = Trainable.of(self.model, inputs.config.lora_plus_ratio)
        self._expected = expected_memory(self.model, self.trainable, self.activations, inputs.config, self.steps)
        short = memory_warning(self._expected, free, world.device, world.local_size, inputs.config.shard_base)
        told = left_out(self.model, inputs.config), cannot_be_merged(self.model, inputs.config), peft_drops(self.model)
        notes = (*told, short, triton_warning(world.device))
        for line in filter(None, notes if world.is_first else ()):
            note(line)
        self._gradients = Gradients(self.model, self.trainable.gradients, inputs.config, world)
        file = folder / (PAGES_NAME if world.is_first else f"adaptkit-{secrets.token_hex(8)}.bin")
        self.optimizer = make_optimizer(self.trainable, inputs.config, file, note)
        pages, offloaded = self.optimizer.state.pages, self.activations.offloaded
        memories, is_alone = [offloaded.memory] if offloaded else [], not inputs.config.shard_base
        self._pressure = Pressure(pages, note, memories, is_alone, self.activations.shrink)
        self._observed = Observations(inputs, self.model, world, self._pressure)
        self.tokens_per_second = 0.0
        snapshot = share_snapshot(world, newest_checkpoint(folder, note) if world.is_first else None)
        self.resumed_from = self.done = snapshot.step if snapshot else 0
        self.history = History(folder if world.is_first else None, snapshot.metrics if snapshot else b"")
        self._best: Tensor | None = None
        self._trackers: Sequence[Tracker] = ()
        self._can_save, self._saved = world.is_first, self.done
        if snapshot:
            self._restore(snapshot)

    def train(self, on_step: Callable[[StepProgress], None], trackers: Sequence[Tracker] = ()) -> None:
        """Take the remaining steps; save a checkpoint whatever interrupts them.

        Args:
            on_step: called after every step.
            trackers: called with every line of the history.
        """
        self._trackers = trackers
        tokens, seconds = 0, 0.0
        try:
            self._observe()
            while not self._is_finished():
                start = time.monotonic()
                line = self._step(self.done)
                tokens, seconds = tokens + line["tokens"], seconds + time.monotonic() - start
                self.tokens_per_second = tokens / seconds
                on_step(StepProgress(self.done, self.steps, line.get("loss", math.nan), self.tokens_per_second))
                self._observe()
                if self._world.is_first and self._is_due(self._config.save_every):
                    self._save()
        finally:
            with signals_deferred():  # torchrun sends a second signal after the terminal's
                if self._can_save and self.done != self._saved:
                    self._save()
        idle = [name for name, change in self.model.changes().items() if not bool(change.lora_b.any())]
        if idle and self._world.is_first:
            named = f"{counted(len(idle), 'adapter')} never received a gradient and did not change"
            self._note(f"{named}: {first_names(idle)}")
        if self.done < self.steps:
            since = counted(self._config.patience, "evaluation")
            self._note(f"stopped early after step {self.done}: no better held-out loss in {since}")

    def memory(self) -> dict[str, int | None]:
        """Return predicted and measured bytes; see ``TrainReport.memory``."""
        pages = self.optimizer.state.pages
        expected = replace(self._expected, optimizer=pages.slots * pages.page_bytes)
        return expected.parts() | {"predicted": expected.total, "measured": self._peak.growth()}

    def chosen(self) -> list[Chosen]:
        """Return the adapter to publish, followed by the other one if it differs."""
        best = self.history.best_step
        found = [Chosen("last", self.done, self.trainable.values)]
        if best is not None and best != self.done and self._best is not None:
            found.append(Chosen("best", best, self._best))
        return sorted(found, key=lambda adapter: adapter.name != self._config.keep)

    def _is_finished(self) -> bool:
        return self.done >= self.steps or 0 < self._config.patience <= self.history.since_best

    def _is_due(self, every: int) -> bool:
        return self._is_finished() or (every > 0 and self.done % every == 0)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Defer signals while the block changes the state; if it fails, the state is inconsistent and is not saved."""
        with signals_deferred():
            self._can_save = False
            yield
            self._can_save = self._world.is_first

    def _step(self, step: int) -> dict[str, Any]:
        config, method = self._config, self._config.training_method
        weight = sum(method.weight(sample) for row in self.batches.rows(step) for sample in row)
        line: dict[str, Any] = {"tokens": self.batches.tokens(step), method.unit: weight}
        rate = learning_rate(config, step, self.steps)
        batches = self.batches.micro_batches(step, self._world.rank, self._world.size)
        largest = max(batch.ids.numel() for batch in batches)
        metrics = self._pressure.relieve(largest, lambda: self._gradients.collect(batches, weight, step))
        loss = metrics["loss"]
        norm = self.optimizer.clip(config.max_grad_norm)
        reason = self._skip_reason(loss, norm, step + 1)
        with self._changing():
            if reason is None:
                paging = self.optimizer.step(rate)
                line = metrics | {"learning_rate": rate, "grad_norm": norm} | line | paging
            else:
                line = {"skipped": reason} | line
            line = {"step": step + 1} | line
            self.history.add(line)
            self.done = step + 1
        self._tell(line)
        return line

    def _skip_reason(self, loss: float, norm: float, step: int) -> str | None:
        """Return why the step must be skipped: loss or gradient is not finite. None if both are finite.

        Raises:
            NonFiniteError: the settings do not allow skipping, or too many steps in a row were skipped.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        wrong = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        sources = self._gradients.blamed()
        samples = "; ".join(sources)
        message = f"{wrong} at step {step}: {samples}"
        if self._config.on_non_finite == "stop":
            hint = f"check these samples, skip such steps with --on-non-finite skip, or {LOWER_THE_RATE}"
            raise NonFiniteError(message, hint=hint)
        if self.history.skipped_in_a_row + 1 >= _SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{message} (the last of {_SKIPPED_IN_A_ROW} such steps in a row)", hint=LOWER_THE_RATE
            )
        self._note(f"warning: skipped step {step}: {wrong}: {samples}")
        return f"{wrong}: {'; '.join(map(os.path.basename, sources))}"  # metrics contain no paths

    def _observe(self) -> None:
        """Evaluate and answer prompts when due, unless the history already has it from before an interruption."""
        config, is_first = self._config, self.done == 0
        known = self.history.known(self.done)
        wants_loss = bool(self._inputs.held_out) and (is_first or self._is_due(config.eval_every))
        if wants_loss and "held_out_loss" not in known:
            self._measure()
        wants_answers = bool(config.sample_prompts) and not is_first and self._is_due(config.sample_every)
        if wants_answers and "answers" not in known:
            answers = self._observed.answers()
            for prompt, text in answers.items():
                self._note(f"step {self.done}: {prompt!r} -> {text!r}")
            line = {"step": self.done, "answers": answers}
            self.history.add(line)
            self._tell(line)

    def _measure(self) -> None:
        metrics = self._observed.held_out_metrics()
        loss = metrics["loss"]
        if not math.isfinite(loss):
            hint = (
                LOWER_THE_RATE
                if self.done
                else f"check the base: adaptkit evaluate --base {self._config.base} --data FILE"
            )
            raise NonFiniteError(f"the held-out loss is {loss} at step {self.done}", hint=hint)
        line = {"step": self.done} | {f"held_out_{name}": value for name, value in metrics.items()}
        with self._changing():
            self.history.add(line)
            if self.history.best_step == self.done:
                self._remember_best()
        self._tell(line)

    def _remember_best(self) -> None:
        """Copy the parameters to host memory; after the last step they stay in place, so no copy is needed."""
        if not self._world.is_first or self.done == self.steps:
            self._best = None
        elif self._best is None:
            self._best = self.trainable.values.to("cpu", copy=True)
        else:
            self._best.copy_(self.trainable.values)

    def _tell(self, line: dict[str, Any]) -> None:
        """Pass a line to the trackers; call this after a step is recorded, so that their errors cannot undo it."""
        for tracker in self._trackers:
            tracker(line)

    def _save(self) -> None:
        vectors = {"parameters": Vector.of(self.trainable.values)} | self.optimizer.state.vectors()
        if self.history.best_step != self.done and self._best is not None:
            vectors["best_parameters"] = Vector.of(self._best)
        snapshot = Snapshot(self.done, vectors, {"updates": self.optimizer.steps}, self.history.content())
        try:
            save_checkpoint(self._folder, snapshot, self._config.keep_checkpoints)
        except DiskError:
            self._can_save = False  # a second attempt would fail too
            raise
        self._saved = self.done

    def _restore(self, snapshot: Snapshot) -> None:
        vectors = snapshot.vectors
        if vectors["parameters"].count != self.trainable.values.numel():
            raise ConflictError(
                f"{self._folder}: contains a run that trains {vectors['parameters'].count} parameters, but this one "
                f"trains {self.trainable.values.numel()}: another version of adaptkit may choose other layers",
                hint="resume with the version that started it, or start over with --force",
            )
        vectors["parameters"].copy_to(self.trainable.values)
        self.optimizer.steps = snapshot.values["updates"]
        self.optimizer.state.load(vectors)
        if self._world.is_first and self.history.best_step is not None:
            self._best = vectors.get("best_parameters", vectors["parameters"]).whole()
