"""``adaptkit publish``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import report_options
from adaptkit.cli.output import show, size


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--branch", default="main", show_default=True)
@click.option("--tag", help="Name the new commit.")
@click.option("--private", is_flag=True, help="If the repository is created.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent; write nothing.")
@report_options
def command(path: Path, repo: str, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish the artifact PATH to the Hub repository REPO (org/name), in one commit, checked afterwards.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`.
    """
    from adaptkit.hub.publish import PublishOptions, publish

    report = publish(path, repo, PublishOptions(**options), dry_run=dry_run)
    what = f"{len(report.files_added)} file(s), {size(report.bytes_sent)}, {len(report.files_deleted)} deletion(s)"
    if report.already_there:
        what = "nothing: it is there already"
    rows = [
        ("would send" if dry_run else "sent", what),
        ("commit", report.commit or "none yet"),
        ("manifest sha256", report.manifest_sha256),
    ]
    if report.tag:
        rows.insert(2, ("tag", report.tag))
    show(report, rows, as_json=as_json, quiet=quiet)
