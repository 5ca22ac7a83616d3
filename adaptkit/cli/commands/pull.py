"""``adaptkit pull``."""

from pathlib import Path

import click

from adaptkit.cli.options import output_options
from adaptkit.cli.output import show, size
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("repo")
@output_options
def command(repo: str, output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Download the artifact REPO (org/name[@revision]) and verify it before it appears."""
    from adaptkit.hub.download import pull

    repo_id, at, revision = repo.partition("@")
    if at and not revision:
        raise click.UsageError(f"{repo}: the revision after @ is empty")
    with byte_progress("pull", as_json or quiet) as progress:
        report = pull(repo_id, output, revision=revision or None, force=force, progress=progress)
    rows = [
        ("pulled", f"{report.output}: {report.kind}, {report.files} files, {size(report.bytes)}, all verified"),
        ("commit", report.commit),
        ("manifest sha256", report.manifest_sha256),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
