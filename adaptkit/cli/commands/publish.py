"""``adaptkit publish``."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, report_file_option, report_options, settings_options, signer_with
from adaptkit.cli.output import Row, check_report_file, counted, notes, show, size, write_report
from adaptkit.cli.paths import LocalPath
from adaptkit.cli.progress import byte_progress
from adaptkit.errors import UsageError
from adaptkit.hub.options import PublishOptions

if TYPE_CHECKING:
    from adaptkit.checkpoint.signing import Signer
    from adaptkit.hub.publish import PublishReport


@click.command()
@click.argument("path", type=click.Path())
@click.argument("repo")
@settings_options(PublishOptions)
@click.option("--sign", "key", type=LocalPath(), metavar="KEY", help="Sign the manifest with this key.")
@click.option(
    "--sign-keyless", is_flag=True, help="Sign it with the identity of the CI job, or of the user who logs in."
)
@click.option("--dry-run", is_flag=True, help="Show what would be sent; write nothing.")
@report_file_option
@report_options
def command(
    path: str,
    repo: str,
    key: Path | None,
    sign_keyless: bool,
    dry_run: bool,
    output_file: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Publish the artifact PATH to REPO on the Hub, in one commit.

    REPO is org/name. The uploaded commit is compared with the manifest; files already on the Hub are not sent again.

    The token comes from HF_TOKEN, from `hf auth login`, or from the identity of a CI job (HF_OIDC_RESOURCE); the
    password of a key comes from ADAPTKIT_KEY_PASSWORD.
    """
    is_silent = as_json or quiet or not sys.stderr.isatty()
    # Set before the import, when huggingface_hub reads it; without it, the function shows no bars.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if is_silent else "0")
    from adaptkit.hub.options import PublishOptions
    from adaptkit.hub.publish import PublishReport, publish

    if output_file:
        if Path(os.path.realpath(output_file)).is_relative_to(os.path.realpath(path)):
            raise UsageError(
                f"{output_file}: is inside the artifact, which has to stay as it is",
                hint="choose another --output-file",
            )
        check_report_file(output_file, PublishReport)
    wanted = chosen(PublishOptions, options, signer=_signer(key, sign_keyless))
    with byte_progress("check", as_json or quiet) as progress:
        report = publish(path, repo, wanted, dry_run=dry_run, progress=progress, note=notes(quiet))
    if output_file and not dry_run:
        write_report(report, output_file)
    show(report, _rows(report, dry_run), as_json=as_json, quiet=quiet)


def _signer(key: Path | None, keyless: bool) -> "Signer | None":
    from adaptkit.checkpoint.signing import Signer

    if key is None:
        return Signer() if keyless else None
    if keyless:
        raise click.UsageError("--sign and --sign-keyless cannot be combined")
    return signer_with(key)


def _rows(report: "PublishReport", dry_run: bool) -> list[Row]:
    what = f"{counted(len(report.files_added), 'file')}, {size(report.bytes_sent)}"
    what += f", {counted(len(report.files_deleted), 'deletion')}"
    return [
        ("would send" if dry_run else "sent", "nothing: already published" if report.already_there else what),
        ("commit", report.commit or "none yet"),
        ("tag", report.tag),
        ("pull request", f"{report.pull_request}, {report.url}" if report.pull_request else None),
        ("manifest sha256", report.manifest_sha256),
        ("signature", "adaptkit-manifest.sig" if report.signed else None),
        ("checked", "downloaded again; every byte matches" if report.checked else None),
    ]
