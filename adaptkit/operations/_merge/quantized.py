"""Merge the 16-bit weights and quantize the result in one run, and measure how much of the change 4 bits keep."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Parent, TensorRecord, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint, Located
from adaptkit.formats._find import read_weight
from adaptkit.formats._format import Encoding
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.base import check_fingerprint, merge_parents
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths, jobs_of, read_rows
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.report import MergeReport, TensorChange, change_of
from adaptkit.operations._quantize.plan import make_plan
from adaptkit.operations._quantize.writing import make_manifest, source_records, write_checkpoint
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._threads import fingerprints, map_in_threads, thread_count
from adaptkit.operations.options import QuantizeOptions
from adaptkit.wording import counted


def merge_quantized(merging: Merging, output: Path, force: bool, progress: Progress) -> MergeReport:
    """Quantize the merged model without writing its 16-bit weights.

    ``progress`` is called with bytes of the base read for fingerprints, then with bytes written.

    Raises:
        BaseMismatchError: the base is not what the adapters were trained on.
        IntegrityError: the base or an adapter changed meanwhile, or the base does not match its manifest.
    """
    base, checkpoint = merging.base, merging.checkpoint
    state, threads = checkpoint.state(), thread_count(merging.options.threads)
    digests = fingerprints(checkpoint, threads, progress)
    for name, digest in digests.items():
        check_fingerprint(base, name, digest)
    records = [TensorRecord.of(at.spec, digests[name]) for name, at in checkpoint.tensors.items()]
    parents = merge_parents(base, merging.adapters, merging.weights, records)
    view = _MergedView(checkpoint, merging.edits, merging.side.contents, threads)
    options = QuantizeOptions(merging.options.format, threads=merging.options.threads)
    plan, recorded = make_plan(view, options), options.recorded()
    key = [checkpoint.outline(), merging.identity(), recorded, plan.outline()]
    with Output(output, key, force, inputs=[checkpoint]) as out:
        out.require_space(plan.nbytes())
        write_checkpoint(out, plan, progress)
        checkpoint.require_state(state)
        merging.require_adapters()
        merged = Parent("merged", "merged", tensors_root(source_records(out, plan)))
        operation = {"name": "merge", "options": merging.recorded | {"quantize": recorded}}
        manifest = make_manifest(out, plan, operation, (merged, *parents))
        out.publish(manifest)
    made = Checkpoint(output)
    stored = {choice.spec.name for choice in plan.quantized()}
    changes = [
        _quantized_change(view, made, name, options.encoding, threads) if name in stored else _plain_change(view, name)
        for name in view.folds
    ]
    left = sorted(set(view.folds) - stored)
    notes = [f"{counted(len(left), 'changed tensor', 'stay')} in 16 bits, such as {left[0]}"] if left else []
    return merging.final_report(output, manifest, changes, 0.0, *notes)


class _MergedView(Checkpoint):
    """A merged model without files: its weights are computed from the base's when they are read.

    Args:
        base: unquantized checkpoint.
        edits: edits that do not add, remove or resize tensors.
        contents: small files of the result, by name; but ``config.json`` is the base's.
        threads: number of runs of rows processed at a time to compute DoRA's norms.
    """

    def __init__(self, base: Checkpoint, edits: Edits, contents: Mapping[str, bytes], threads: int) -> None:
        self.base, self.root = base, base.root
        self.headers, self.tensors, self._contents = base.headers, base.tensors, contents
        self.folds = {name: Fold(edit, find_lengths(base, edit, threads)) for name, edit in edits.of.items()}

    def side_contents(self) -> dict[str, bytes]:
        return {name: content for name, content in self._contents.items() if name != CONFIG_NAME}

    def _read(self, located: Located, offset: int, size: int) -> Array:
        fold = self.folds.get(located.spec.name)
        if fold is None:
            return self.base._read(located, offset, size)
        itemsize, columns, panel = ITEM_BYTES[located.spec.dtype], fold.edit.matrix[1], fold.edit.panel_rows
        first, last = offset // itemsize, (offset + size) // itemsize
        start, stop = first // columns, -(-last // columns)
        bounds = [start, *range((start // panel + 1) * panel, stop, panel), stop] if start < stop else []
        parts = [Rows(one, other - one) for one, other in pairwise(bounds)]
        runs = [fold.apply(self.base, rows, False).merged.weight.reshape(-1) for rows in parts]
        flat = np.concatenate(runs) if runs else np.empty(0, np.uint8)
        return flat[first - start * columns : last - start * columns].view(np.uint8)


def _quantized_change(
    view: _MergedView, output: Checkpoint, name: str, encoding: Encoding, threads: int
) -> TensorChange:
    """Measure how much of the change of a weight is left in ``output``; the result does not depend on ``threads``.

    Returns:
        ``effect`` is ⟨Q(W + Δ) - Q(W), Δ⟩ / ⟨Δ, Δ⟩, ``moved`` the share of elements in which Q(W + Δ) and Q(W) differ.
        Q(W) is computed without double quantization, whose error does not depend on Δ.
    """
    fold, flip = view.folds[name], stores_transposed(view.base, name)
    stored = read_weight(output, name)
    height, columns = fold.edit.matrix

    def measured(rows: Rows) -> list[float]:
        held = read_rows(view.base, name, rows)
        linear = np.ascontiguousarray(held.T) if flip else held
        after = stored.decode(output, rows.start * columns, held.size, np.dtype(np.float32)).reshape(linear.shape)
        difference = (after - encoding.codec.round_trip(linear, encoding)).astype(np.float64)
        delta = fold.exact_change(held, rows)
        return [
            float((difference != 0).sum()),
            float(np.square(delta).sum()),
            float(np.square(held.astype(np.float64)).sum()),
            float(((difference.T if flip else difference) * delta).sum()),
        ]

    aligned = not flip and columns % encoding.block_size == 0
    total = np.zeros(4)
    for sums in map_in_threads(measured, fold.pieces() if aligned else [Rows(0, height)], threads):
        total += sums
    return change_of(name, fold.edit.spec.count, total.tolist())


def _plain_change(view: _MergedView, name: str) -> TensorChange:
    """Return the change of a weight that is not quantized."""
    fold, total = view.folds[name], np.zeros(4)
    for job in jobs_of(fold, view.base, False):
        total += job().sums
    return change_of(name, fold.edit.spec.count, total.tolist())
