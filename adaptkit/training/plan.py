"""Predict the memory and the trainable parameters of fine-tuning a model, from its configuration only.

    weights      frozen weights. full: none; lora: linear layers as in the checkpoint; qlora: see ``_plan.packing``;
                 everything else in the compute dtype
    trainable    4 bytes per parameter: full training and adapters hold them in float32
    gradients    4 bytes per parameter
    optimizer    8 bytes per parameter, or 2.03 in 8 bits
    activations  measured on a network of fake tensors, by the arithmetic of ``models.activations``
    logits       one chunk, whose size depends on the device; full: and the sum of the output layer's gradients over
                 chunks, and what computing it takes
    overhead     on a CPU, what is not in tensors; see ``models.memory``

On a GPU, copies of the adapter in the compute dtype count as weights, and embedding tables that stay in host memory do
not; see ``models.tables``.

So full fine-tuning needs 16 bytes per parameter plus activations and logits: 160 GB for 10 billion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaptkit.arguments import AnyPath, as_path, checked_options
from adaptkit.errors import UsageError
from adaptkit.formats._format import Encoding
from adaptkit.models.activations import Checkpointing, fit_budget, parse_policy
from adaptkit.models.architecture import Description, empty_network, language_part
from adaptkit.models.linears import is_linear
from adaptkit.models.matching import matching_targets
from adaptkit.models.memory import Memory, all_but_largest, head_gradient_bytes, logits_bytes, overhead_bytes
from adaptkit.models.model_lock import model_lock
from adaptkit.models.tables import host_tables
from adaptkit.training._plan.network import Shape, expert_stacks, linear_shapes, measured_layers
from adaptkit.training._plan.packing import Packing
from adaptkit.training.device import choose_dtype, name_of
from adaptkit.training.memory.adamw import STATE_BITS, moment_bytes
from adaptkit.training.plan_options import PlanOptions
from adaptkit.wording import counted

RANKS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class RankRow:
    """Trainable parameters of an adapter of one rank.

    Attributes:
        rank: of the adapter.
        parameters: that it trains on the chosen targets.
        fraction: the same as a share of the model's parameters.
        one_square: 2 · rank · √N, the count if the model were a single square matrix of its N parameters.
    """

    rank: int
    parameters: int
    fraction: float
    one_square: int


@dataclass(frozen=True)
class PlanReport:
    """The prediction.

    Attributes:
        model: folder.
        architecture: class in transformers.
        parameters: number of the model's parameters.
        method: ``full``, ``lora`` or ``qlora``.
        compute_dtype: dtype of activations and of unquantized weights.
        device: for which it was planned, ``cpu`` or ``cuda``.
        trainable_parameters: number of parameters that the method trains.
        checkpointing: phrase that says which layers are checkpointed.
        memory: bytes by part; see ``models.memory.Memory``.
        total_bytes: of all parts.
        released_bytes: of weights that no part counts: on a CPU, checkpointed layers release them once they are used.
        context: the model's longest sequence in tokens; None if its configuration does not say.
        notes: one-line warnings about what such a run would refuse, leave out or do badly.
        ranks: trainable parameters of adapters of other ranks.
    """

    model: str
    architecture: str
    parameters: int
    method: str
    compute_dtype: str
    device: str
    trainable_parameters: int
    checkpointing: str
    memory: dict[str, int]
    total_bytes: int
    released_bytes: int
    context: int | None
    notes: tuple[str, ...]
    ranks: tuple[RankRow, ...]


@model_lock()
def plan(model: AnyPath, options: PlanOptions | None = None) -> PlanReport:
    """Predict memory and trainable parameters of a fine-tuning run.

    Args:
        model: folder with a ``config.json``; it need not contain weights.
        options: the run to plan.

    Raises:
        UsageError: transformers does not know the architecture, a target matches nothing, the rank is too large, or a
            budget is too small.
        CheckpointError: the configuration cannot be read, or its sizes are implausible.
    """
    model = as_path(model, "model")
    options = checked_options(options, PlanOptions)
    description = Description.read(model)
    options = _resolved(options, description)
    dtype = getattr(torch, options.compute_dtype)
    network = empty_network(description, dtype)
    shapes = linear_shapes(network)
    targets = sorted(matching_targets(options.targets, shapes, language_part(network), network.config.model_type))
    packing = _packing(network, shapes, description, options)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    full = options.method == "full"
    most = _highest_rank(shapes, targets, options)
    trainable = parameters if full else _adapter_parameters(shapes, targets, options.rank)
    weights = sum(buffer.nbytes for buffer in network.buffers())
    if not full:
        weights += packing.frozen_nbytes(network, shapes, dtype, description.dtype)
        weights += _moved_bytes(network, options, dtype, trainable)
    codes = packing.codes_of_layers(network)
    packs_experts = not packing.names.isdisjoint(expert_stacks(network))
    ranks = {} if full else dict.fromkeys(targets, options.rank)
    checkpointing, activations, kept = _activations(network, options, ranks, packs_experts)
    checkpointed = [] if options.on_gpu else codes[: checkpointing.layers - checkpointing.whole]
    released = all_but_largest([size for layer in checkpointed for size in layer])
    memory = Memory(
        weights=weights - released,
        trainable=4 * trainable,
        gradients=4 * trainable,
        optimizer=moment_bytes(trainable, STATE_BITS[options.optimizer]),
        activations=activations,
        logits=_logits(network, options, dtype),
        overhead=0 if options.on_gpu else overhead_bytes(checkpointing.layers, kept, dtype.itemsize),
    )
    return PlanReport(
        model=str(model),
        architecture=type(network).__name__,
        parameters=parameters,
        method=options.method,
        compute_dtype=options.compute_dtype,
        device="cuda" if options.on_gpu else "cpu",
        trainable_parameters=trainable,
        checkpointing=str(checkpointing),
        memory=memory.parts(),
        total_bytes=memory.total,
        released_bytes=released,
        context=_context(network.config),
        notes=tuple(_notes(network, description, options, packs_experts)),
        ranks=tuple(_ranks(shapes, targets, parameters, most)),
    )


def _resolved(options: PlanOptions, description: Description) -> PlanOptions:
    """Return the options with method and compute_dtype as ``train`` chooses them; a GPU elsewhere has bfloat16."""
    method, dtype = options.method, options.compute_dtype
    if method == "auto":
        method = "qlora" if "quantization_config" in description.config else "lora"
    if not options.on_gpu or torch.cuda.is_available():
        dtype = name_of(choose_dtype(dtype, torch.device("cuda" if options.on_gpu else "cpu")))
    return replace(options, method=method, compute_dtype="bfloat16" if dtype == "auto" else dtype)


def _packing(network: Any, shapes: dict[str, Shape], description: Description, options: PlanOptions) -> Packing:
    if options.method != "qlora":
        return Packing(frozenset(), Encoding())
    if not any(is_linear(network.get_submodule(name)) for name in shapes):
        hint = "use --method lora"
        raise UsageError(f"{description.root}: quantize does not support any of its linear layers", hint=hint)
    return Packing.of(network, shapes, description.config, options.moe)


def _highest_rank(shapes: dict[str, Shape], targets: list[str], options: PlanOptions) -> int:
    """Return the highest rank of an adapter on these targets; refuse a run with a higher one.

    Raises:
        UsageError: names the smallest target.
    """
    most = min((min(shapes[name]) for name in targets), default=0)
    if options.method != "full" and options.rank > most:
        small = next(name for name in targets if min(shapes[name]) == most)
        raise UsageError(
            f"rank: must be at most {most}, since {small} is {shapes[small][0]} x {shapes[small][1]}; found "
            f"{options.rank}",
            hint=f"give --rank {most} or less, or leave that module out of --targets",
        )
    return most


def _moved_bytes(network: Any, options: PlanOptions, dtype: torch.dtype, trainable: int) -> int:
    """Return what copies of the adapter add to a GPU's frozen weights, less the tables that stay in host memory."""
    if not options.on_gpu:
        return 0
    tables = sum(module.weight.numel() * dtype.itemsize for module in host_tables(network, dtype).values())
    return (trainable * dtype.itemsize if dtype != torch.float32 else 0) - tables


def _ranks(shapes: dict[str, Shape], targets: list[str], parameters: int, most: int) -> Iterator[RankRow]:
    for rank in RANKS:
        if rank <= most:
            count = _adapter_parameters(shapes, targets, rank)
            yield RankRow(rank, count, count / parameters, round(2 * rank * math.sqrt(parameters)))


def _context(config: Any) -> int | None:
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _notes(network: Any, description: Description, options: PlanOptions, packs_experts: bool) -> Iterator[str]:
    context, stacks = _context(network.config), expert_stacks(network)
    if context is not None and context < options.max_length:
        yield f"--max-length {options.max_length:,} is longer than the model's context of {context:,} tokens"
    if options.method != "qlora" and "quantization_config" in description.config:
        yield f"this checkpoint is quantized, but {options.method} trains the 16-bit one"
    if stacks and options.method != "full":
        stay = options.method == "qlora" and not packs_experts
        also = ", which stay in 16 bits without --moe quantize" if stay else ""
        yield f"no adapter for {counted(len(stacks), 'stack')} of expert matrices{also}"


def _adapter_parameters(shapes: dict[str, Shape], targets: list[str], rank: int) -> int:
    return rank * sum(sum(shapes[name]) for name in targets)


def _activations(
    network: Any, options: PlanOptions, ranks: dict[str, int], packs_experts: bool
) -> tuple[Checkpointing, int, int]:
    """Return the checkpointing, the bytes of activations, and how many of these layers without it keep."""
    shape, full = (options.rows, options.max_length), options.method == "full"
    sizes = measured_layers(network, ranks, full, shape, packs_experts, options.on_gpu)
    found = parse_policy(options.checkpointing, len(sizes))
    if isinstance(found, Checkpointing):
        chosen = found
    else:
        less = "a smaller --micro-batch-size or --max-length"
        chosen = fit_budget(found, sizes, options.offload_checkpoints, less=less)
    return chosen, chosen.bytes_needed(sizes, options.offload_checkpoints), chosen.kept_whole(sizes)


def _logits(network: Any, options: PlanOptions, dtype: torch.dtype) -> int:
    """Return the bytes of a chunk of logits, and of the output layer's gradient if it is trained."""
    vocabulary, head = network.config.get_text_config().vocab_size, network.get_output_embeddings()
    chunk = logits_bytes(options.rows * (options.max_length - 1), vocabulary, dtype.itemsize, options.on_gpu)
    if options.method != "full" or head is None:
        return chunk
    return chunk + head_gradient_bytes(sum(part.numel() for part in head.parameters()), dtype.itemsize)
