"""Predict what fine-tuning a model needs, from its configuration alone: memory by part, parameters by rank.

    weights      full: none that are frozen; lora: as in the checkpoint; qlora: 4 bits, an 8-bit constant for 64 of
                 them, and a float32 constant for 256 of those; experts only if they are quantized too
    trainable    4 bytes a parameter: full training and adapters are held in float32
    gradients    4 bytes a parameter
    optimizer    8 bytes a parameter, or 2.03 in 8 bits
    activations  measured on a network without memory, by the arithmetic of ``networks.activations``
    logits       one chunk, as large as the device's

On a GPU adapters have copies in the compute dtype beside them, which count as weights, and tables that are only looked
up do not count: see ``networks.tables``.

Full fine-tuning thus needs 16 bytes a parameter beside activations and logits: 160 GB for 10 billion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptkit.arguments import AnyPath, texts, typed_fields
from adaptkit.checkpoint.progress import counted
from adaptkit.errors import UsageError
from adaptkit.networks.activations import Checkpointing, fit_budget, parse_policy
from adaptkit.networks.alone import alone
from adaptkit.networks.architecture import Description, empty_network, language_part
from adaptkit.networks.kinds import is_router
from adaptkit.networks.linears import is_linear
from adaptkit.networks.matching import matching_targets
from adaptkit.networks.memory import Memory, logits_bytes
from adaptkit.networks.tables import host_tables
from adaptkit.numerics.adamw import STATE_BITS, moment_bytes
from adaptkit.operations._plan.network import Shape, expert_stacks, linear_shapes, measured_layers
from adaptkit.operations._quantize.selection import MOE

METHODS = ("full", "lora", "qlora")
DEVICES = ("auto", "cpu", "cuda")
RANKS = (4, 8, 16, 32, 64, 128, 256)
_BLOCK, _GROUP, _LEVELS_BYTES = 64, 256, 4 * 256


@dataclass(frozen=True)
class PlanOptions:
    """What is planned.

    Attributes:
        method: ``full``, ``lora`` or ``qlora``.
        rank: of the adapter.
        targets: shell patterns of module paths, as the trainer takes them.
        moe: ``keep`` if experts are in 16 bits, as ``quantize`` leaves them, or ``quantize``.
        seq_len: tokens of a row.
        batch: rows that go through the model at a time.
        checkpointing: a policy of ``networks.activations``; of ``auto`` what it needs at least, which is ``layer``.
        optimizer: ``adamw`` or ``adamw8bit``.
        compute_dtype: ``bfloat16`` or ``float32``.
        offload_checkpoints: whether the inputs of segments wait in host memory, which is for GPUs.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if there is one here, or if checkpoints are offloaded.
    """

    method: str = "qlora"
    rank: int = 16
    targets: tuple[str, ...] = ("*",)
    moe: str = "keep"
    seq_len: int = 1024
    batch: int = 1
    checkpointing: str = "layer"
    optimizer: str = "adamw"
    compute_dtype: str = "bfloat16"
    offload_checkpoints: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        typed_fields(self)
        object.__setattr__(self, "targets", texts(self.targets))
        choices = {
            "method": METHODS,
            "moe": MOE,
            "optimizer": STATE_BITS,
            "compute_dtype": ("bfloat16", "float32"),
            "device": DEVICES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}: must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name, most in (("rank", 1 << 16), ("seq_len", 1 << 24), ("batch", 1 << 16)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name}: must be from 1 to {most:,}, found {getattr(self, name)}")
        if not self.targets:
            raise UsageError("targets: must name at least one pattern", hint="'*' matches all modules")
        if self.moe == "quantize" and self.method != "qlora":
            raise UsageError(
                f"moe: method {self.method} does not quantize experts", hint="leave out --moe, or use --method qlora"
            )
        if self.offload_checkpoints and self.device == "cpu":
            raise UsageError(
                "offload_checkpoints: has no effect on a CPU",
                hint="leave out --offload-checkpoints, or use --device cuda",
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the run that is planned has a GPU."""
        if self.device == "auto":
            return self.offload_checkpoints or torch.cuda.is_available()
        return self.device == "cuda"


@dataclass(frozen=True)
class RankRow:
    """What an adapter of one rank trains.

    Attributes:
        rank: of the adapter.
        parameters: that it trains on the chosen targets.
        fraction: of the model's.
        one_square: 2 · rank · √N: were the model one square matrix of its N parameters.
    """

    rank: int
    parameters: int
    fraction: float
    one_square: int


@dataclass(frozen=True)
class PlanReport:
    """What was predicted.

    Attributes:
        model: folder.
        architecture: transformers' class.
        parameters: of the model.
        method: of training.
        device: that it was planned for, ``cpu`` or ``cuda``.
        trainable_parameters: of that method.
        checkpointing: which layers are checkpointed, in words.
        memory: bytes by part; see ``networks.memory.Memory``.
        total_bytes: of all parts.
        context: tokens of a row that the model was made for; None if its configuration does not say.
        notes: what such a run would refuse, leave out or do worse, a line each.
        ranks: what adapters of other ranks would train.
    """

    model: str
    architecture: str
    parameters: int
    method: str
    device: str
    trainable_parameters: int
    checkpointing: str
    memory: dict[str, int]
    total_bytes: int
    context: int | None
    notes: tuple[str, ...]
    ranks: tuple[RankRow, ...]


@alone()
def plan(model: AnyPath, options: PlanOptions | None = None) -> PlanReport:
    """Predict memory and trainable parameters of a fine-tuning run.

    Args:
        model: folder with a ``config.json``; weights need not be there.
        options: what to plan.

    Raises:
        UsageError: transformers does not know the architecture, a target matches nothing, or a budget is too small.
        CheckpointError: the configuration cannot be read or is beyond reason.
    """
    model = Path(model)
    options = options or PlanOptions()
    description = Description.read(model)
    dtype = getattr(torch, options.compute_dtype)
    network = empty_network(description, dtype)
    shapes = linear_shapes(network)
    targets = sorted(matching_targets(options.targets, shapes, language_part(network), network.config.model_type))
    if options.method == "qlora" and not any(is_linear(network.get_submodule(name)) for name in shapes):
        raise UsageError(f"{model}: quantize does not support any of its linear layers", hint="use --method lora")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    full = options.method == "full"
    most = min((min(shapes[name]) for name in targets), default=0)
    if not full and options.rank > most:
        small = next(name for name in targets if min(shapes[name]) == most)
        raise UsageError(
            f"rank: must be at most {most}, since {small} is {shapes[small][0]} x {shapes[small][1]}; found "
            f"{options.rank}",
            hint=f"give --rank {most} or less, or leave that module out of --targets",
        )
    trainable = parameters if full else _low_rank(shapes, targets, options.rank)
    weights = 0 if full else _frozen_bytes(network, shapes, options, dtype, description.dtype)
    if options.on_gpu and not full:
        weights -= sum(module.weight.numel() * dtype.itemsize for module in host_tables(network, dtype).values())
        weights += trainable * dtype.itemsize if dtype != torch.float32 else 0
    vocabulary = network.config.get_text_config().vocab_size
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    checkpointing, activations = _activations(network, options, {} if full else dict.fromkeys(targets, options.rank))
    memory = Memory(
        weights=weights + buffers,
        trainable=4 * trainable,
        gradients=4 * trainable,
        optimizer=moment_bytes(trainable, STATE_BITS[options.optimizer]),
        activations=activations,
        logits=logits_bytes(options.batch * (options.seq_len - 1), vocabulary, dtype.itemsize, options.on_gpu),
    )
    return PlanReport(
        model=str(model),
        architecture=type(network).__name__,
        parameters=parameters,
        method=options.method,
        device="cuda" if options.on_gpu else "cpu",
        trainable_parameters=trainable,
        checkpointing=str(checkpointing),
        memory=memory.parts(),
        total_bytes=memory.total,
        context=_context(network.config),
        notes=tuple(_notes(network, description, options)),
        ranks=tuple(
            RankRow(rank, count, count / parameters, round(2 * rank * math.sqrt(parameters)))
            for rank in RANKS
            if rank <= most
            for count in [_low_rank(shapes, targets, rank)]
        ),
    )


def _context(config: Any) -> int | None:
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _notes(network: Any, description: Description, options: PlanOptions) -> Iterator[str]:
    context, stacks = _context(network.config), expert_stacks(network)
    if context is not None and context < options.seq_len:
        yield f"--seq-len {options.seq_len:,} is longer than the model's context of {context:,} tokens"
    if options.method != "qlora" and "quantization_config" in description.config:
        yield f"this checkpoint is quantized, but {options.method} trains the 16-bit one"
    if stacks and options.method != "full":
        stay = options.method == "qlora" and options.moe == "keep"
        also = ", which stay in 16 bits without --moe quantize" if stay else ""
        yield f"no adapter for {counted(len(stacks), 'stack')} of expert matrices{also}"


def _low_rank(shapes: dict[str, Shape], targets: list[str], rank: int) -> int:
    return rank * sum(sum(shapes[name]) for name in targets)


def _activations(network: Any, options: PlanOptions, ranks: dict[str, int]) -> tuple[Checkpointing, int]:
    shape = options.batch, options.seq_len
    sizes = measured_layers(network, ranks, options.method == "full", shape, options.moe == "quantize")
    found = parse_policy(options.checkpointing, len(sizes))
    if isinstance(found, Checkpointing):
        chosen = found
    else:
        chosen = fit_budget(found, sizes, options.offload_checkpoints, less="a smaller --batch or --seq-len")
    return chosen, chosen.bytes_needed(sizes, options.offload_checkpoints)


def _frozen_bytes(
    network: Any, shapes: dict[str, Shape], options: PlanOptions, dtype: torch.dtype, stored: torch.dtype
) -> int:
    """Bytes of the frozen weights: linear layers as they are stored or quantized, everything else in ``dtype``."""
    packed = set(expert_stacks(network)) if options.moe == "quantize" else set()
    if options.method == "qlora":
        packed |= {f"{name}.weight" for name in shapes if not is_router(name)}
    linear = {f"{name}.weight" for name in shapes} | {f"{name}.bias" for name in shapes}
    total = 0
    for name, parameter in network.named_parameters():
        if name in packed:
            blocks = math.ceil(parameter.numel() / _BLOCK)
            total += math.ceil(parameter.numel() / 2) + blocks + 4 * math.ceil(blocks / _GROUP) + _LEVELS_BYTES
        else:
            total += parameter.numel() * (stored if name in linear else dtype).itemsize
    return total
