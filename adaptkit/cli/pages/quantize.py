"""The page of ``adaptkit quantize --html``: errors, sizes, and which tensors were kept and why."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from adaptkit.cli import figures
from adaptkit.cli.grid import grids, place, starred
from adaptkit.cli.html import Html, Number, facts, figure, page, paragraph, section, table
from adaptkit.cli.output import counted, percent, size
from adaptkit.cli.pages._parts import folder_name, maps, share

if TYPE_CHECKING:
    from adaptkit.operations.quantize import QuantizeReport, TensorReport

_WORST = 10
_SAME_BITS = 0.05  # a short last block changes a tensor's bits per weight by less than this


def quantize_page(report: "QuantizeReport") -> str:
    """Return a self-contained HTML document.

    Raises:
        UsageError: matplotlib is not installed.
    """
    quantized = [t for t in report.tensors if t.relative_error is not None]
    calibrated = any(t.weighted_error is not None for t in quantized)
    return page(
        f"Quantization of {folder_name(report.output)}",
        facts(_summary(report)),
        *_pictures(report.tensors),
        *([_worst(quantized, calibrated)] if quantized else []),
        *([_upgrades(report)] if report.upgrades else []),
        _kept(report),
        section(f"All {counted(len(report.tensors), 'tensor')}", _tensors(report.tensors, calibrated), collapsed=True),
    )


def _summary(report: "QuantizeReport") -> list[tuple[str, str]]:
    part = report.quantized_parameters / report.parameters if report.parameters else 0.0
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    rows = [
        ("output", f"{report.output} ({counted(report.shards, 'shard')})"),
        ("size", f"{size(report.bytes_before)} → {size(report.bytes_after)} ({ratio:.2f} × smaller)"),
        (
            "quantized",
            f"{counted(report.quantized, 'tensor')} with {percent(part)} of {report.parameters:,} parameters",
        ),
        ("bits per weight", f"{report.bits_per_parameter:.3f} in quantized weights, including constants"),
        ("linear layers", f"read from {report.read_from}"),
    ]
    if report.relative_error is not None:
        rows.append(("relative error", f"{percent(report.relative_error)} of the norm of all that was quantized"))
    if report.weighted_error is not None:
        calibrated = counted(report.calibrated, "tensor")
        text = f"{percent(report.weighted_error)}, inputs weighted by their mean square, over {calibrated}"
        rows.append(("weighted error", text))
    if report.companion is not None:
        rows.append(("companion adapter", report.companion))
    if report.tensors_root:
        rows.append(("tensors root", report.tensors_root))
    if report.manifest_sha256:
        rows.append(("manifest sha256", report.manifest_sha256))
    return rows


def _pictures(tensors: Sequence["TensorReport"]) -> list[Html]:
    relative = {t.name: 100 * t.relative_error for t in tensors if t.relative_error is not None}
    weighted = {t.name: 100 * t.weighted_error for t in tensors if t.weighted_error is not None}
    made = []
    if relative:
        caption = "‖W − Q‖ / ‖W‖ of each matrix W and its decoded codes Q. Select a cell for its name and value."
        spread = figures.histogram(list(relative.values()), "relative error, %", "tensors")
        made.append(section("Relative error", _maps(relative, "relative error, %", caption)))
        made.append(section("Distribution", figure(f"All {counted(len(relative), 'quantized tensor')}.", spread)))
    if weighted:
        caption = "The same, with each weight weighted by the mean square of the input that it multiplies."
        made.insert(1, section("Weighted error", _maps(weighted, "weighted error, %", caption)))
    bits = _bits(tensors)
    if bits and max(bits.values()) - min(bits.values()) > _SAME_BITS:
        caption = "Bits per weight, including constants, of types of modules with at least one quantized module."
        made.append(section("Bits", _maps(bits, "bits per weight", caption)))
    return made


def _maps(values: Mapping[str, float], what: str, caption: str) -> Html:
    """Return a heat map for each stack of layers, with colours from the smallest to the largest value."""
    made = grids(values)
    means = [entry.mean for grid in made for entry in grid.entries.values()]
    if any(len(grid.entries) < len(grid.rows) * len(grid.columns) for grid in made):
        caption += " Empty where there is no such tensor, or it was kept unchanged."
    return maps(values, what, caption, (min(means), max(means)))


def _bits(tensors: Sequence["TensorReport"]) -> dict[str, float]:
    """Return bits per weight of modules that are quantized in at least one layer; norms, for example, never are."""
    where = {t.name: place(t.name) for t in tensors}
    kinds = {(where[t.name].stack, where[t.name].module) for t in tensors if t.format}
    return {t.name: t.bits for t in tensors if (where[t.name].stack, where[t.name].module) in kinds}


def _worst(quantized: Sequence["TensorReport"], calibrated: bool) -> Html:
    """Return a table of the largest errors, weighted if the quantization was calibrated."""

    def error(tensor: "TensorReport") -> float:
        return (tensor.weighted_error if calibrated else tensor.relative_error) or 0.0

    worst = sorted(quantized, key=lambda t: (-error(t), t.name))[:_WORST]
    return section(f"Largest {'weighted' if calibrated else 'relative'} errors", _tensors(worst, calibrated))


def _upgrades(report: "QuantizeReport") -> Html:
    """Return a table of the upgrades that a bits budget paid for, in order."""
    rows = [
        (u.module, u.to, Number(u.extra_bytes, f"{u.extra_bytes:,}"), Number(u.gain, f"{u.gain:.3g}"))
        for u in report.upgrades
    ]
    return section(
        "More bits where they save most",
        paragraph("In the order in which the budget was spent; the gain is the expected reduction of the divergence."),
        table(("module", "became", "extra bytes", "gain, nats per token"), rows),
    )


def _kept(report: "QuantizeReport") -> Html:
    kept = sorted((t for t in report.tensors if not t.format), key=lambda t: (t.kept_because, t.name))
    if not kept:
        return section("Kept unchanged", paragraph("Nothing."))
    rows = []
    for reason, group in groupby(kept, key=lambda t: t.kept_because):
        found = list(group)
        stored = sum(t.bytes_after for t in found)
        examples = ", ".join(dict.fromkeys(starred(t.name) for t in found))
        rows.append((reason, Number(len(found), f"{len(found):,}"), Number(stored, size(stored)), examples))
    return section("Kept unchanged", table(("reason", "tensors", "size", "which"), rows))


def _tensors(tensors: Sequence["TensorReport"], calibrated: bool) -> Html:
    rows: list[tuple[str | Number, ...]] = [
        (
            t.name,
            share(t.relative_error),
            *([share(t.weighted_error)] if calibrated else []),
            Number(t.bits, f"{t.bits:.3f}"),
            t.format or f"kept: {t.kept_because}",
            "×".join(map(str, t.shape)),
            Number(t.bytes_before, size(t.bytes_before)),
            Number(t.bytes_after, size(t.bytes_after)),
        )
        for t in tensors
    ]
    errors = ("relative error", "weighted error") if calibrated else ("relative error",)
    return table(("tensor", *errors, "bits per weight", "format", "shape", "before", "after"), rows)
