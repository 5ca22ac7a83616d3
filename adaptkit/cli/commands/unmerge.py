"""``adaptkit unmerge``."""

from pathlib import Path

import click

from adaptkit.cli.options import ArtifactPath, output_options, threads_option
from adaptkit.cli.output import show
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("merged", type=ArtifactPath())
@output_options
@click.option(
    "--adapter", "adapters", type=ArtifactPath(), multiple=True, required=True, help="That was merged. Repeatable."
)
@threads_option
def command(
    merged: Path,
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    threads: int | None,
) -> None:
    """Take adapters out of MERGED again, back to the very bytes of its base."""
    from adaptkit.operations.unmerge import unmerge

    with byte_progress("unmerge", as_json or quiet) as progress:
        report = unmerge(merged, adapters, output, threads=threads, force=force, progress=progress)
    rows = [
        ("wrote", report.output),
        ("unmerge", f"identical: all {report.tensors} tensors have the base's fingerprints"),
        ("restored", f"{report.restored} weights"),
        ("tensors root", report.tensors_root),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
