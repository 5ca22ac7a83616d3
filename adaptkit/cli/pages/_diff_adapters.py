"""The ``diff`` page of two adapters."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptkit.cli.differences import adapter_rows
from adaptkit.cli.grid import starred
from adaptkit.cli.html import Html, Number, facts, figure, page, paragraph, section, side_by_side, table
from adaptkit.cli.output import counted
from adaptkit.cli.pages._parts import (
    beside,
    curves_by_type,
    folder_name,
    largest_types,
    maps,
    names,
    number,
    share,
    tensors,
)

if TYPE_CHECKING:
    from adaptkit.operations._diff.modules import GroupDifference, ModuleDifference
    from adaptkit.operations.diff import AdapterDiffReport

_OUT, _IN = "outputs", "inputs"


def adapters_page(report: "AdapterDiffReport") -> str:
    """Return a self-contained HTML document."""
    types = largest_types((m.module, m.difference) for m in report.modules)
    others = [section("Other tensors", tensors(report.tensors, roles=True))] if report.tensors else []
    return page(
        f"{folder_name(report.first)} and {folder_name(report.second)}",
        facts(_summary(report)),
        *_differences(report.modules),
        *_overlaps(report.modules, types),
        *_spectra(report.modules, types),
        section("By type of module", _groups(report.types)),
        section("By layer", _groups(report.layers)),
        *names("Modules", report.only_in_first, report.only_in_second),
        *others,
        *names("Other tensors", report.tensors_only_in_first, report.tensors_only_in_second),
        *beside(report.config, report.beside, uncounted=True),
        section(f"All {counted(len(report.modules), 'module')}", _modules(report.modules), collapsed=True),
    )


def _summary(report: "AdapterDiffReport") -> list[tuple[str, str]]:
    lonely = len(report.only_in_first) + len(report.only_in_second)
    rows = [
        ("result", "the same" if report.same else "different"),
        ("first", report.first),
        ("second", report.second),
        ("modules", f"{report.total.modules:,}, of which {lonely:,} in one only"),
        *adapter_rows(report.total),
    ]
    if report.tensors_equal or report.tensors:
        rows.append(("other tensors", f"{report.tensors_equal:,} equal, {len(report.tensors):,} differ"))
    rows += [("tensors roots", "\n".join(report.tensors_roots))]
    return rows + [("remark", remark) for remark in report.remarks]


def _differences(modules: Sequence["ModuleDifference"]) -> list[Html]:
    relative = {m.module: 100 * m.relative for m in modules}
    if not relative:
        return []
    caption = "‖Δ₁ − Δ₂‖ over the larger of both norms, in per cent; unrelated changes of equal size have 141."
    limits = (0.0, max(1e-9, *relative.values()))
    made = [maps(relative, "difference, %", caption, limits)]
    shared = {m.module: m.cosine for m in modules if m.columns is not None}
    if shared:
        caption = "⟨Δ₁, Δ₂⟩ / ‖Δ₁‖ ‖Δ₂‖: +1 in the same direction, 0 unrelated, −1 opposite."
        made.append(maps(shared, "cosine", caption, (-1.0, 1.0), diverging=True))
    choose = paragraph("Select a cell for its name and value.")
    return [section("Difference and cosine", choose, side_by_side(*made))]


def _overlaps(modules: Sequence["ModuleDifference"], types: Sequence[str]) -> list[Html]:
    sides = {_OUT: {m.module: m.columns for m in modules}, _IN: {m.module: m.rows for m in modules}}
    known = {side: {name: o for name, o in found.items() if o is not None} for side, found in sides.items()}
    if not known[_OUT]:
        return []
    explained = (
        "How much the subspaces that the two write to (outputs: column spaces) and read from (inputs: row spaces) "
        "overlap. Overlap is the root mean square of the cosines of their principal angles: √(r/m) for random "
        "subspaces of dimension r in a space of dimension m."
    )
    times = {side: {name: o.rms / o.random for name, o in found.items()} for side, found in known.items()}
    limits = (0.0, max(value for found in times.values() for value in found.values()))
    drawn = [
        maps(
            found, f"{side}, overlap / random", f"Overlap of {side}, in multiples of that of random subspaces.", limits
        )
        for side, found in times.items()
    ]
    lines = {side: {name: o.cosines for name, o in found.items()} for side, found in known.items()}
    levels: dict[str, dict[str, float]] = {}
    for side, overlaps in known.items():
        for name, o in overlaps.items():
            levels.setdefault(starred(name), {}).setdefault(side, o.random)
    caption = (
        "Cosines of the principal angles, largest first: median of the layers, and all of them shaded. Dotted: the "
        "root mean square for random subspaces, whose own largest cosines are above it, and whose smallest are below."
    )
    pictures = curves_by_type(lines, types, "angle", "cosine", levels=levels)
    return [
        section("Subspaces", paragraph(explained), side_by_side(*drawn)),
        section("Principal angles", figure(caption, *pictures, abreast=True)),
    ]


def _spectra(modules: Sequence["ModuleDifference"], types: Sequence[str]) -> list[Html]:
    lines: Mapping[str, Mapping[str, Sequence[float]]] = {
        "first": {m.module: m.spectra[0] for m in modules},
        "second": {m.module: m.spectra[1] for m in modules},
        "difference": {m.module: m.difference_spectrum for m in modules},
    }
    pictures = curves_by_type(lines, types, "rank", "singular value", logarithmic=True)
    caption = "Singular values of Δ₁, Δ₂ and Δ₁ − Δ₂: median of the layers, and all of them shaded."
    return [section("Spectra", figure(caption, *pictures, abreast=True))] if pictures else []


def _groups(groups: Sequence["GroupDifference"]) -> Html:
    rows: list[tuple[str | Number, ...]] = []
    for g in groups:
        overlaps = (_overlap(g.columns, g.columns_random), _overlap(g.rows, g.rows_random))
        shares = (share(g.sign_agreement), share(g.interference_share))
        rows.append((g.name, Number(g.modules, f"{g.modules:,}"), *_figures(g), *overlaps, *shares))
    return table(("name", "count", *_FIGURES, *_OVERLAPS), rows)


_FIGURES = ("difference", "cosine", "‖Δ₁‖", "‖Δ₂‖")
_OVERLAPS = ("out (random)", "in (random)", "signs", "interference")


def _figures(found: "GroupDifference | ModuleDifference") -> tuple[Number, ...]:
    norms = [number(norm, "#.3g") for norm in found.norms]
    return share(found.relative), number(found.cosine, "+.3f"), *norms


def _overlap(rms: float | None, random: float | None) -> Number:
    return Number(rms, "" if rms is None or random is None else f"{rms:.3f} ({random:.3f})")


def _modules(modules: Sequence["ModuleDifference"]) -> Html:
    rows: list[tuple[str | Number, ...]] = []
    for m in modules:
        overlaps = [_overlap(o.rms, o.random) if o else Number(None) for o in (m.columns, m.rows)]
        ranks = [Number(m.ranks[side], str(m.ranks[side])) for side in (0, 1)]
        spread = [number(rank) for rank in (*m.effective_ranks, *m.stable_ranks)]
        shares = (share(m.sign_agreement), share(m.interference_share))
        rows.append((m.module, *_figures(m), *overlaps, *shares, *ranks, *spread))
    ranks_of = ("rank of Δ₁", "of Δ₂", "effective rank of Δ₁", "of Δ₂", "stable rank of Δ₁", "of Δ₂")
    return table(("module", *_FIGURES, *_OVERLAPS, *ranks_of), rows)
