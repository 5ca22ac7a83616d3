"""The page of ``adaptkit diff --html``: where, how much and in which directions two adapters or checkpoints differ."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.layout import name_of
from adaptkit.cli.output import Row
from adaptkit.cli.pages.heat_maps import heat_figure
from adaptkit.cli.pages.page import render

if TYPE_CHECKING:
    from adaptkit.operations._diff.modules import ModuleDifference
    from adaptkit.operations._diff.tensors import TensorDifference
    from adaptkit.operations.diff import AdapterDiffReport, CheckpointDiffReport


def diff_page(report: "AdapterDiffReport | CheckpointDiffReport", rows: Sequence[Row]) -> str:
    """Return a self-contained HTML document.

    Args:
        report: the report.
        rows: the command's summary of it.
    """
    from adaptkit.operations.diff import AdapterDiffReport

    of_adapters = isinstance(report, AdapterDiffReport)
    folders = (report.first, report.second)
    roots = ("tensors roots", "\n".join(report.tensors_roots))
    return render(
        "diff_adapters.html" if of_adapters else "diff_checkpoints.html",
        report=report,
        names_of=[name_of(Path(folder)) for folder in folders],
        rows=[*zip(("first", "second"), folders, strict=True), *rows, roots],
        **(_modules(report.modules) if isinstance(report, AdapterDiffReport) else _tensors(report.tensors)),
    )


def _modules(modules: Sequence["ModuleDifference"]) -> dict[str, Any]:
    """Return the pictures of the page on two adapters."""
    from adaptkit.cli.pages.pictures import curves_by_type

    sizes = {m.module: m.difference for m in modules}
    sides = {
        "outputs": {m.module: m.columns for m in modules if m.columns is not None},
        "inputs": {m.module: m.rows for m in modules if m.rows is not None},
    }
    times = {side: {name: o.rms / o.random for name, o in found.items()} for side, found in sides.items()}
    highest = max((value for found in times.values() for value in found.values()), default=0.0)
    cosines = {side: {name: o.cosines for name, o in found.items()} for side, found in sides.items()}
    random = {side: {name: o.random for name, o in found.items()} for side, found in sides.items()}
    spectra: dict[str, dict[str, tuple[float, ...]]] = {
        "first": {m.module: m.spectra[0] for m in modules},
        "second": {m.module: m.spectra[1] for m in modules},
        "difference": {m.module: m.difference_spectrum for m in modules},
    }
    return {
        "difference": heat_figure({m.module: 100 * m.relative for m in modules}, low=0.0),
        "cosine": heat_figure({m.module: m.cosine for m in modules if m.columns is not None}, -1.0, 1.0, signed=True),
        "overlaps": {side: heat_figure(found, 0.0, highest) for side, found in times.items() if found},
        "angles": curves_by_type(cosines, sizes, "angle", "cosine", levels=random),
        "spectra": curves_by_type(spectra, sizes, "rank", "singular value", logarithmic=True),
    }


def _tensors(tensors: Sequence["TensorDifference"]) -> dict[str, Any]:
    """Return the pictures of the page on two checkpoints."""
    from adaptkit.cli.pages.pictures import curves_by_type

    shares, sizes = {}, {}
    for t in tensors:
        if t.change is not None and t.difference:
            name, squares = t.name.removesuffix(".weight"), accumulate(sigma * sigma for sigma in t.change.sigma)
            shares[name], sizes[name] = [100 * square / t.difference**2 for square in squares], t.difference
    return {
        "difference": heat_figure({t.name: 100 * t.relative for t in tensors if t.relative is not None}, low=0.0),
        "low_rank": heat_figure(
            {t.name: 100 * t.change.energy["16"] for t in tensors if t.change is not None}, 0.0, 100.0
        ),
        "directions": curves_by_type({"share": shares}, sizes, "directions", "share of the square, %"),
    }
