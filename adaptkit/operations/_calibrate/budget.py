"""Spend extra bits on the linears where they help most: smaller blocks, or 16 bits.

The cost of quantizing a linear is the divergence that it is expected to cause, estimated from the linear's inputs and
gradients on calibration text. Linears are upgraded in the order of gain per byte, until the average number of bits is
reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from adaptkit.checkpoint.journal import SCRATCH_PREFIX, Output
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import write_file
from adaptkit.errors import UsageError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.calibration import nf4_error, weighted_nf4
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.sensitivity import StorageChoice, allocate, divergence_cost
from adaptkit.operations._calibrate.gradients import layer_gradients
from adaptkit.operations._quantize.plan import QuantizePlan, TensorPlan
from adaptkit.operations._quantize.report import WORTH_16_BITS, Upgrade
from adaptkit.operations._threads import map_in_threads

_NAME = f"{SCRATCH_PREFIX}budget.json"
SMALL_BLOCK = 32
"""The smallest block size that every loader of the format accepts."""


def spend(
    out: Output,
    checkpoint: Checkpoint,
    plan: QuantizePlan,
    tokens: Tensor,
    bits: float,
    threads: int,
    progress: Progress,
) -> tuple[QuantizePlan, list[Upgrade]]:
    """Decide which linears get more bits.

    Args:
        out: the folder being written; stores the decision for a resumed run.
        checkpoint: the source.
        plan: with every linear in the same format.
        tokens: (windows, window) int64.
        bits: average per weight over the quantized matrices, constants and headers included.
        threads: linears at a time.
        progress: called with steps done, each one batch through one layer.

    Returns:
        The plan within the budget, and its upgrades, in the order in which the bits were spent.

    Raises:
        UsageError: the budget is less than the size of the given plan.
        DiskError: there is no space for the layers' outputs, which are stored for the backward pass.
    """
    linears = {choice.spec.name: plan.tensors[choice.spec.name] for choice in plan.quantized()}
    budget = int(bits / 8 * sum(tensor.spec.count for tensor in linears.values()))
    least = sum(tensor.group().nbytes for tensor in linears.values())
    if budget < least:
        average = 8 * least / sum(tensor.spec.count for tensor in linears.values())
        raise UsageError(
            f"bits_budget: must be above {average:.3f}, the size without any upgrade; found {bits}",
            hint="raise --bits-budget, or leave it out",
        )
    if not out.finished(_NAME):
        ways = _ways(out, checkpoint, linears, tokens, threads, progress)
        # Linears that were not measured, since no token reached them or they lie before the layers, stay as planned.
        fixed = sum(tensor.group().nbytes for name, tensor in linears.items() if name not in ways)
        steps = [step._asdict() for step in allocate(ways, budget - fixed)]
        record = write_file(out.folder, _NAME, json.dumps(steps).encode())
        out.add(record, [], {_NAME: steps})
    chosen: dict[str, Encoding | None] = {}
    upgrades = []
    for step in out.notes[_NAME]:
        name = step["name"]
        encoding = chosen[name] = _encodings(linears[name])[step["choice"]]
        to = f"blocks of {encoding.block_size}" if encoding else "16 bits"
        upgrades.append(Upgrade(name.removesuffix(".weight"), to, step["extra_bytes"], step["gain"]))
    return _with_encodings(plan, chosen), upgrades


def _with_encodings(plan: QuantizePlan, encodings: Mapping[str, Encoding | None]) -> QuantizePlan:
    """Return the plan with other encodings for some linears; None keeps a linear in 16 bits."""
    choices = tuple(
        replace(choice, kept_because=WORTH_16_BITS) if encodings.get(choice.spec.name, choice) is None else choice
        for choice in plan.selection.choices
    )
    tensors = {name: replace(t, encoding=encodings.get(name, t.encoding)) for name, t in plan.tensors.items()}
    return replace(plan, selection=replace(plan.selection, choices=choices), tensors=tensors)


def _encodings(tensor: TensorPlan) -> list[Encoding | None]:
    """Return the encodings for a linear, the smallest first; None keeps it in 16 bits."""
    if tensor.encoding is None:
        raise ValueError(f"{tensor.spec.name} is not to be quantized")
    smaller = [replace(tensor.encoding, block_size=SMALL_BLOCK)] if tensor.encoding.block_size > SMALL_BLOCK else []
    return [tensor.encoding, *smaller, None]


def _ways(
    out: Output,
    checkpoint: Checkpoint,
    linears: Mapping[str, TensorPlan],
    tokens: Tensor,
    threads: int,
    progress: Progress,
) -> dict[str, list[StorageChoice]]:
    importance: dict[str, Array] = {}
    gradients: dict[str, Array] = {}
    with out.scratch_folder() as folder:
        for layer in layer_gradients(checkpoint, tokens, folder, reserve=out.require_space, progress=progress):
            importance |= {f"{module}.weight": moments.mean_square for module, moments in layer.inputs.items()}
            gradients |= {f"{module}.weight": square for module, square in layer.gradient_square.items()}
    reached = [name for name in linears if name in importance and name in gradients]

    def ways(name: str) -> list[StorageChoice]:
        tensor = linears[name]
        weight = tensor.as_linear(checkpoint.read(name))
        found = []
        for encoding in _encodings(tensor):
            nbytes = replace(tensor, encoding=encoding).group().nbytes
            cost = 0.0
            if encoding is not None:
                lost = _lost(weight, importance[name], encoding)
                cost = divergence_cost(lost, importance[name], gradients[name])
            found.append(StorageChoice(nbytes, cost))
        return found

    return dict(zip(reached, map_in_threads(ways, reached, threads), strict=True))


def _lost(weight: Array, importance: Array, encoding: Encoding) -> Array:
    codes, constants = weighted_nf4(weight, importance, encoding.block_size, encoding.double_quant)
    return nf4_error(weight, codes, constants, encoding.block_size)
