"""Compare two adapters, or two checkpoints."""

from adaptkit.arguments import AnyPath, as_path, check_flags
from adaptkit.checkpoint.layout import has_checkpoint, is_adapter, require_folder, weight_files
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import UsageError
from adaptkit.operations._diff.adapters import AdapterDiffReport, diff_adapters
from adaptkit.operations._diff.checkpoints import CheckpointDiffReport, diff_checkpoints
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import ThreadOptions

__all__ = ["AdapterDiffReport", "CheckpointDiffReport", "diff"]


def diff(
    first: AnyPath,
    second: AnyPath,
    *,
    recompute: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> AdapterDiffReport | CheckpointDiffReport:
    """Compare two artifacts of the same kind; swapping them mirrors the report.

    Adapters are loaded and compared module by module in factored form. Tensors of checkpoints are compared by
    fingerprint; those that differ are read piece by piece to measure the difference and its rank.

    Args:
        first: folder of an adapter or a checkpoint.
        second: folder of another. Folders with both are compared as adapters if both have one.
        recompute: read all tensors of checkpoints, even if their manifests contain fingerprints.
        threads: modules or tensors compared at a time; one per processor if None. The report does not depend on it.
        progress: called with bytes of checkpoints, read or compared.

    Raises:
        UsageError: only one is an adapter, one is not a folder, or ``threads`` is less than 1.
        AdapterError: an adapter is malformed or is not a LoRA adapter.
        CheckpointError: one of them is not a checkpoint.
    """
    check_flags(recompute=recompute)
    first, second = as_path(first, "first"), as_path(second, "second")
    threads = thread_count(ThreadOptions(threads).threads)
    adapters = [path for path in (first, second) if is_adapter(require_folder(path))]
    if len(adapters) == 2:
        return diff_adapters(first, second, threads=threads)
    if adapters and not has_checkpoint(adapters[0]):
        (other,) = {first, second} - {*adapters}
        weight_files(other)  # raises if it is not a checkpoint either
        raise UsageError(
            f"{adapters[0]} is an adapter, but {other} is not",
            hint="merge the adapter and compare the result, or extract an adapter from the other and compare that",
        )
    return diff_checkpoints(first, second, recompute=recompute, threads=threads, progress=progress)
