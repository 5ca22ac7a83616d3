"""The report of quantizing a checkpoint and each of its tensors."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.manifest import Manifest
from adaptkit.operations._quantize.plan import QuantizePlan
from adaptkit.operations._quantize.selection import TensorChoice

WORTH_16_BITS = "worth 16 bits"
"""Reason for keeping a linear in 16 bits because the bits budget allows it."""


@dataclass(frozen=True)
class Upgrade:
    """A linear that a bits budget gave more bits.

    Attributes:
        module: dotted path.
        to: how it is stored: ``blocks of 32`` or ``16 bits``.
        extra_bytes: increase in size.
        gain: reduction of the expected divergence, in nats per token.
    """

    module: str
    to: str
    extra_bytes: int
    gain: float


@dataclass(frozen=True)
class TensorReport:
    """The result for one tensor.

    Attributes:
        name: in the source.
        shape: in the source.
        format: of its codes; empty if it is not quantized.
        bits: per weight, constants and headers included.
        bytes_before: size in the source.
        bytes_after: size in the output.
        relative_error: ‖W − Q‖ / ‖W‖; None if it is not quantized, or in a dry run.
        weighted_error: the same with every input weighted by its mean square; None without calibration.
        kept_because: why it is not quantized; empty if it is.
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
    """What was done, or would be in a dry run.

    Attributes:
        output: folder.
        quantized: number of quantized tensors.
        quantized_parameters: number of parameters in them.
        parameters: number of parameters in the whole checkpoint.
        kept: reason -> number of tensors that are not quantized.
        read_from: phrase that says how the linear layers were determined.
        bytes_before: size of all tensors in the source.
        bytes_after: size of all tensors in the output.
        bits_per_parameter: average over the quantized tensors, constants and headers included, and those that a bits
            budget kept in 16 bits.
        relative_error: ‖W − Q‖ / ‖W‖ over all quantized tensors; None in a dry run.
        weighted_error: the same with every input weighted by its mean square; None without calibration.
        calibrated: number of tensors whose inputs were measured.
        shards: number of files with tensors.
        tensors: one per tensor.
        upgrades: linears that a bits budget gave more bits, in the order in which it was spent.
        companion: folder of the companion adapter, if one was made.
        decoded_from: method in which the source was released, whose weights were decoded to bfloat16; None if it is
            plain.
        input_scales: number of tensors of the source left out: scales of the inputs of products in 8 bits.
        tensors_root: hash of the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
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
    tensors: tuple[TensorReport, ...] = field(repr=False)
    upgrades: tuple[Upgrade, ...] = field(default=(), repr=False)
    companion: str | None = None
    decoded_from: str | None = None
    input_scales: int = 0
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def make_report(
    output: Path, plan: QuantizePlan, notes: Mapping[str, Any] = MappingProxyType({}), manifest: Manifest | None = None
) -> QuantizeReport:
    """Combine the plan and the measurements made while writing.

    Args:
        output: folder.
        plan: the plan.
        notes: maps tensor name to the result of ``TensorPlan.write``; empty for a dry run.
        manifest: of the output; None for a dry run.
    """
    choices = plan.selection.choices
    encoded = [choice.spec for choice in plan.quantized()]
    parameters = sum(spec.count for spec in encoded)
    found = [notes[spec.name] for spec in encoded if spec.name in notes]
    weighted = [note["weighted_error"] for note in found if "weighted_error" in note]
    release = plan.checkpoint if isinstance(plan.checkpoint, DecodedCheckpoint) else None
    return QuantizeReport(
        output=str(output),
        quantized=len(encoded),
        quantized_parameters=parameters,
        parameters=sum(choice.spec.count for choice in choices),
        kept=dict(sorted(Counter(c.kept_because for c in choices if c.kept_because).items())),
        read_from=plan.selection.read_from,
        bytes_before=sum(map(plan.checkpoint.stored_bytes, plan.tensors)),
        bytes_after=plan.nbytes(),
        bits_per_parameter=_average_bits(plan),
        relative_error=_total([note["error"] for note in found]),
        weighted_error=_total(weighted),
        calibrated=len(weighted),
        shards=len(plan.shards),
        decoded_from=release.method if release else None,
        input_scales=release.input_scales if release else 0,
        tensors=tuple(_tensor_report(choice, plan, notes.get(choice.spec.name, {})) for choice in choices),
        tensors_root=manifest.tensors_root if manifest else None,
        manifest_sha256=manifest.sha256 if manifest else None,
    )


def _tensor_report(choice: TensorChoice, plan: QuantizePlan, note: dict[str, Any]) -> TensorReport:
    spec, after = choice.spec, plan.groups[choice.spec.name].nbytes
    encoding = plan.tensors[spec.name].encoding
    return TensorReport(
        name=spec.name,
        shape=spec.shape,
        format=encoding.format if encoding else "",
        bits=8 * after / spec.count,
        bytes_before=plan.checkpoint.stored_bytes(spec.name),
        bytes_after=after,
        relative_error=_relative(note["error"]) if "error" in note else None,
        weighted_error=_relative(note["weighted_error"]) if "weighted_error" in note else None,
        kept_because=choice.kept_because,
    )


def _average_bits(plan: QuantizePlan) -> float:
    specs = [c.spec for c in plan.selection.choices if c.kept_because in ("", WORTH_16_BITS)]
    return 8 * sum(plan.groups[spec.name].nbytes for spec in specs) / sum(spec.count for spec in specs)


def _total(errors: Sequence[Sequence[float]]) -> float | None:
    return _relative([sum(column) for column in zip(*errors, strict=True)]) if errors else None


def _relative(error: Sequence[float]) -> float | None:
    """Return ‖W − Q‖ / ‖W‖ from the two sums of squares; None if a sum is not finite."""
    if not all(map(math.isfinite, error)):
        return None
    return float((error[0] / error[1]) ** 0.5) if error[1] else 0.0
