"""Quantize the linears of a checkpoint by their measured inputs, layer by layer, before the shards are written.

    adaptkit-scratch-calibrated-<n>.safetensors    the n-th layer's linears: their parts as the shards will have them,
                                                   and <weight>.lora_A, <weight>.lora_B of the companion adapter

The scratch files are no larger than the outputs, and are removed when these are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.journal import SCRATCH_PREFIX, Output
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.checkpoint.writer import TensorWriter, write_file
from adaptkit.errors import IntegrityError
from adaptkit.models.model_lock import model_lock
from adaptkit.numerics.compensation import companion_adapter
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.rounding import Compensation, LinearInputs
from adaptkit.operations._calibrate.layerwise import InputMoments, layer_moments
from adaptkit.operations._quantize.plan import QuantizedPiece, TensorPlan
from adaptkit.operations._shards import read_jobs
from adaptkit.operations._threads import in_order, map_in_threads

_DONE_NAME = f"{SCRATCH_PREFIX}calibrated"
"""File that is written after all layers; it contains the number of scratch files with layers."""


@dataclass(frozen=True, kw_only=True)
class CalibratedTensor(TensorPlan):
    """A linear that is quantized already.

    Attributes:
        scratch: files that contain its parts.
        note: result of ``write``.
    """

    scratch: TensorFiles
    note: Mapping[str, Any]

    def jobs(self, checkpoint: Checkpoint) -> Sequence[Callable[[], QuantizedPiece]]:
        """Read the parts; see ``TensorPlan``."""
        return [partial(_read, self.scratch, spec.name) for spec in self.group().specs]

    def write(self, pieces: Iterator[QuantizedPiece], writer: TensorWriter) -> dict[str, Any]:
        """Write the parts; see ``TensorPlan``."""
        for spec, piece in zip(self.group().specs, pieces, strict=True):
            writer.write(spec.name, piece.raw)
        return dict(self.note)


@model_lock()
def encode_linears(
    out: Output,
    checkpoint: Checkpoint,
    plans: Mapping[str, TensorPlan],
    tokens: Tensor,
    *,
    compensate: bool,
    init_rank: int | None,
    threads: int,
    progress: Progress,
) -> dict[str, CalibratedTensor]:
    """Quantize all linears that the tokens reach, or use the results of an earlier run.

    Args:
        out: the folder being written.
        checkpoint: the source.
        plans: of every tensor, by name.
        tokens: (windows, window) int64.
        compensate: round columns one after the other, each compensating for those before it; needs E[x xᵀ].
        init_rank: of the companion adapter; None for none.
        threads: linears at a time.
        progress: called with steps done, each one batch through one layer.

    Returns:
        Linears by the name of their weight. One that no token reached, such as an expert, is absent.

    Raises:
        NonFiniteError: a weight or an activation is NaN or infinite.
        UsageError: transformers cannot run this checkpoint.
    """
    found_before = is_calibrated(out)
    if not found_before:
        layers = 0
        for layer in layer_moments(checkpoint, tokens, second_moments=compensate, progress=progress):
            wanted = {
                plans[f"{module}.weight"]: moments
                for module, moments in layer.items()
                if f"{module}.weight" in plans and plans[f"{module}.weight"].encoding is not None
            }
            if wanted:
                _write_layer(out, checkpoint, layers, wanted, init_rank, threads)
                layers += 1
        out.add(write_file(out.folder, _DONE_NAME, str(layers).encode()), [])
    count = int((out.folder / _DONE_NAME).read_text())
    names = [_layer_name(number) for number in range(count)]
    if found_before and not out.finished(*names):
        raise IntegrityError(
            f"{out.folder}: calibrated layers are missing or changed", hint="delete that folder to start over"
        )
    scratch = TensorFiles(out.folder, names)
    notes = {name: note for found in names for name, note in out.notes[found].items()}
    return {
        name: CalibratedTensor(
            plans[name].spec, plans[name].encoding, plans[name].transposed, scratch=scratch, note=note
        )
        for name, note in notes.items()
    }


def check_finite(checkpoint: Checkpoint, plans: Iterable[TensorPlan], threads: int) -> None:
    """Read all tensors of a checkpoint once, and look for NaN and infinity.

    Raises:
        NonFiniteError: a weight is NaN or infinite; names tensor and index.
    """
    jobs = (job for plan in plans for job in read_jobs(checkpoint, plan.spec, plan.check))
    for _ in in_order(lambda job: job(), jobs, threads):
        pass


def is_calibrated(out: Output) -> bool:
    """Whether all linears that the tokens reach are quantized already, by this run or an earlier one."""
    return out.finished(_DONE_NAME)


def scratch_bytes(plans: Iterable[TensorPlan], init_rank: int | None) -> int:
    """Return the size of the scratch files, which exist in addition to the output until it is published."""
    linears = [plan for plan in plans if plan.encoding is not None]
    terms = [(min(init_rank, *plan.spec.shape[-2:]), sum(plan.spec.shape[-2:])) for plan in linears if init_rank]
    return sum(plan.group().nbytes for plan in linears) + sum(4 * rank * features for rank, features in terms)


def companion_modules(linears: Mapping[str, CalibratedTensor]) -> dict[str, LowRank]:
    """Return the companion adapter's matrices by module."""
    found = {}
    for name, plan in linears.items():
        if f"{name}.lora_A" in plan.scratch.tensors:
            a, b = plan.scratch.read(f"{name}.lora_A"), plan.scratch.read(f"{name}.lora_B")
            found[name.removesuffix(".weight")] = LowRank(a, b, 1.0)
    return found


def _write_layer(
    out: Output,
    checkpoint: Checkpoint,
    number: int,
    wanted: Mapping[TensorPlan, InputMoments],
    init_rank: int | None,
    threads: int,
) -> None:
    products = {id(m): m.second_moment for m in wanted.values() if m.second_moment is not None}
    factors = dict(zip(products, map_in_threads(Compensation.of, products.values(), threads), strict=True))

    def make(item: tuple[TensorPlan, InputMoments]) -> tuple[dict[str, Array], dict[str, Any]]:
        plan, moments = item
        return _make(checkpoint, plan, moments, factors.get(id(moments)), init_rank)

    made = dict(zip((plan.spec.name for plan in wanted), map_in_threads(make, wanted.items(), threads), strict=True))
    tensors = {name: tensor for parts, _ in made.values() for name, tensor in parts.items()}
    notes = {_layer_name(number): {name: note for name, (_, note) in made.items()}}
    out.write_tensors(_layer_name(number), tensors, listed=False, notes=notes)


def _make(
    checkpoint: Checkpoint,
    plan: TensorPlan,
    moments: InputMoments,
    compensation: Compensation | None,
    init_rank: int | None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Quantize one linear, and measure the error."""
    name, encoding = plan.spec.name, plan.encoding
    if encoding is None:
        raise ValueError(f"{name} is not to be quantized")
    raw = checkpoint.read(name)
    plan.check(raw.reshape(-1), 0)
    weight = plan.as_linear(raw)
    inputs = LinearInputs(moments.mean_square, compensation)
    tensors, decoded = encoding.codec.calibrated(weight, plan.linear, inputs, encoding, plan.top)
    lost = weight.astype(np.float32) - decoded
    squares = [np.square(values.astype(np.float64)).sum(axis=0) for values in (lost, weight)]
    note = {
        "fingerprint": fingerprint(raw),
        "error": [float(per_input.sum()) for per_input in squares],
        "weighted_error": [float(per_input @ moments.mean_square.astype(np.float64)) for per_input in squares],
    }
    if init_rank is not None:
        # The full E[x xᵀ] measured no better here than its diagonal, and needs another decomposition.
        lora_a, lora_b = companion_adapter(lost, moments.mean_square, min(init_rank, *lost.shape))
        tensors |= {f"{name}.lora_A": lora_a, f"{name}.lora_B": lora_b}
    return tensors, note


def _layer_name(number: int) -> str:
    return f"{SCRATCH_PREFIX}calibrated-{number}.safetensors"


def _read(scratch: TensorFiles, name: str) -> QuantizedPiece:
    return QuantizedPiece(scratch.read(name))
