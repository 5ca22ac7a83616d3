"""Merge on the 16-bit weights and quantize the result in one go, and say what 4 bits left of the change."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.encoding import Encoding
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.manifest import Manifest, Parent, TensorRecord
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._merge.base import Base, check_fingerprint, is_theirs, merge_parents
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.report import MergeReport, with_changes
from adaptkit.operations._merge.view import MergedView, quantized_change
from adaptkit.operations._pipeline import in_order, thread_count
from adaptkit.operations._quantize.plan import QuantizeOptions
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations.quantize import quantize_checkpoint


def check_quantizable(edits: Edits) -> None:
    """Refuse what changes more than values.

    Raises:
        UsageError: names it.
    """
    if edits.added or edits.config:
        what = edits.added[0] if edits.added else next(iter(edits.config))
        raise UsageError(
            f"the merge changes {what}, which cannot be done and quantized in one go",
            hint="merge first, then quantize the result",
        )


def merge_quantized(
    base: Base,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    view: MergedView,
    encoding: Encoding,
    recorded: dict[str, Any],
    plain: MergeReport,
    *,
    force: bool,
    threads: int | None,
    progress: Progress,
) -> MergeReport:
    """Quantize a merged model that is in no file.

    Args:
        base: what is merged onto.
        adapters: in order.
        weights: one each.
        view: the merged model.
        encoding: of its linear layers.
        recorded: what the manifest says of the merge.
        plain: the report so far.
        force: replace an existing output.
        threads: pieces at a time; one per processor if None.
        progress: told of bytes of the base that are read for their fingerprints, then of bytes written.
    """
    checkpoint = base.checkpoint
    digests = _digests(checkpoint, thread_count(threads), progress)
    for name, digest in digests.items():
        check_fingerprint(base, name, digest)
    records = [
        TensorRecord(name, "", at.spec.dtype, at.spec.shape, digests[name]) for name, at in checkpoint.tensors.items()
    ]
    parents = merge_parents(base, adapters, weights, records)

    def describe(manifest: Manifest) -> Manifest:
        merged = Parent("merged", "merged", manifest.parents[0].tensors_root)
        operation = {"name": "merge", "options": recorded | {"quantize": manifest.operation["options"]}}
        return replace(manifest, operation=operation, parents=(merged, *parents))

    options = QuantizeOptions(encoding.format, encoding.block_size, encoding.double_quant, threads=threads)
    output = Path(plain.output)
    report = quantize_checkpoint(view, output, options, force=force, progress=progress, describe=describe)
    made = Checkpoint(output)
    stored = {tensor.name for tensor in report.tensors if tensor.format}
    changes = [
        quantized_change(view, made, name, encoding, stores_transposed(checkpoint, name.removesuffix(".weight")))
        for name in view.folds
        if name in stored
    ]
    left = sorted(set(view.folds) - stored)
    told = (*plain.told, *([f"{len(left)} changed tensors stay in 16 bits: {left[0]}, …"] if left else []))
    same = is_theirs(base, parents[0].tensors_root, adapters)
    return replace(
        with_changes(replace(plain, told=told, undo_bits=0.0), changes),
        base_verified=same or plain.base_verified,
        same_base=same,
        tensors_root=report.tensors_root,
        manifest_sha256=report.manifest_sha256,
    )


def _digests(checkpoint: Checkpoint, threads: int, progress: Progress) -> dict[str, str]:
    names, found, done = list(checkpoint.tensors), {}, 0
    total = sum(checkpoint.spec(name).nbytes for name in names)
    digests = in_order(partial(fingerprint_in_pieces, checkpoint), names, threads)
    for name, digest in zip(names, digests, strict=True):
        found[name] = digest
        done += checkpoint.spec(name).nbytes
        progress(done, total)
    return found
