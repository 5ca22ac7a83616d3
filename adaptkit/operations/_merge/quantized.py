"""Merge the 16-bit weights and quantize the result in one run, and measure how much of the change is left."""

from pathlib import Path

import numpy as np

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Parent, TensorRecord, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.formats._find import stored_weights
from adaptkit.formats._format import Encoding
from adaptkit.formats._stored import StoredWeight
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.base import check_fingerprint, merge_parents
from adaptkit.operations._merge.folding import Rows, jobs_of, read_rows
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.report import MergeReport, TensorChange, change_of
from adaptkit.operations._merge.view import MergedView
from adaptkit.operations._quantize.plan import make_plan
from adaptkit.operations._quantize.writing import make_manifest, source_records, write_checkpoint
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._threads import fingerprints, map_in_threads, thread_count
from adaptkit.operations.options import QuantizeOptions
from adaptkit.wording import counted

_RUN_ROWS = 128
"""Rows that are measured together; a multiple of the rows of a block in every format."""


def merge_quantized(merging: Merging, output: Path, force: bool, progress: Progress) -> MergeReport:
    """Quantize the merged model without writing its 16-bit weights.

    ``progress`` is called with bytes of the base read for fingerprints, then with bytes written.

    Raises:
        BaseMismatchError: the base is not what the adapters were trained on.
        IntegrityError: the base or an adapter changed meanwhile, or the base does not match its manifest.
    """
    base, checkpoint, files = merging.base, merging.checkpoint, merging.files
    state, threads = checkpoint.state(), thread_count(merging.options.threads)
    digests = fingerprints(files, threads, progress)
    for name, digest in digests.items():
        check_fingerprint(base, name, digest)
    records = [TensorRecord.of(at.spec, digests[name]) for name, at in files.tensors.items()]
    parents = merge_parents(base, merging.adapters, merging.weights, records)
    view = MergedView(checkpoint, merging.edits, merging.side.contents, threads)
    options = QuantizeOptions(merging.options.format, threads=merging.options.threads)
    try:
        plan, recorded = make_plan(view, options), options.recorded()
    except UsageError as error:  # whose hint names options of quantize
        raise UsageError(error.message, hint="merge into 16 bits, then quantize the result") from error
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
    stored = {weight.name: weight for weight in stored_weights(made, quantization_found(made))}
    changes = [
        _quantized_change(view, stored[name], made, options.encoding, threads)
        if name in stored
        else _plain_change(view, name)
        for name in view.folds
    ]
    left = sorted(set(view.folds) - set(stored))
    notes = [f"{counted(len(left), 'changed tensor', 'stay')} in 16 bits, such as {left[0]}"] if left else []
    return merging.final_report(output, manifest, changes, 0.0, *notes)


def _quantized_change(
    view: MergedView, stored: StoredWeight, output: Checkpoint, encoding: Encoding, threads: int
) -> TensorChange:
    """Measure how much of the change of a weight is left in ``output``; the result does not depend on ``threads``.

    Returns:
        ``effect`` is ⟨Q(W + Δ) - Q(W), Δ⟩ / ⟨Δ, Δ⟩, ``moved`` the share of elements in which Q(W + Δ) and Q(W) differ.
        Q(W) is computed without what spans several runs of rows: double quantization and NVFP4's factor of a weight,
        whose errors do not depend on Δ.
    """
    name = stored.name
    fold, flip = view.folds[name], stores_transposed(view.base, name)
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

    aligned = not flip and columns % (encoding.block_size or 1) == 0
    runs = fold.pieces(_RUN_ROWS * columns * ITEM_BYTES[fold.edit.spec.dtype]) if aligned else [Rows(0, height)]
    total = np.zeros(4)
    for sums in map_in_threads(measured, runs, threads):
        total += sums
    return change_of(name, fold.edit.spec.count, total.tolist())


def _plain_change(view: MergedView, name: str) -> TensorChange:
    """Return the change of a weight that is not quantized."""
    fold, total = view.folds[name], np.zeros(4)
    for job in jobs_of(fold, view.base, False):
        total += job().sums
    return change_of(name, fold.edit.spec.count, total.tolist())
