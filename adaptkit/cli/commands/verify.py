"""``adaptkit verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.lineage import tree
from adaptkit.cli.options import chosen, report_options, settings_options
from adaptkit.cli.output import Row, counted, show, size
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.operations.options import VerifyOptions

if TYPE_CHECKING:
    from adaptkit.operations.verify import VerifyReport


@click.command()
@click.argument("path", type=ArtifactPath())
@settings_options(VerifyOptions)
@report_options
def command(path: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check every byte of the artifact PATH against its manifest.

    With --parents, also checks what it was made from; with a key or an identity, who signed it.
    """
    from adaptkit.operations.verify import verify

    wanted = chosen(VerifyOptions, options)
    with byte_progress("verify", as_json or quiet) as progress:
        report = verify(path, wanted, progress=progress)
    show(report, _rows(report), as_json=as_json, quiet=quiet)


def _rows(report: "VerifyReport") -> list[Row]:
    what = f"{report.kind}, exactly {counted(report.files, 'file')}, {size(report.bytes)}"
    is_unchecked = report.signed_by is None and report.signature
    return [
        ("verified", f"{report.path}: {what}"),
        ("tensors", f"{report.tensors} match their fingerprints"),
        ("signed", None if report.signed_by is None else f"by {report.signed_by}"),
        ("signature", "not checked; give --public-key or --identity" if is_unchecked else None),
        ("made from", "\n".join(tree(report.parents))),
        *(("recomputed", f"{folder}: {found}") for folder, found in report.recomputed),
        ("manifest sha256", report.manifest_sha256),
    ]
