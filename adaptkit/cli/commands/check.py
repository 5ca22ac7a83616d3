"""``adaptkit check``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.cli.options import report_options
from adaptkit.cli.output import Row, show
from adaptkit.cli.paths import ArtifactPath
from adaptkit.discovery import names
from adaptkit.operations import targets as registry

if TYPE_CHECKING:
    from adaptkit.operations.check import Verdict


@click.command()
@click.argument("path", type=ArtifactPath())
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(names(registry)),
    help="Program to check for. Repeatable. Default: all.",
)
@click.option("--base", type=ArtifactPath(), help="Base of the adapter, to compare modules and shapes with.")
@report_options
def command(path: Path, targets: tuple[str, ...], base: Path | None, as_json: bool, quiet: bool) -> int:
    """Check whether other programs load PATH correctly.

    PATH is an adapter or a checkpoint. Reads only configuration, names and shapes, and says what to change.

    Exits with 0 if every program loads it and computes what is meant, 1 if not.
    """
    from adaptkit.operations.check import check

    report = check(path, targets, base)
    rows: list[Row] = [
        ("checked", f"{report.path}: {report.kind}"),
        ("examined", "\n".join(report.examined)),
        *(row for verdict in report.verdicts for row in _rows(verdict)),
        ("not checked", "\n".join(report.unknown)),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
    return 0 if report.taken else 1


def _rows(verdict: "Verdict") -> list[Row]:
    word = "loads it correctly" if verdict.taken else "does not load it correctly"
    rows: list[Row] = [(verdict.target, f"{word} ({verdict.reader})")]
    said = ""
    for finding in verdict.findings:
        change = "same change as above" if finding.change == said else finding.change
        rows.append((f"  {finding.level}", f"{finding.found}\n{finding.effect}\n-> {change}"))
        said = finding.change
    return rows
