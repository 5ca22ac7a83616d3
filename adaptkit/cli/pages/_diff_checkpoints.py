"""The ``diff`` page of two checkpoints."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from adaptkit.cli.differences import checkpoint_rows
from adaptkit.cli.html import Html, facts, figure, page, paragraph, section, side_by_side
from adaptkit.cli.output import counted
from adaptkit.cli.pages._parts import beside, curves_by_type, folder_name, largest_types, maps, names, tensors

if TYPE_CHECKING:
    from adaptkit.operations._diff.tensors import TensorDifference
    from adaptkit.operations.diff import CheckpointDiffReport

_DIRECTIONS = "16"


def checkpoints_page(report: "CheckpointDiffReport") -> str:
    """Return a self-contained HTML document."""
    heading = f"All {counted(len(report.tensors), 'tensor')} that differ{'s' if len(report.tensors) == 1 else ''}"
    return page(
        f"{folder_name(report.first)} and {folder_name(report.second)}",
        facts(_summary(report)),
        *_differences(report.tensors),
        *_low_rank(report.tensors),
        *beside(report.config, report.beside),
        *names("Tensors", report.only_in_first, report.only_in_second),
        section(heading, tensors(report.tensors), collapsed=True),
    )


def _summary(report: "CheckpointDiffReport") -> list[tuple[str, str]]:
    return [
        ("result", "the same" if report.same else "different"),
        ("first", report.first),
        ("second", report.second),
        *checkpoint_rows(report),
        ("tensors roots", "\n".join(report.tensors_roots)),
        *(("remark", remark) for remark in report.remarks),
    ]


def _differences(found: Sequence["TensorDifference"]) -> list[Html]:
    relative = {t.name: 100 * t.relative for t in found if t.relative is not None}
    energy = {t.name: 100 * t.change.energy[_DIRECTIONS] for t in found if t.change is not None}
    drawn = []
    if relative:
        caption = "‖W₁ − W₂‖ over the larger of both norms, in per cent. Empty where the tensors are the same."
        limits = (0.0, max(1e-9, *relative.values()))
        drawn.append(maps(relative, "difference, %", caption, limits))
    if energy:
        caption = (
            f"Share of ‖W₁ − W₂‖² in the {_DIRECTIONS} directions that hold most of it, in per cent: what an adapter "
            f"of rank {_DIRECTIONS} could hold, at least."
        )
        drawn.append(maps(energy, f"in {_DIRECTIONS} directions, %", caption, (0.0, 100.0)))
    choose = paragraph("Select a cell for its name and value.")
    return [section("Difference, and how low-rank it is", choose, side_by_side(*drawn))] if drawn else []


def _low_rank(found: Sequence["TensorDifference"]) -> list[Html]:
    shares = {}
    for t in found:
        if t.change is not None and t.difference:
            squares = accumulate(sigma * sigma for sigma in t.change.sigma)
            shares[t.name.removesuffix(".weight")] = [100 * square / t.difference**2 for square in squares]
    types = largest_types((t.name.removesuffix(".weight"), t.difference or 0.0) for t in found if t.change)
    pictures = curves_by_type({"share": shares}, types, "directions", "share of the square, %")
    caption = "Share of ‖W₁ − W₂‖² by the number of directions: median of the layers, and all of them shaded."
    return [section("Directions", figure(caption, *pictures, abreast=True))] if pictures else []
