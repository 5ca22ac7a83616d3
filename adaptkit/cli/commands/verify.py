"""``adaptkit verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.lineage import tree
from adaptkit.cli.options import report_options, threads_option, trust_in
from adaptkit.cli.output import Row, counted, show, size
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import byte_progress

if TYPE_CHECKING:
    from adaptkit.operations.verify import VerifyReport


@click.command()
@click.argument("path", type=ArtifactPath())
@click.option("--manifest-sha256", metavar="HASH", help="Required sha256 of the manifest.")
@click.option(
    "--parents",
    type=LocalPath(),
    multiple=True,
    metavar="DIR",
    help="Also verify its parents, found here: an artifact, or a folder of artifacts. Repeatable.",
)
@click.option("--recompute", is_flag=True, help="Rebuild it and its parents from their own parents, and compare.")
@click.option(
    "--signature", type=LocalPath(), metavar="FILE", help="Signature file. [default: adaptkit-manifest.sig in PATH]"
)
@click.option(
    "--public-key", type=LocalPath(), metavar="FILE", help="Require a signature by this key; PEM, P-256 and up."
)
@click.option("--identity", help="Require a keyless signature by this identity, such as an e-mail address.")
@click.option("--identity-provider", metavar="URL", help="Provider of that identity.")
@threads_option
@report_options
def command(
    path: Path,
    parents: tuple[Path, ...],
    public_key: Path | None,
    identity: str | None,
    identity_provider: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Check every byte of the artifact PATH against its manifest.

    With --parents, also checks what it was made from; with a key or an identity, who signed it.
    """
    from adaptkit.operations.verify import VerifyOptions, verify

    trust = trust_in(public_key, identity, identity_provider)
    chosen = VerifyOptions(trust=trust, parents=parents or None, **options)
    with byte_progress("verify", as_json or quiet) as progress:
        report = verify(path, chosen, progress=progress)
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
