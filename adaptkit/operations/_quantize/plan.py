"""What happens to each tensor of a checkpoint, decided before any weight is read, and done piece by piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from adaptkit.checkpoint.hashing import bytes_of
from adaptkit.checkpoint.quantization import hint_for_plain, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import CheckpointError, NonFiniteError, UsageError
from adaptkit.formats._format import EncodedPiece, Encoding
from adaptkit.models.kinds import fused_name
from adaptkit.models.matching import require_matches
from adaptkit.numerics import finite
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import FLOATS, TensorSpec
from adaptkit.operations._quantize.selection import Selection, TensorChoice, of_type, select
from adaptkit.operations._roles import find_roles
from adaptkit.operations._shards import Piece, Shards, TensorGroup, cut_pieces, plan_shards, read_jobs
from adaptkit.operations.options import QuantizeOptions


@dataclass(frozen=True)
class QuantizedPiece:
    """A piece of a tensor: its elements in the file, and the quantized ones; None if it is written as it is."""

    raw: Array
    packed: EncodedPiece | None = None


class LargestMagnitude:
    """The largest magnitude in some tensors, which are read when it is first asked for."""

    def __init__(self, checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> None:
        self._checkpoint, self._specs, self._lock = checkpoint, specs, Lock()

    @property
    def value(self) -> float:
        """The magnitude; those that are NaN do not count."""
        with self._lock:
            return self._value

    @cached_property
    def _value(self) -> float:
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        largest = [0.0]
        for spec in self._specs:
            for piece in cut_pieces(spec, unit=self._checkpoint.unit(spec.name)):
                values = self._checkpoint.read_flat(spec.name, piece.start, piece.count)
                low, high = cpu.group_extremes(values.reshape(1, -1), values.size)
                largest += [-float(low[0, 0]), float(high[0, 0])]
        return max(value for value in largest if value == value)


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is written.

    Attributes:
        spec: in the source.
        encoding: how it is quantized; None if it is not.
        transposed: whether the source stores it as (in, out).
        largest: the magnitude that the encoding depends on; None if it does not.
    """

    spec: TensorSpec
    encoding: Encoding | None
    transposed: bool = False
    largest: LargestMagnitude | None = None

    @property
    def linear(self) -> TensorSpec:
        """The spec of the weight as (out, in)."""
        return TensorSpec(
            self.spec.name, self.spec.dtype, self.spec.shape[::-1] if self.transposed else self.spec.shape
        )

    @property
    def top(self) -> float:
        """The magnitude that the encoding depends on; 0 if it does not."""
        return self.largest.value if self.largest else 0.0

    def group(self) -> TensorGroup:
        """Return the tensors that it becomes."""
        specs = [self.spec] if self.encoding is None else self.encoding.codec.specs(self.linear, self.encoding)
        return TensorGroup(self.spec.name, tuple(specs))

    def as_linear(self, raw: Array) -> Array:
        """Convert the source's tensor to the weight as (out, in)."""
        return np.ascontiguousarray(raw.T) if self.transposed else raw

    def jobs(self, checkpoint: Checkpoint) -> Sequence[Callable[[], QuantizedPiece]]:
        """Return the jobs that encode the tensor, in order.

        Raises:
            NonFiniteError: by a job: a weight is NaN or infinite; names its index.
        """
        if self.encoding is None:
            return [partial(_as_it_is, job) for job in read_jobs(checkpoint, self.spec, self.check)]
        if self.transposed:  # only in the GPT-2 family, whose matrices are small
            return [partial(self._encode, self.encoding, checkpoint, None)]
        unit = self.encoding.codec.unit(self.linear, self.encoding)
        pieces = cut_pieces(self.spec, unit, checkpoint.unit(self.spec.name))
        return [partial(self._encode, self.encoding, checkpoint, piece) for piece in pieces]

    def write(self, pieces: Iterator[QuantizedPiece], writer: TensorWriter) -> dict[str, Any]:
        """Write the pieces that the jobs returned.

        Returns:
            fingerprint: of the source tensor.
            error: Σ(w − q)² and Σw² over the weights, if it is quantized.
        """
        if self.encoding is None:
            for piece in pieces:
                writer.write(self.spec.name, piece.raw)
            return {"fingerprint": writer.tensors[-1].xxh3_128}
        digest, codes = xxhash.xxh3_128(), self.group().specs[0].name
        gathering = self.encoding.codec.gather(self.linear, self.encoding, self.top)
        for piece in pieces:
            digest.update(bytes_of(piece.raw))
            if piece.packed is not None:
                writer.write(codes, piece.packed.codes)
                gathering.add(piece.packed)
        parts, error = gathering.finish()
        for name, part in parts.items():
            writer.write(name, part)
        return {"fingerprint": digest.hexdigest(), "error": error}

    def _encode(self, encoding: Encoding, checkpoint: Checkpoint, piece: Piece | None) -> QuantizedPiece:
        if piece is None:
            raw = checkpoint.read(self.spec.name)
            values, start = self.as_linear(raw), 0
        else:
            raw = values = checkpoint.read_flat(self.spec.name, piece.start, piece.count)
            start = piece.start
        try:
            return QuantizedPiece(raw, encoding.codec.encode(values, self.linear, encoding, self.top, measure=True))
        except NonFiniteError:
            self.check(raw.reshape(-1), start)
            raise

    def check(self, values: Array, start: int) -> None:
        """Refuse NaN and infinity, with the index in the file."""
        finite.check_finite(values, start, self.spec.shape, self.spec.name)


def _as_it_is(job: Callable[[], Array]) -> QuantizedPiece:
    return QuantizedPiece(job())


@dataclass(frozen=True)
class QuantizePlan:
    """What happens to each tensor of a checkpoint."""

    checkpoint: Checkpoint
    options: QuantizeOptions
    selection: Selection
    tensors: dict[str, TensorPlan]

    @cached_property
    def groups(self) -> dict[str, TensorGroup]:
        """Maps the name of each source tensor to the tensors that it becomes."""
        return {name: tensor.group() for name, tensor in self.tensors.items()}

    @cached_property
    def shards(self) -> Shards:
        """The output files with their groups."""
        return plan_shards(list(self.groups.values()), self.options.max_shard_bytes)

    def quantized(self) -> list[TensorChoice]:
        """Return the choices of the tensors that are quantized."""
        return [choice for choice in self.selection.choices if not choice.kept_because]

    def outline(self) -> list[Any]:
        """Return what distinguishes this plan from others for the same checkpoint, as JSON."""
        return [[name, asdict(p.encoding) if p.encoding else None, p.transposed] for name, p in self.tensors.items()]

    def nbytes(self) -> int:
        """Return the size of all tensors of the output in bytes."""
        return sum(group.nbytes for group in self.groups.values())


def make_plan(checkpoint: Checkpoint, options: QuantizeOptions) -> QuantizePlan:
    """Decide what happens to each tensor, and refuse what cannot be done.

    Args:
        checkpoint: the source.
        options: see ``QuantizeOptions``.

    Raises:
        CheckpointError: the source is quantized already, or has nothing to quantize.
        UsageError: ``config.json`` describes a model that cannot be built, a pattern matches nothing, the head cannot
            be quantized, or there are no experts to quantize.
    """
    method = quantization_found(checkpoint)
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.root}: already quantized with {method}",
            hint=hint_for_plain(method, checkpoint.root, "quantize"),
        )
    roles = find_roles(checkpoint)
    if options.moe == "quantize" and not any(role.kind == "expert" for role in roles.of.values()):
        raise UsageError(f"{checkpoint.root}: no experts found to quantize", hint="leave out --moe quantize")
    selection = select(checkpoint, roles, options)
    _check_selection(checkpoint, selection, options)
    encoding, largest = options.encoding, _largest_of(checkpoint, selection, options.encoding)
    tensors = {
        choice.spec.name: TensorPlan(choice.spec, encoding, choice.transposed, largest.get(choice.spec.name))
        if not choice.kept_because
        else TensorPlan(choice.spec, None, choice.transposed)
        for choice in selection.choices
    }
    plan = QuantizePlan(checkpoint, options, selection, tensors)
    _check_names(checkpoint, plan.groups)
    return plan


def _check_selection(checkpoint: Checkpoint, selection: Selection, options: QuantizeOptions) -> None:
    for choice in selection.choices:
        if choice.spec.count == 0:
            raise CheckpointError(
                f"{checkpoint.root}: tensor {choice.spec.name!r} is empty ({list(choice.spec.shape)})",
                hint="remove it from the file, or download the checkpoint again",
            )
    for choice in selection.choices:
        shape = choice.spec.shape[::-1] if choice.transposed else choice.spec.shape
        refusal = "" if choice.kept_because else options.encoding.codec.refusal(shape, options.encoding)
        if refusal:
            raise UsageError(
                f"{choice.spec.name}: {refusal}, as format {options.format} needs",
                hint=f"keep it in 16 bits with --skip {choice.module}, or choose another --block-size or --format",
            )
    example = next((choice for choice in selection.choices if choice.is_linear), selection.choices[0])
    modules = [(choice.module, *choice.paths) for choice in selection.choices]
    require_matches("--skip", options.skip, modules, example.module)
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


def _largest_of(checkpoint: Checkpoint, selection: Selection, encoding: Encoding) -> dict[str, LargestMagnitude]:
    """Return what each weight's encoding depends on, by name: those that servers fuse share it."""
    if not encoding.codec.shares_top:
        return {}
    fused = defaultdict[str, list[TensorSpec]](list)
    for choice in selection.choices:
        if not choice.kept_because:
            fused[fused_name(choice.module)].append(choice.spec)
    found = [(specs, LargestMagnitude(checkpoint, specs)) for specs in fused.values()]
    return {spec.name: largest for specs, largest in found for spec in specs}


def _check_names(checkpoint: Checkpoint, groups: dict[str, TensorGroup]) -> None:
    """Refuse a source tensor whose name would be that of a quantized weight's part."""
    for group in groups.values():
        for spec in group.specs:
            if spec.name != group.source and spec.name in groups:
                raise CheckpointError(
                    f"{checkpoint.root}: tensor {spec.name!r} has the name of a part of {group.source!r} once that "
                    "is quantized",
                    hint=f"keep that weight in 16 bits with --skip, or remove {spec.name!r}",
                )
