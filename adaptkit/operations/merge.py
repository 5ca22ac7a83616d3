"""Merge adapters into a checkpoint, piece by piece, with a record of what ``unmerge`` needs.

A shard whose tensors keep their shapes keeps the base's header byte for byte, so that ``unmerge`` restores identical
files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adaptkit.arguments import AnyPath, as_path, as_paths, check_flags, checked_options
from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.layout import CONFIG_NAME, is_adapter
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import UsageError
from adaptkit.formats._format import writable
from adaptkit.operations._merge.base import Base, check_listed_files, open_base, with_addresses
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._merge.edits import Edits, check_copies, check_effects, check_unresized
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.recoding import Recoding, check_bits, check_recodable
from adaptkit.operations._merge.report import LITTLE_KEPT, NOTHING_MOVED, MergeReport, TensorChange, TextEffect
from adaptkit.operations._merge.side_files import plan_side_files
from adaptkit.operations._terms import weights_of
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import MergeOptions

__all__ = ["LITTLE_KEPT", "NOTHING_MOVED", "MergeOptions", "MergeReport", "TensorChange", "TextEffect", "merge"]


def merge(
    base: AnyPath,
    adapters: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
    text_progress: Progress = no_progress,
) -> MergeReport:
    """Write base + Σ weight · change, every sum exact and rounded once.

    Args:
        base: folder of a checkpoint. If it is quantized, ``MergeOptions.onto`` tells what is merged into.
        adapters: folders of LoRA adapters, in the order in which they are summed.
        output: folder to make.
        options: see ``MergeOptions``.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: called with bytes written; if the result is quantized anew, first with bytes read from the base.
        text_progress: called with steps done while the model reads a text, each one batch through one layer.

    Raises:
        BaseMismatchError: an adapter was trained on other tensors, does not fit the base, or would untie its head.
        CheckpointError, AdapterError: malformed input, a quantized base whose 16-bit parent was not found, or one whose
            format would keep next to nothing of the change.
        DataError: a text cannot be read.
        UsageError: base and adapter are swapped, an adapter changes nothing, or an option does not fit the base.
        NonFiniteError: a weight of the base or of the result is NaN or infinite; names the tensor.
        IntegrityError: the base or an adapter does not match its manifest, or changed during the merge.
        OutputExistsError: the output exists.
    """
    check_flags(force=force, dry_run=dry_run)
    base, output = as_path(base, "base"), as_path(output, "output")
    adapters = as_paths(adapters, "adapters")
    options = checked_options(options, MergeOptions)
    _check_order(base, adapters)
    read = [read_adapter(path) for path in adapters]
    weights = weights_of(read, options.weights)
    check_output(output, force, [base, *adapters])
    opened = open_base(base, read, options)
    edits = plan_edits(opened.checkpoint, read, weights, options.untie, is_trained_on=opened.is_trained_on)
    if not options.allow_base_mismatch:
        check_copies(opened.checkpoint, edits, "add --allow-base-mismatch to use the adapter's copy")
    check_effects(read, weights, edits)
    opened = with_addresses(opened, edits)
    check_output(output, force, [base, opened.checkpoint.root, *adapters])  # open_base may have found another folder
    recoding = _recoding(opened, edits, options)
    files = opened.checkpoint if recoding is None else recoding.decoded.stored
    side = plan_side_files(files, opened.manifest, read, edits)
    merging = Merging(opened, read, weights, options, edits, side, recoding)
    if merging.has_undo:
        check_listed_files(opened)
    if options.format in writable():
        check_unresized(edits, "a merge that quantizes", "merge first, then quantize the result")
    comparison = None
    if options.text:
        from adaptkit.operations._merge.divergence import plan_comparison, text_effect  # here: it imports transformers

        check_unresized(edits, "--text", "leave out --text")
        comparison = plan_comparison(merging)
    if dry_run:
        return merging.report(output)
    if options.format in writable():
        from adaptkit.operations._merge.quantized import merge_quantized  # here, since it imports all of quantize

        report = merge_quantized(merging, output, force, progress)
    else:
        report = merging.run(output, force, progress, text_progress)
    if comparison is None:
        return report
    return replace(report, text=text_effect(comparison, output, text_progress))


def _recoding(base: Base, edits: Edits, options: MergeOptions) -> Recoding | None:
    """Return how the codes of a quantized base change; None if the result has 16 or 32 bits, or is quantized anew.

    Raises:
        CheckpointError: the base's format cannot hold the change, or would keep next to nothing of it.
        UsageError: an option does not fit the base.
    """
    if options.format == "plain" and base.decoded is None and base.quantized is None:
        raise UsageError(f"format: {base.checkpoint.root} is not quantized", hint="leave out --format plain")
    if base.decoded is None or options.format != "keep":
        if options.calibrate:
            raise UsageError(
                "calibrate: only for a merge into the codes of a quantized base",
                hint="quantize the result with adaptkit quantize --calibrate FILE",
            )
        return None
    check_recodable(base.decoded, edits)
    recoding = Recoding(base.decoded)
    if not options.calibrate:
        check_bits(recoding, edits, thread_count(options.threads))
    return recoding


def _check_order(base: Path, adapters: Sequence[Path]) -> None:
    """Detect swapped base and adapter, which would otherwise each be reported as malformed.

    Raises:
        UsageError: the base is an adapter, and one of the adapters a checkpoint.
    """
    others = [path for path in adapters if (path / CONFIG_NAME).is_file() and not is_adapter(path)]
    if is_adapter(base) and others:
        raise UsageError(
            f"{base} is an adapter and {others[0]} a checkpoint; the base comes first",
            hint=f"adaptkit merge {others[0]} {base} -o OUT",
        )
