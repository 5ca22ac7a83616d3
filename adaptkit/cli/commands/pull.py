"""``adaptkit pull``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import counted, notes, show, size
from adaptkit.cli.progress import byte_progress
from adaptkit.hub.options import PullOptions


@click.command()
@click.argument("repo")
@settings_options(PullOptions)
@output_options
def command(repo: str, output: Path, force: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Download the artifact REPO from the Hub and verify it.

    REPO is org/name[@branch, tag or commit]. The output folder appears only if it matches the manifest.

    With --only, the folder gets its own manifest, which lists the downloaded files and names the whole artifact by its
    hash.
    """
    from adaptkit.hub.options import PullOptions
    from adaptkit.hub.pull import pull

    wanted = chosen(PullOptions, options)
    with byte_progress("pull", as_json or quiet) as progress:
        report = pull(repo, output, wanted, force=force, progress=progress, note=notes(quiet))
    what = f"{report.kind}, {counted(report.files, 'file')}, {size(report.bytes)}, all verified"
    whole, left_out, signature = "", None, None
    if report.left_out:
        whole = " of the whole artifact"
        left_out = f"{counted(len(report.left_out), 'file')}; the manifest there lists only the files downloaded"
    if report.signed:
        unchecked = "present, not checked: to check it, pass --public-key or --identity"
        signature = f"by {report.signed_by}" if report.signed_by else unchecked
    rows = [
        ("pulled", f"{report.output}: {what}"),
        ("left out", left_out),
        ("commit", report.commit),
        ("manifest sha256", f"{report.manifest_sha256}{whole}"),
        ("signature", signature),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
