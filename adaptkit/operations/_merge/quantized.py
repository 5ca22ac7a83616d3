"""Merge the 16-bit weights and quantize the result in one run, and measure how much of the change 4 bits keep."""

import json
from dataclasses import replace
from pathlib import Path

from adaptkit.checkpoint.manifest import Manifest, Parent, TensorRecord
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._merge.base import check_fingerprint, is_their_base, merge_parents
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.report import MergeReport, with_changes
from adaptkit.operations._merge.view import MergedView, plain_change, quantized_change
from adaptkit.operations._quantize.plan import QuantizeOptions
from adaptkit.operations._threads import fingerprints, thread_count
from adaptkit.operations.quantize import quantize_checkpoint
from adaptkit.wording import counted


def merge_quantized(merging: Merging, output: Path, force: bool, progress: Progress) -> MergeReport:
    """Quantize the merged model without writing its 16-bit weights.

    Args:
        merging: the merge.
        output: folder to create.
        force: replace an existing output.
        progress: called with bytes of the base read for fingerprints, then with bytes written.

    Raises:
        BaseMismatchError: the base is not what the adapters were trained on.
        IntegrityError: the base or an adapter changed meanwhile, or the base does not match its manifest.
    """
    base, checkpoint, plain = merging.base, merging.checkpoint, merging.report(output)
    state, threads = checkpoint.state(), thread_count(merging.options.threads)
    digests = fingerprints(checkpoint, threads, progress)
    for name, digest in digests.items():
        check_fingerprint(base, name, digest)
    records = [TensorRecord.of(at.spec, digests[name]) for name, at in checkpoint.tensors.items()]
    parents = merge_parents(base, merging.adapters, merging.weights, records)

    def describe(manifest: Manifest) -> Manifest:
        checkpoint.require_state(state)
        merging.require_adapters()
        merged = Parent("merged", "merged", manifest.parents[0].tensors_root)
        operation = {"name": "merge", "options": merging.recorded | {"quantize": manifest.operation["options"]}}
        return replace(manifest, operation=operation, parents=(merged, *parents))

    identity = json.dumps(merging.identity(), sort_keys=True)
    view = MergedView(checkpoint, merging.edits, merging.side.contents, identity, threads)
    options = QuantizeOptions(merging.options.format, threads=merging.options.threads)
    report = quantize_checkpoint(view, output, options, force=force, progress=progress, describe=describe)
    made = Checkpoint(output)
    stored = {tensor.name for tensor in report.tensors if tensor.format}
    changes = [
        quantized_change(view, made, name, options.encoding, threads) if name in stored else plain_change(view, name)
        for name in view.folds
    ]
    left = sorted(set(view.folds) - stored)
    stay = f"{counted(len(left), 'changed tensor', 'stay')} in 16 bits, such as {left[0]}" if left else ""
    notes = (*plain.told, *([stay] if stay else []))
    same = is_their_base(base, parents[0].tensors_root, merging.adapters)
    return replace(
        with_changes(replace(plain, told=notes, undo_bits=0.0), changes),
        base_verified=same or plain.base_verified,
        same_base=same,
        tensors_root=report.tensors_root,
        manifest_sha256=report.manifest_sha256,
    )
