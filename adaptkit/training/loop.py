"""The training loop: batches in, an adapter out; killed and run again, it goes on."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.checkpoint.hashing import file_sha256, tensors_root
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.quantized import quantized_names
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import write_file
from adaptkit.errors import NonFiniteError, UsageError
from adaptkit.training.config import TrainConfig
from adaptkit.training.data import Sample, collate, load_data, split, step_samples
from adaptkit.training.evaluate import mean_loss, pad_id, summed_loss
from adaptkit.training.model import Model, choose_device, load_model
from adaptkit.training.optimizer import PagedAdamW, learning_rate
from adaptkit.training.paging import PagedState
from adaptkit.training.result import write_result
from adaptkit.training.resume import TrainingState, newest_checkpoint, save_checkpoint
from adaptkit.training.segments import checkpoint_layers
from adaptkit.training.start import begin, read_start

METRICS_NAME = "metrics.jsonl"
_PAGES_NAME = "optimizer-pages.bin"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: from 1.
        steps: of the run.
        loss: mean over the batch's answer tokens.
        tokens_per_second: of all tokens, padding aside.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        output: folder of the adapter.
        steps: taken in all.
        resumed_from: step at which this process began; 0 if it began the run.
        trainable_parameters: in the adapter.
        samples: trained on.
        truncated: samples cut to the longest length.
        dropped: samples left out since the cut took their whole answer.
        held_out_before: mean loss per answer token on the held-out samples, before training; None without any.
        held_out_after: the same after training.
        segments: that gradient checkpointing cuts the layers into; 0 if it is off.
        paging: pages, slots, faults, evictions, write-backs of the optimizer state.
        tokens_per_second: of this process.
        tensors_root: binds the adapter's tensors.
        manifest_sha256: of the adapter's manifest.
    """

    output: str
    steps: int
    resumed_from: int
    trainable_parameters: int
    samples: int
    truncated: int
    dropped: int
    held_out_before: float | None
    held_out_after: float | None
    segments: int
    paging: dict[str, int]
    tokens_per_second: float
    tensors_root: str
    manifest_sha256: str


def train(
    config: TrainConfig,
    output: Path,
    *,
    force: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> TrainReport:
    """Train a LoRA adapter on an NF4 base.

    Args:
        config: the run.
        output: folder of the adapter to make.
        force: replace an existing adapter, or begin anew where a run with other options stopped.
        on_step: told of every step.

    Raises:
        CheckpointError, UsageError, DataError: base, targets or data cannot be used.
        NonFiniteError: the loss is no number; names the step.
        ConflictError: the output exists, or unfinished work of another run lies there.

    Source: QLoRA (arXiv:2305.14314); NF4 storage, bfloat16 compute, paged optimizer state.
    """
    base = Path(config.base)
    checkpoint = Checkpoint(base)
    if not quantized_names(checkpoint):
        raise UsageError(f"{base}: not quantized", hint=f"run: adaptkit quantize {base} -o {base.name}-nf4")
    check_output(output, force, [base, *map(Path, config.data)])
    tokenizer = load_tokenizer(base)
    data = load_data([Path(file) for file in config.data], tokenizer, config.max_length)
    data_sha256 = [file_sha256(Path(file)) for file in config.data]
    samples, held_out = split(data.samples, config.held_out, config.seed)
    manifest = read_manifest(base)
    start = read_start(config, manifest)
    begun = tensors_root(start.records) if start else None
    plan = [config.recorded(), manifest.sha256 if manifest else checkpoint.state(), _digest(data.samples), begun]
    with Output(output, plan, force, keep_work=True) as out:
        run = _Run(config, out, base, samples, held_out, pad_id(tokenizer), start)
        run.train(on_step)
        (out.folder / _PAGES_NAME).unlink(missing_ok=True)
        out.write(METRICS_NAME, run.metrics_bytes())
        adapter = write_result(out, run.model, config, manifest, start, data_sha256)
        out.publish(adapter)
    return TrainReport(
        output=str(output),
        steps=run.steps,
        resumed_from=run.resumed_from,
        trainable_parameters=run.parameters.numel(),
        samples=len(samples),
        truncated=data.truncated,
        dropped=data.dropped,
        held_out_before=run.held_out_losses[0] if held_out else None,
        held_out_after=run.held_out_losses[-1] if held_out else None,
        segments=run.segments,
        paging=run.optimizer.state.metrics(),
        tokens_per_second=run.tokens_per_second,
        tensors_root=adapter.tensors_root,
        manifest_sha256=adapter.sha256,
    )


class _Run:
    """The state of a run: model, flat parameters, optimizer, metrics."""

    def __init__(
        self,
        config: TrainConfig,
        out: Output,
        base: Path,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        padding: int,
        start: Adapter | None,
    ) -> None:
        self._config, self._out, self._padding = config, out, padding
        self._samples, self._held_out = samples, held_out
        per_epoch = len(samples) / config.batch_size
        self.steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
        device = choose_device(config.device)
        self.model = load_model(base, getattr(torch, config.compute_dtype), device)
        begin(self.model, config, start)
        self.segments = checkpoint_layers(self.model.network, config.checkpointing)
        self.parameters, self._gradients = _flatten(self.model)
        budget = None if config.optimizer_pages_mib is None else int(config.optimizer_pages_mib * 2**20)
        elements = config.page_kib * 1024 // 8
        state = PagedState(self.parameters.numel(), max(1, elements), budget, device, out.folder / _PAGES_NAME)
        self.optimizer = PagedAdamW(self.parameters, self._gradients, state, config.weight_decay)
        self.resumed_from, self.tokens_per_second = 0, 0.0
        self._metrics: list[dict[str, Any]] = []
        self._resume()

    @property
    def held_out_losses(self) -> list[float]:
        """Measured so far, in order."""
        return [line["held_out_loss"] for line in self._metrics if "held_out_loss" in line]

    def train(self, on_step: Callable[[StepReport], None]) -> None:
        """Take the steps that are left."""
        config, tokens, seconds = self._config, 0, 0.0
        if self.resumed_from == 0:
            self._evaluate(0)
        for step in range(self.resumed_from, self.steps):
            start = time.monotonic()
            chosen = step_samples(self._samples, config.batch_size, step, config.seed)
            loss = self._step(step, chosen)
            tokens += sum(len(sample.ids) for sample in chosen)
            seconds += time.monotonic() - start
            self.tokens_per_second = tokens / seconds
            on_step(StepReport(step + 1, self.steps, loss, self.tokens_per_second))
            done = step + 1
            if done == self.steps or (config.eval_every and done % config.eval_every == 0):
                self._evaluate(done)
            if done == self.steps or (config.save_every and done % config.save_every == 0):
                self._save(done)

    def _step(self, step: int, chosen: Sequence[Sample]) -> float:
        config = self._config
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout depends on the step alone, so a run can go on
        self.model.network.train()
        self._gradients.zero_()
        answers = sum(sample.answer_tokens for sample in chosen)
        size = config.micro_batch_size or config.batch_size
        total = 0.0
        for start in range(0, len(chosen), size):
            total += self._add_gradients(chosen[start : start + size], answers, step)
        norm = self.optimizer.clip(config.max_grad_norm)
        _check_number(norm, "gradient's norm", step + 1)
        rate = learning_rate(config, step, self.steps)
        self.optimizer.step(rate)
        self._metrics.append(
            {
                "step": step + 1,
                "loss": total,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": sum(len(sample.ids) for sample in chosen),
                "answer_tokens": answers,
            }
        )
        return total

    def _add_gradients(self, chosen: Sequence[Sample], answers: int, step: int) -> float:
        """Add a micro-batch's gradients, and return its share of the loss; the graph ends with this call."""
        loss = summed_loss(self.model, collate(chosen, self._padding)) / answers
        value = float(loss.detach())
        _check_number(value, "loss", step + 1)
        torch.autograd.backward(loss)
        return value

    def _evaluate(self, step: int) -> None:
        if self._held_out:
            loss = mean_loss(self.model, self._held_out, self._config.batch_size, self._padding)
            _check_number(loss, "held-out loss", step)
            self._metrics.append({"step": step, "held_out_loss": loss})

    def metrics_bytes(self) -> bytes:
        """One JSON object a line; nothing in it depends on the clock."""
        return "".join(json.dumps(line) + "\n" for line in self._metrics).encode()

    def _save(self, step: int) -> None:
        first, second = self.optimizer.state.moments()
        unfinished = write_file(self._out.folder, f"{METRICS_NAME}.partial", self.metrics_bytes())
        (self._out.folder / unfinished.path).rename(self._out.folder / METRICS_NAME)  # never half of it
        save_checkpoint(self._out.folder, TrainingState(step, self.parameters.detach(), first, second))

    def _resume(self) -> None:
        state = newest_checkpoint(self._out.folder)
        if state is None:
            return
        self.resumed_from = self.optimizer.steps = state.step
        self.parameters.copy_(state.parameters)
        self.optimizer.state.load_moments(state.first_moment, state.second_moment)
        lines = (self._out.folder / METRICS_NAME).read_text().splitlines()
        self._metrics = [line for line in map(json.loads, lines) if line["step"] <= state.step]


def _flatten(model: Model) -> tuple[Tensor, Tensor]:
    """Move all trainable parameters, and their gradients, into one vector each; the layers get views.

    The optimizer then works on long contiguous pages, whatever the sizes of the matrices.
    """
    trainable = [p for layer in model.adapted().values() for p in (layer.lora_a, layer.lora_b) if p is not None]
    parameters = torch.cat([parameter.detach().reshape(-1) for parameter in trainable])
    gradients = torch.zeros_like(parameters)
    start = 0
    for parameter in trainable:
        end = start + parameter.numel()
        parameter.data = parameters[start:end].view(parameter.shape)
        parameter.grad = gradients[start:end].view(parameter.shape)
        start = end
    return parameters, gradients


def _digest(samples: Sequence[Sample]) -> str:
    """Tells whether a run that goes on has the data, as tokens, that it began with."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.ids, sample.labels]).encode())
    return digest.hexdigest()


def _check_number(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} is {value} at step {step}", hint="lower the learning rate, or look at the data"
        )
