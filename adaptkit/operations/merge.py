"""Merge adapters into a 16- or 32-bit checkpoint, piece by piece, with a record of what ``unmerge`` needs.

A shard whose tensors keep their shapes keeps the base's header byte for byte, so that ``unmerge`` restores identical
files.
"""

from collections.abc import Sequence
from pathlib import Path

from adaptkit.arguments import AnyPath, as_path, as_paths, check_flags, checked_options
from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.layout import CONFIG_NAME, is_adapter
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import UsageError
from adaptkit.operations._merge.base import open_base, with_addresses
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._merge.edits import check_copies, check_effects, check_quantizable
from adaptkit.operations._merge.merging import Merging
from adaptkit.operations._merge.report import LITTLE_KEPT, NOTHING_MOVED, MergeReport, TensorChange
from adaptkit.operations._merge.side_files import plan_side_files
from adaptkit.operations._terms import weights_of
from adaptkit.operations.options import MergeOptions

__all__ = ["LITTLE_KEPT", "NOTHING_MOVED", "MergeOptions", "MergeReport", "TensorChange", "merge"]


def merge(
    base: AnyPath,
    adapters: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> MergeReport:
    """Write base + Σ weight · change, every sum exact and rounded once.

    Args:
        base: folder of a plain checkpoint; or of a quantized one, if its 16-bit parent lies beside it.
        adapters: folders of LoRA adapters, in the order in which they are summed.
        output: folder to make.
        options: see ``MergeOptions``.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: called with bytes written; if the result is quantized, first with bytes read from the base.

    Raises:
        BaseMismatchError: an adapter was trained on other tensors, does not fit the base, or would untie its head.
        CheckpointError, AdapterError: malformed input, or a quantized base whose 16-bit parent was not found.
        UsageError: base and adapter are swapped, or an adapter changes nothing.
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
    opened = open_base(base, read, options.allow_base_mismatch)
    edits = plan_edits(opened.checkpoint, read, weights, options.untie)
    if not options.allow_base_mismatch:
        check_copies(opened.checkpoint, edits, "add --allow-base-mismatch to use the adapter's copy")
    check_effects(read, weights, edits)
    opened = with_addresses(opened, edits)
    check_output(output, force, [base, opened.checkpoint.root, *adapters])  # open_base may have found another folder
    merging = Merging(
        opened, read, weights, options, edits, plan_side_files(opened.checkpoint, opened.manifest, read, edits)
    )
    merging.check_base()
    if options.format != "keep":
        check_quantizable(edits)
    if dry_run:
        return merging.report(output)
    if options.format == "keep":
        return merging.run(output, force, progress)
    from adaptkit.operations._merge.quantized import merge_quantized  # here, since it imports all of quantize

    return merge_quantized(merging, output, force, progress)


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
