"""``adaptkit unmerge``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import output_options, threads_option
from adaptkit.cli.output import counted, show
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("merged", type=ArtifactPath())
@output_options
@click.option(
    "--adapter",
    "adapters",
    type=ArtifactPath(),
    multiple=True,
    help="Adapter that was merged. Repeatable. Default: the copies stored by merge --embed-adapter.",
)
@threads_option
def command(
    merged: Path,
    adapters: tuple[Path, ...],
    output: Path,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Remove adapters from MERGED, restoring its base bit for bit."""
    from adaptkit.operations.unmerge import unmerge

    with byte_progress("unmerge", as_json or quiet) as progress:
        report = unmerge(merged, adapters, output, progress=progress, **options)
    rows = [
        ("wrote", report.output),
        ("unmerge", f"identical: all {report.tensors} tensors have the base's fingerprints"),
        ("restored", counted(report.restored, "tensor")),
        ("tensors root", report.tensors_root),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
