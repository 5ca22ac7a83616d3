"""``adaptkit stack``."""

from pathlib import Path

import click

from adaptkit.cli.options import ArtifactPath, output_options, weight_option
from adaptkit.cli.output import show


@click.command()
@click.argument("adapters", nargs=-1, required=True, type=ArtifactPath())
@output_options
@click.option("--method", default="cat", show_default=True, help="How the adapters are combined.")
@weight_option
def command(
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    method: str,
    weights: tuple[float, ...],
) -> None:
    """Combine ADAPTERS into one adapter."""
    from adaptkit.operations.stack import StackOptions, stack

    report = stack(adapters, output, StackOptions(method, weights), force=force)
    low, high = report.ranks
    rows = [
        ("wrote", report.output),
        ("stacked", f"{len(adapters)} adapters by {report.method}"),
        ("modules", f"{report.modules}, rank {low}" + (f" to {high}" if high != low else "")),
        ("manifest sha256", report.manifest_sha256),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
