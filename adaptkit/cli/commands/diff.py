"""``adaptkit diff``."""

from pathlib import Path

import click

from adaptkit.cli.options import ArtifactPath, report_options
from adaptkit.cli.output import percent, show

_SHOWN = 8


@click.command()
@click.argument("first", type=ArtifactPath())
@click.argument("second", type=ArtifactPath())
@report_options
def command(first: Path, second: Path, as_json: bool, quiet: bool) -> int:
    """Compare two adapters, FIRST and SECOND. Exits with 0 if they are the same, 1 if they differ."""
    from adaptkit.operations.diff import diff

    report = diff(first, second)
    rows = [
        ("adapters", "the same" if report.same else "different"),
        ("norms", f"{report.norms[0]:.6g} and {report.norms[1]:.6g}"),
        ("cosine", f"{report.cosine:+.6f}"),
        ("difference", f"{percent(report.relative)} of the larger norm"),
        ("only in first", f"{len(report.only_in_first)} module(s)"),
        ("only in second", f"{len(report.only_in_second)} module(s)"),
    ]
    if not report.same:
        rows += [
            (m.module, f"cosine {m.cosine:+.4f}, difference {percent(m.relative)}, ranks {m.ranks[0]} and {m.ranks[1]}")
            for m in report.modules[:_SHOWN]
        ]
        more = len(report.modules) - _SHOWN
        rows += [("…", f"{more} more in --json")] if more > 0 else []
    show(report, rows, as_json=as_json, quiet=quiet)
    return 0 if report.same else 1
