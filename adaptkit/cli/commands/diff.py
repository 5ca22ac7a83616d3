"""``adaptkit diff``."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import html_option, report_options, threads_option
from adaptkit.cli.output import Row, check_page, counted, percent, shape, show, size, span, write_whole
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.errors import UsageError

if TYPE_CHECKING:
    from adaptkit.operations._diff.files import FilesDifference, ValueDifference
    from adaptkit.operations._diff.modules import ModuleDifference
    from adaptkit.operations._diff.tensors import TensorDifference
    from adaptkit.operations.diff import AdapterDiffReport, CheckpointDiffReport

SHOWN = 8
"""Maximum number of modules, tensors or keys that the table lists."""
_LONGEST_VALUE = 60
_FINGERPRINTS = {
    ("manifest", "manifest"): "from both manifests; --recompute reads the tensors",
    ("manifest", "computed"): "first from its manifest, not read; second computed from its bytes",
    ("computed", "manifest"): "first computed from its bytes; second from its manifest, not read",
    ("computed", "computed"): "computed from all bytes",
}
"""Where the fingerprints of the two come from."""


@click.command()
@click.argument("first", type=ArtifactPath())
@click.argument("second", type=ArtifactPath())
@click.option("--recompute", is_flag=True, help="Read checkpoints in full instead of trusting their manifests.")
@html_option
@report_options
@threads_option
def command(
    first: Path, second: Path, recompute: bool, html: Path | None, as_json: bool, quiet: bool, threads: int | None
) -> int:
    """Compare two adapters or two checkpoints.

    Exits with 0 if they are the same, with 1 if they differ.
    """
    from adaptkit.checkpoint.writer import DiskError
    from adaptkit.operations.diff import AdapterDiffReport, diff

    check_page(html)
    with byte_progress("diff", as_json or quiet) as progress:
        report = diff(first, second, recompute=recompute, threads=threads, progress=progress)
    summary, details = adapter_rows(report) if isinstance(report, AdapterDiffReport) else checkpoint_rows(report)
    if html is not None:
        from adaptkit.cli.pages.diff import diff_page

        try:
            write_whole(html, diff_page(report, summary))
        except DiskError as error:  # its exit code 1 would mean that they differ
            raise UsageError(error.message, hint=error.hint) from error
    show(report, [*summary, *details], as_json=as_json, quiet=quiet)
    return 0 if report.same else 1


def adapter_rows(report: "AdapterDiffReport") -> tuple[list[Row], list[Row]]:
    """Return a summary, and rows on what differs most, which the page shows in full."""
    modules, total = report.modules, report.total
    counts = [sum(m.shapes[side] is not None for m in modules) for side in (0, 1)]
    ranks = [_range(m.ranks[side] for m in modules if m.ranks[side]) for side in (0, 1)]
    roles = sorted(Counter(t.role for t in report.tensors).items())
    in_one = len(report.tensors_only_in_first) + len(report.tensors_only_in_second)
    others = f"{report.tensors_equal:,} equal, {len(report.tensors):,} differ, {in_one:,} only in one"
    others += "".join(f"\n{count:,} × {role}" for role, count in roles)
    summary = [
        ("adapters", "the same" if report.same else "different"),
        ("modules", f"{counts[0]:,} of rank {ranks[0]} and {counts[1]:,} of rank {ranks[1]}"),
        ("norms", f"{total.norms[0]:.6g} and {total.norms[1]:.6g}"),
        ("cosine", f"{total.cosine:+.6f}"),
        ("difference", f"{percent(total.relative)} of the larger norm"),
        ("effective ranks", f"{total.effective_ranks[0]:.3g} and {total.effective_ranks[1]:.3g}, mean of the modules"),
        ("stable ranks", f"{total.stable_ranks[0]:.3g} and {total.stable_ranks[1]:.3g}, mean of the modules"),
        ("overlap, outputs", _overlap(total.columns, total.columns_random)),
        ("overlap, inputs", _overlap(total.rows, total.rows_random)),
        ("signs", _share(total.sign_agreement, "agree, on 64 rows per module")),
        ("interference", _share(total.interference_share, "of the singular values")),
        ("other tensors", others if report.tensors_equal or report.tensors or in_one else None),
        *(("remark", remark) for remark in report.remarks),
    ]
    details = _only_in("module", report.only_in_first, report.only_in_second)
    details += [_values("configuration", report.config), *_beside(report.beside)]
    if not report.same:
        details += [(m.module, _module(m)) for m in modules[:SHOWN] if m.difference] + _more(modules)
        details += [(t.name, _tensor(t)) for t in report.tensors[:SHOWN]] + _more(report.tensors)
    return summary, details


def checkpoint_rows(report: "CheckpointDiffReport") -> tuple[list[Row], list[Row]]:
    """Return a summary, and rows on what differs most, which the page shows in full."""
    names = " and ".join(name or "not quantized" for name in report.quantizations)
    share = _share(report.relative, "of the norm of the differing tensors")
    shares = ", ".join(f"{percent(share)} in {rank}" for rank, share in report.energy.items())
    low_rank = f"at least {shares} directions per matrix, of the change's squared norm"
    summary = [
        ("checkpoints", "the same" if report.same else "different"),
        ("tensors", f"{report.equal:,} equal ({size(report.equal_bytes)}), {len(report.tensors):,} differ"),
        ("fingerprints", _FINGERPRINTS[report.fingerprints]),
        ("quantized", f"{names}; compared as stored, not decoded" if any(report.quantizations) else None),
        ("difference", (share or "unknown, since some tensors have no norm") if report.tensors else None),
        ("low rank", low_rank if report.energy else None),
        *(("remark", remark) for remark in report.remarks),
    ]
    details = _only_in("tensor", report.only_in_first, report.only_in_second)
    details += [_values("config.json", report.config), *_beside(report.beside)]
    return summary, details + [(t.name, _tensor(t)) for t in report.tensors[:SHOWN]] + _more(report.tensors)


def _overlap(rms: float | None, random: float | None) -> str | None:
    return None if rms is None or random is None else f"{rms:.3f}; random subspaces {random:.3f}"


def _share(share: float | None, of: str) -> str | None:
    return None if share is None else f"{percent(share)} {of}"


def _module(module: "ModuleDifference") -> str:
    if module.shapes[0] is None or module.shapes[1] is None:
        side = "second" if module.shapes[0] is None else "first"
        return f"only in {side}, norm {max(module.norms):.4g}, rank {max(module.ranks)}"
    if module.shapes[0] != module.shapes[1]:
        return f"shapes {shape(module.shapes[0])} and {shape(module.shapes[1])}"
    ranks = f"rank {module.ranks[0]}" if module.ranks[0] == module.ranks[1] else "ranks {} and {}".format(*module.ranks)
    return f"difference {percent(module.relative)}, cosine {module.cosine:+.4f}, {ranks}"


def _tensor(tensor: "TensorDifference") -> str:
    parts = []
    if tensor.shapes[0] != tensor.shapes[1]:
        parts.append(f"{shape(tensor.shapes[0])} and {shape(tensor.shapes[1])}")
    if tensor.dtypes[0] != tensor.dtypes[1]:
        parts.append(f"{tensor.dtypes[0]} and {tensor.dtypes[1]}")
    if tensor.relative is not None:
        parts.append(f"difference {percent(tensor.relative)}")
    if tensor.compared:
        parts.append(f"{percent(tensor.changed / tensor.compared)} of the elements")
    if tensor.change is not None:
        parts.append(f"{percent(tensor.change.energy['16'])} of it in 16 directions")
    return ", ".join([*parts, *([tensor.remark] if tensor.remark else [])])


def _beside(beside: "FilesDifference") -> list[Row]:
    files = sorted({value.file for value in beside.values})
    rows = [_values(file, [value for value in beside.values if value.file == file]) for file in files]
    for found in beside.files[:SHOWN]:
        absent = [side for side, digest in zip(("first", "second"), found.sha256, strict=True) if digest is None]
        rows.append((found.file, f"not in {absent[0]}" if absent else "differs"))
    rows += _more(beside.files)
    for template in beside.templates:
        where = " and ".join(file or "absent" for file in template.files)
        changed = sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in template.lines)
        rows.append((f"chat template {template.name}", f"{counted(changed, 'line', 'differ')} ({where})"))
    return rows


def _values(label: str, values: Sequence["ValueDifference"]) -> Row:
    lines = [f"{v.key}: {_short(v.first)} -> {_short(v.second)}" for v in values[:SHOWN]]
    more = [f"and {counted(len(values) - SHOWN, 'more key')}"] if len(values) > SHOWN else []
    return label, "\n".join([*lines, *more])


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 2]} …"


def _only_in(kind: str, first: Sequence[str], second: Sequence[str]) -> list[Row]:
    return [
        (f"only in {side}", f"{counted(len(names), kind)}: {names[0]}{', …' if len(names) > 1 else ''}")
        for side, names in (("first", first), ("second", second))
        if names
    ]


def _range(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return span((found[0], found[-1])) if found else "0"


def _more(found: Sequence[object]) -> list[Row]:
    return [("…", f"{len(found) - SHOWN:,} more in --json")] if len(found) > SHOWN else []
