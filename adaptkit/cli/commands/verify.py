"""``adaptkit verify``."""

from pathlib import Path

import click

from adaptkit.cli.options import ArtifactPath, report_options, threads_option
from adaptkit.cli.output import show, size
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("path", type=ArtifactPath())
@click.option("--manifest-sha256", metavar="HASH", help="What the manifest itself must hash to.")
@threads_option
@report_options
def command(path: Path, manifest_sha256: str | None, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Check every byte of the artifact PATH against its manifest."""
    from adaptkit.operations.verify import verify

    with byte_progress("verify", as_json or quiet) as progress:
        report = verify(path, manifest_sha256=manifest_sha256, threads=threads, progress=progress)
    rows = [
        ("verified", f"{report.path}: {report.kind}, exactly {report.files} files, {size(report.bytes)}"),
        ("tensors", f"{report.tensors} match their fingerprints"),
        ("manifest sha256", report.manifest_sha256),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
