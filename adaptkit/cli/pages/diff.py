"""The page of ``adaptkit diff --html``: where, how much and in which directions two adapters or checkpoints differ."""

from typing import TYPE_CHECKING

from adaptkit.cli.pages._diff_adapters import adapters_page
from adaptkit.cli.pages._diff_checkpoints import checkpoints_page

if TYPE_CHECKING:
    from adaptkit.operations.diff import AdapterDiffReport, CheckpointDiffReport


def diff_page(report: "AdapterDiffReport | CheckpointDiffReport") -> str:
    """Return a self-contained HTML document.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from adaptkit.operations.diff import AdapterDiffReport

    return adapters_page(report) if isinstance(report, AdapterDiffReport) else checkpoints_page(report)
