"""Dry run of training: read and check everything and build the model, but write nothing."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adaptkit.checkpoint.integrity import check_tensors
from adaptkit.checkpoint.place import partial_folder
from adaptkit.models.model_lock import model_lock
from adaptkit.training.config import TrainConfig
from adaptkit.training.data_report import DataReport, report_data
from adaptkit.training.device import choose_device, deterministic, free_memory, make_current, without_cudnn_attention
from adaptkit.training.distributed import World, world_size
from adaptkit.training.identity import as_recorded
from adaptkit.training.inputs import read_inputs
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.start import cannot_be_merged, left_out, peft_drops
from adaptkit.training.out_of_memory import TRAIN_LESS, reports_out_of_memory
from adaptkit.training.preparation import (
    batches_of,
    build,
    checkpoint_bytes,
    expected_memory,
    largest_batch,
    total_steps,
)
from adaptkit.training.resume import check_not_finished, check_unfinished, require_room, resume_step
from adaptkit.training.schedule import steps_in


@dataclass(frozen=True)
class RunPlan:
    """What a run would do.

    Attributes:
        output: folder that the run would create.
        steps: number of optimizer steps.
        warmup_steps: number of them in the learning rate warm-up.
        resumed_from: step of this run's newest undamaged checkpoint; 0 if there is none.
        samples: number of samples to train on.
        held_out: number of held-out samples.
        truncated: number of samples cut to ``max_length``.
        dropped: number of samples left out, because they are too long or have no answer tokens after the cut.
        data: where samples came from, and which were cut or dropped.
        tokens: tokens of the samples to train on, each sample counted once.
        answer_tokens: how many of these carry loss.
        trainable_parameters: number of trained parameters.
        left_out: one line on layers that targets for every linear layer leave out; empty if there are none.
        cannot_be_merged: one line on why the adapter cannot be merged; empty if it can.
        peft_drops: one line on the parts of the adapter that peft will not find; empty if it finds all.
        segments: number of segments that activation checkpointing cuts the layers into; 0 if it is off.
        checkpointing: which layers are checkpointed, in words.
        compute_dtype: dtype of activations and dequantized weights.
        predicted_bytes: memory that each process of the run will need on its device; None with ``shard_base``.
        free_bytes: memory that the device has free; None with ``shard_base`` or if the system does not say.
        checkpoint_bytes: size of one checkpoint.
        disk_bytes: size of all checkpoints that exist at a time.
    """

    output: str
    steps: int
    warmup_steps: int
    resumed_from: int
    samples: int
    held_out: int
    truncated: int
    dropped: int
    data: DataReport
    tokens: int
    answer_tokens: int
    trainable_parameters: int
    left_out: str
    cannot_be_merged: str
    peft_drops: str
    segments: int
    checkpointing: str
    compute_dtype: str
    predicted_bytes: int | None
    free_bytes: int | None
    checkpoint_bytes: int
    disk_bytes: int


@model_lock()
@reports_out_of_memory("beside the base", hint=TRAIN_LESS)
def plan_run(config: TrainConfig, output: Path, *, force: bool = False, resume: bool = False) -> RunPlan:
    """Make all checks of ``train`` up to its first step, and return what it would do.

    Raises:
        AdaptkitError: whatever ``train`` would raise before its first step.
    """
    check_not_finished(output, force, resume)
    inputs = read_inputs(config, output, force)
    work = partial_folder(output)
    identity = as_recorded(work, inputs.identity(), inputs.contents)
    check_unfinished(work, identity, force, resume)
    check_tensors(inputs.base, inputs.manifest)
    device, is_whole = choose_device(config.device), not config.shard_base
    if config.shard_base:  # the base need not fit one device; on the CPU it is memory-mapped
        inputs = replace(inputs, config=replace(inputs.config, shard_base=False, offload_checkpoints=False))
        device = torch.device("cpu")
    make_current(device)
    batches, free = batches_of(inputs), free_memory(device)
    with without_cudnn_attention(), deterministic(config.deterministic):  # layers need the memory of these kernels
        model, activations = build(inputs, World(device), largest_batch(config, batches, world_size()))
    trainable = Trainable.of(model)
    parameters = trainable.values.numel()
    steps = total_steps(config, batches)
    needed = expected_memory(model, trainable, activations, config, steps)
    one = checkpoint_bytes(config, parameters)
    require_room(work, one, config.keep_checkpoints)
    return RunPlan(
        output=str(output),
        steps=steps,
        warmup_steps=steps_in(config.warmup, steps),
        resumed_from=resume_step(work, identity),
        samples=len(inputs.samples),
        held_out=len(inputs.held_out),
        truncated=inputs.data.truncated,
        dropped=inputs.data.dropped,
        data=report_data(inputs, batches),
        tokens=sum(len(sample.ids) for sample in inputs.samples),
        answer_tokens=sum(sample.answer_tokens for sample in inputs.samples),
        trainable_parameters=parameters,
        left_out=left_out(model, config),
        cannot_be_merged=cannot_be_merged(model, config),
        peft_drops=peft_drops(model),
        segments=activations.checkpointing.segments,
        checkpointing=str(activations.checkpointing),
        compute_dtype=inputs.config.compute_dtype,
        predicted_bytes=needed.total if is_whole else None,
        free_bytes=free if is_whole else None,
        checkpoint_bytes=one,
        disk_bytes=one * (config.keep_checkpoints + 1),
    )
