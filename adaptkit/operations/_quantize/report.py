"""What quantizing did to a checkpoint and to each of its tensors."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.operations._quantize.plan import WORTH_16_BITS, Plan
from adaptkit.operations._quantize.selection import Choice


@dataclass(frozen=True)
class Upgrade:
    """More bits for one linear.

    Attributes:
        module: dotted path.
        to: what it became: ``blocks of 32`` or ``16 bits``.
        extra_bytes: that this takes.
        gain: of expected divergence, in nats a token.
    """

    module: str
    to: str
    extra_bytes: int
    gain: float


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: in the source.
        shape: in the source.
        format: of its codes; empty if it stayed as it is.
        bits: per weight, constants and headers included.
        bytes_before: in the source.
        bytes_after: in the output.
        relative_error: ‖W − Q‖ / ‖W‖; None if it stayed, or before the work is done.
        weighted_error: the same with every input weighted by its mean square; None without calibration.
        kept_because: why it stayed.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    weighted_error: float | None = None
    kept_because: str = ""


@dataclass(frozen=True)
class QuantizeReport:
    """What was done, or would be.

    Attributes:
        output: folder.
        quantized: number of tensors.
        quantized_parameters: in them.
        parameters: in the whole checkpoint.
        kept: reason -> number of tensors left as they are.
        read_from: how it was found out which tensors are linear.
        bytes_before: of tensors.
        bytes_after: of tensors.
        bits_per_parameter: of the quantized tensors, constants and headers included, and of those that a budget left
            in 16 bits.
        relative_error: ‖W − Q‖ / ‖W‖ over all of them; None before the work is done.
        weighted_error: the same with every input weighted by its mean square; None without calibration.
        calibrated: number of tensors whose inputs were seen.
        shards: number of files with tensors.
        tensors: one each.
        upgrades: linears that a budget gave more bits, in the order in which it was spent.
        companion: folder of the companion adapter, if one was made.
        part: the share that was written, as number and total; None for all.
        tensors_root: binds the result's tensors; None for a dry run or a part.
        manifest_sha256: None for a dry run or a part.
    """

    output: str
    quantized: int
    quantized_parameters: int
    parameters: int
    kept: dict[str, int]
    read_from: str
    bytes_before: int
    bytes_after: int
    bits_per_parameter: float
    relative_error: float | None
    weighted_error: float | None
    calibrated: int
    shards: int
    tensors: tuple[TensorReport, ...]
    upgrades: tuple[Upgrade, ...] = ()
    companion: str | None = None
    part: tuple[int, int] | None = None
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def make_report(output: Path, plan: Plan, notes: dict[str, Any], upgrades: Sequence[Upgrade] = ()) -> QuantizeReport:
    """Put together what the plan says and what was learnt while writing.

    Args:
        output: folder.
        plan: the plan.
        notes: of ``TensorPlan.assemble``, by tensor; none for what is not written.
        upgrades: what a budget gave more bits.
    """
    choices = plan.selection.choices
    encoded = [choice.spec for choice in plan.quantized()]
    parameters = sum(spec.count for spec in encoded)
    found = [notes[spec.name] for spec in encoded if spec.name in notes]
    weighted = [note["weighted_error"] for note in found if "weighted_error" in note]
    return QuantizeReport(
        output=str(output),
        quantized=len(encoded),
        quantized_parameters=parameters,
        parameters=sum(choice.spec.count for choice in choices),
        kept=dict(sorted(Counter(c.kept_because for c in choices if c.kept_because).items())),
        read_from=plan.selection.read_from,
        bytes_before=sum(choice.spec.nbytes for choice in choices),
        bytes_after=plan.nbytes(),
        bits_per_parameter=_average_bits(plan),
        relative_error=_total([note["error"] for note in found]),
        weighted_error=_total(weighted),
        calibrated=len(weighted),
        shards=len(plan.shards),
        upgrades=tuple(upgrades),
        tensors=tuple(_tensor_report(choice, plan, notes.get(choice.spec.name, {})) for choice in choices),
    )


def _tensor_report(choice: Choice, plan: Plan, note: dict[str, Any]) -> TensorReport:
    spec, after = choice.spec, plan.groups[choice.spec.name].nbytes
    encoding = plan.tensors[spec.name].encoding
    return TensorReport(
        name=spec.name,
        shape=spec.shape,
        format=encoding.format if encoding else "",
        bits=8 * after / spec.count,
        bytes_before=spec.nbytes,
        bytes_after=after,
        relative_error=_relative(note["error"]) if "error" in note else None,
        weighted_error=_relative(note["weighted_error"]) if "weighted_error" in note else None,
        kept_because=choice.kept_because,
    )


def _average_bits(plan: Plan) -> float:
    specs = [c.spec for c in plan.selection.choices if c.kept_because in ("", WORTH_16_BITS)]
    return 8 * sum(plan.groups[spec.name].nbytes for spec in specs) / sum(spec.count for spec in specs)


def _total(errors: Sequence[Sequence[float]]) -> float | None:
    return _relative([sum(column) for column in zip(*errors, strict=True)]) if errors else None


def _relative(error: Sequence[float]) -> float | None:
    """‖W − Q‖ / ‖W‖ from the two sums of squares; None if a square was too large for float32."""
    if not all(map(math.isfinite, error)):
        return None
    return float((error[0] / error[1]) ** 0.5) if error[1] else 0.0
