"""``adaptkit resize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import WORST, Row, counted, percent, show, span
from adaptkit.cli.paths import ArtifactPath
from adaptkit.operations.options import ResizeOptions

if TYPE_CHECKING:
    from adaptkit.operations.resize import ResizeReport


@click.command()
@click.argument("adapter", type=ArtifactPath())
@output_options
@settings_options(ResizeOptions)
@click.option("--dry-run", is_flag=True, help="Report what would be lost; write nothing.")
def command(
    adapter: Path, output: Path, force: bool, as_json: bool, quiet: bool, dry_run: bool, **options: Any
) -> None:
    """Reduce the rank of ADAPTER.

    Each module becomes its best approximation; modules whose rank is already small enough are unchanged.
    """
    from adaptkit.operations.resize import resize

    report = resize(adapter, output, chosen(ResizeOptions, options), force=force, dry_run=dry_run)
    show(report, _rows(report, dry_run), as_json=as_json, quiet=quiet)


def _rows(report: "ResizeReport", dry_run: bool) -> list[Row]:
    worst = sorted(report.modules, key=lambda module: (-module.relative_error, module.module))[:WORST]
    least = "\n".join(f"{percent(m.energy_kept)} {m.module} (rank {m.rank_before} -> {m.rank})" for m in worst)
    return [
        ("would write" if dry_run else "wrote", report.output),
        ("resized", f"{counted(report.resized, 'module')}; {report.unchanged} unchanged"),
        ("rank", span(report.ranks)),
        ("parameters", f"{report.parameters_before:,} -> {report.parameters:,}"),
        ("kept", f"{percent(report.energy_kept)} of the squared norm; relative error {percent(report.relative_error)}"),
        ("kept least", least if report.resized else None),
        ("not padded", f"{counted(report.below, 'module', 'have')} a smaller rank already" if report.below else None),
        ("also copied", f"its copies of {', '.join(report.base_copies)}" if report.base_copies else None),
        ("also copied", ", ".join(report.tokenizer)),
        *(("note", text) for text in report.notes),
        ("manifest sha256", report.manifest_sha256),
    ]
