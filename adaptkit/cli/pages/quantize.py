"""The page of ``adaptkit quantize --html``: errors, sizes, and which tensors were kept and why."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.checkpoint.layout import name_of
from adaptkit.cli.output import Row, percent
from adaptkit.cli.pages.heat_maps import heat_figure, starred
from adaptkit.cli.pages.page import render

if TYPE_CHECKING:
    from adaptkit.operations.quantize import QuantizeReport, TensorReport

_WORST = 10
_SAME_BITS = 0.05  # a short last block changes a tensor's bits per weight by less than this
_IN_SECTIONS = {"kept as is", "worst", "more bits for"}
"""Rows of the terminal's table that the page shows in full."""


def quantize_page(report: "QuantizeReport", rows: Sequence[Row]) -> str:
    """Return a self-contained HTML document.

    Args:
        report: the report.
        rows: the command's rows on it.
    """
    from adaptkit.cli.pages.pictures import histogram

    quantized = [t for t in report.tensors if t.relative_error is not None]
    relative = {t.name: 100 * t.relative_error for t in quantized if t.relative_error is not None}
    weighted = {t.name: 100 * t.weighted_error for t in quantized if t.weighted_error is not None}
    bits = _bits(report.tensors)
    is_mixed = bool(bits) and max(bits.values()) - min(bits.values()) > _SAME_BITS
    worst = weighted or relative
    shown = [row for row in rows if row[0] not in _IN_SECTIONS]
    if report.parameters:
        part = percent(report.quantized_parameters / report.parameters)
        shown.append(("in all", f"{report.bytes_before / report.bytes_after:.2f} × smaller; {part} of the parameters"))
    if report.tensors_root:
        shown.append(("tensors root", report.tensors_root))
    return render(
        "quantize.html",
        name=name_of(Path(report.output)),
        report=report,
        rows=shown,
        calibrated=bool(weighted),
        quantized=quantized,
        relative=heat_figure(relative),
        weighted=heat_figure(weighted),
        bits=heat_figure(bits if is_mixed else {}),
        distribution=histogram(list(relative.values()), "relative error, %", "tensors") if relative else None,
        worst=sorted(quantized, key=lambda t: (-worst.get(t.name, 0.0), t.name))[:_WORST],
    )


def _bits(tensors: Sequence["TensorReport"]) -> dict[str, float]:
    """Return bits per weight of modules that are quantized in at least one layer; norms, for example, never are."""
    kinds = {starred(t.name) for t in tensors if t.format}
    return {t.name: t.bits for t in tensors if starred(t.name) in kinds}
