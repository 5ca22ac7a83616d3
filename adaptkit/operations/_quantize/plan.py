"""The plan for quantizing a checkpoint, made before any weight is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.arguments import as_paths, as_texts, typed_fields
from adaptkit.checkpoint.foreign import hint_for_plain, quantization_found
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.spec import FLOATS
from adaptkit.operations._quantize.selection import MOE, Choice, Selection, matches_any, of_type, select
from adaptkit.operations._quantize.tensor_plan import TensorPlan
from adaptkit.operations._roles import Roles
from adaptkit.operations._shards import Group, Shards, check_shard_size, plan_shards
from adaptkit.operations._threads import check_threads
from adaptkit.wording import counted


@dataclass(frozen=True)
class Calibration:
    """Text to run through the model, and how to use the measurements.

    Attributes:
        files: text, or rows; see ``text.windows``.
        tokens: largest number of tokens to read.
        window: tokens per sequence.
        init_rank: rank of a companion adapter that offsets part of the quantization error; None for no adapter.
        bits_budget: average bits per weight over the quantized matrices; bits beyond the plan's go where they save
            most. None for no upgrades.
        compensate: round columns one after the other, each compensating for the error of those before it, instead of
            each weight to the nearest level; takes more time, and memory quadratic in the number of a layer's inputs.
    """

    files: tuple[Path, ...]
    tokens: int = 8192
    window: int = 512
    init_rank: int | None = None
    bits_budget: float | None = None
    compensate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", as_paths(self.files, "files"))
        typed_fields(self)
        if not self.files:
            raise UsageError("calibration: no text given", hint="add --calibrate FILE")
        if self.window < 2 or self.tokens < 2:
            raise UsageError(
                f"calibration on {counted(self.tokens, 'token')} in windows of {self.window}: both must be at least 2"
            )
        if self.init_rank is not None and self.init_rank < 1:
            raise UsageError(f"init_rank: must be at least 1, found {self.init_rank}")
        if self.bits_budget is not None and not 4 < self.bits_budget < 16:
            raise UsageError(
                f"bits_budget: must be between 4 and 16, found {self.bits_budget}",
                hint="for example, --bits-budget 4.5",
            )

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        return asdict(self) | {"files": [file_sha256(file) for file in self.files]}


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        format: nf4, fp4 or int8; bitsandbytes loads the first two.
        block_size: weights sharing one constant; a power of two from 32 to 4096.
        double_quant: quantize the constants too.
        skip: shell patterns of module paths that stay in 16 bits.
        include_head: quantize the output layer too.
        moe: ``keep`` experts in 16 bits, or ``quantize`` them for adaptkit's own trainer.
        max_shard_bytes: largest size of a shard, unless a single tensor is larger.
        threads: number of pieces encoded at a time; one per processor if None. The result does not depend on it.
        calibration: choose constants and codes from the inputs of linear layers on a text; only for nf4.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()
    include_head: bool = False
    moe: str = "keep"
    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        typed_fields(self)
        object.__setattr__(self, "skip", as_texts(self.skip, "skip"))
        check_shard_size(self.max_shard_bytes)
        check_threads(self.threads)
        if self.moe not in MOE:
            raise UsageError(f"moe: must be one of {', '.join(MOE)}, found {self.moe!r}")
        if self.calibration is not None and self.format != "nf4":
            raise UsageError(
                f"calibration: needs format nf4, found {self.format}", hint="leave out --calibrate, or use --format nf4"
            )
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """How a weight is quantized."""
        return Encoding(self.format, self.block_size, self.double_quant)

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        values = {name: value for name, value in asdict(self).items() if name not in {"threads", "calibration"}}
        values["skip"] = sorted(set(self.skip))
        return values | ({"calibration": self.calibration.recorded()} if self.calibration else {})


@dataclass(frozen=True)
class Plan:
    """What happens to each tensor of a checkpoint."""

    checkpoint: Checkpoint
    selection: Selection
    tensors: dict[str, TensorPlan]
    max_shard_bytes: int

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Maps the name of each source tensor to the tensors that it becomes."""
        return {name: tensor.group() for name, tensor in self.tensors.items()}

    @cached_property
    def shards(self) -> Shards:
        """The output files with their groups."""
        return plan_shards(list(self.groups.values()), self.max_shard_bytes)

    def quantized(self) -> list[Choice]:
        """Return the choices of the tensors that are quantized."""
        return [choice for choice in self.selection.choices if not choice.kept_because]

    def outline(self) -> list[Any]:
        """Return what distinguishes this plan from others for the same checkpoint, as JSON."""
        return [[name, asdict(p.encoding) if p.encoding else None, p.transposed] for name, p in self.tensors.items()]

    def nbytes(self) -> int:
        """Return the size of all tensors of the output in bytes."""
        return sum(group.nbytes for group in self.groups.values())


def make_plan(checkpoint: Checkpoint, options: QuantizeOptions, roles: Roles) -> Plan:
    """Decide what happens to each tensor, and refuse what cannot be done.

    Args:
        checkpoint: the source.
        options: see ``QuantizeOptions``.
        roles: of its tensors.

    Raises:
        CheckpointError: the source is quantized already, or has nothing to quantize.
        UsageError: a pattern matches nothing, the head cannot be quantized, or there are no experts to quantize.
    """
    method = quantization_found(checkpoint)
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.root}: already quantized with {method}",
            hint=hint_for_plain(method, checkpoint.root, "quantize"),
        )
    if options.moe == "quantize" and not any(role.kind == "expert" for role in roles.of.values()):
        raise UsageError(f"{checkpoint.root}: no experts found to quantize", hint="leave out --moe quantize")
    selection = select(
        checkpoint,
        skip=options.skip,
        include_head=options.include_head,
        moe=options.moe,
        encoding=options.encoding,
        roles=roles,
    )
    _check_selection(checkpoint, selection, options)
    tensors = {
        choice.spec.name: TensorPlan(choice.spec, None if choice.kept_because else options.encoding, choice.transposed)
        for choice in selection.choices
    }
    plan = Plan(checkpoint, selection, tensors, options.max_shard_bytes)
    _check_names(checkpoint, plan.groups)
    return plan


WORTH_16_BITS = "worth 16 bits"
"""Reason for keeping a linear in 16 bits because the bits budget allows it."""


def with_encodings(plan: Plan, encodings: Mapping[str, Encoding | None]) -> Plan:
    """Return the plan with other encodings for some linears; None keeps a linear in 16 bits."""
    choices = tuple(
        replace(choice, kept_because=WORTH_16_BITS) if encodings.get(choice.spec.name, choice) is None else choice
        for choice in plan.selection.choices
    )
    tensors = {name: replace(t, encoding=encodings.get(name, t.encoding)) for name, t in plan.tensors.items()}
    return replace(plan, selection=replace(plan.selection, choices=choices), tensors=tensors)


def _check_selection(checkpoint: Checkpoint, selection: Selection, options: QuantizeOptions) -> None:
    for choice in selection.choices:
        if choice.spec.count == 0:
            raise CheckpointError(
                f"{checkpoint.root}: tensor {choice.spec.name!r} is empty ({list(choice.spec.shape)})",
                hint="remove it from the file, or download the checkpoint again",
            )
    for pattern in options.skip:
        if not matches_any(selection, pattern):
            example = next((choice for choice in selection.choices if choice.is_linear), selection.choices[0])
            hint = f"patterns match whole module paths, such as {example.module!r}"
            if matches_any(selection, f"*.{pattern}"):
                hint = f"patterns match whole module paths; write '*.{pattern}'"
            raise UsageError(f"--skip {pattern!r} matches no module", hint=hint)
    if all(choice.kept_because for choice in selection.choices):
        nothing = f"{checkpoint.root}: nothing to quantize"
        other = next((c.spec for c in selection.choices if c.kept_because == of_type(c.spec)), None)
        if other is not None:
            raise CheckpointError(
                f"{nothing}: {other.name} has dtype {other.dtype}, expected {', '.join(FLOATS)}",
                hint="save the model with model.to(torch.bfloat16) first"
                if other.dtype == "F64"
                else "quantize the original 16-bit checkpoint",
            )
        kept = next((choice for choice in selection.choices if choice.is_linear), None)
        if kept is None:
            raise CheckpointError(
                f"{nothing}: it has no linear layers of a kind that bitsandbytes quantizes",
                hint="train an adapter on it as it is, with --method lora",
            )
        raise CheckpointError(
            f"{nothing}: every weight stays as it is, such as {kept.spec.name} ({kept.kept_because})",
            hint="only weights of linear layers are quantized; check --skip and --moe",
        )


def _check_names(checkpoint: Checkpoint, groups: dict[str, Group]) -> None:
    """Refuse a source tensor whose name would be that of a quantized weight's part."""
    for group in groups.values():
        for spec in group.specs:
            if spec.name != group.source and spec.name in groups:
                raise CheckpointError(
                    f"{checkpoint.root}: tensor {spec.name!r} has the name of a part of {group.source!r} once that "
                    "is quantized",
                    hint=f"keep that weight in 16 bits with --skip, or remove {spec.name!r}",
                )
