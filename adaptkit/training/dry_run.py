"""Dry run of training: read and check everything and build the model, but write nothing."""

from dataclasses import replace
from pathlib import Path

import torch

from adaptkit.checkpoint.integrity import check_tensors
from adaptkit.checkpoint.place import partial_folder
from adaptkit.models.model_lock import model_lock
from adaptkit.training.config import TrainConfig
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
from adaptkit.training.report import RunPlan, summarize
from adaptkit.training.resume import check_not_finished, check_unfinished, require_room, resume_step
from adaptkit.training.schedule import steps_in


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
        **summarize(output, inputs, batches, model, trainable, activations),
        steps=steps,
        warmup_steps=steps_in(config.warmup, steps),
        resumed_from=resume_step(work, identity),
        held_out=len(inputs.held_out),
        tokens=sum(len(sample.ids) for sample in inputs.samples),
        answer_tokens=sum(sample.answer_tokens for sample in inputs.samples),
        left_out=left_out(model, config),
        cannot_be_merged=cannot_be_merged(model, config),
        peft_drops=peft_drops(model),
        predicted_bytes=needed.total if is_whole else None,
        free_bytes=free if is_whole else None,
        checkpoint_bytes=one,
        disk_bytes=one * (config.keep_checkpoints + 1),
    )
