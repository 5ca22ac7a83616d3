"""``adaptkit adopt``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import Row, counted, show, size
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.operations.options import AdoptOptions

if TYPE_CHECKING:
    from adaptkit.operations.adopt import AdoptReport


@click.command()
@click.argument("source", type=ArtifactPath())
@output_options
@click.option("--base", type=ArtifactPath(), help="16-bit checkpoint that the adapter was trained on.")
@click.option("--dry-run", is_flag=True, help="Check everything; write nothing.")
@settings_options(AdoptOptions)
def command(
    source: Path,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    base: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Give an adapter or checkpoint of another tool a manifest.

    Writes a copy of SOURCE, byte for byte, that can be verified and published. If --base names what an adapter was
    trained on, merge and train reject any other base.
    """
    from adaptkit.operations.adopt import adopt

    with byte_progress("adopt", as_json or quiet) as progress:
        report = adopt(
            source,
            output,
            chosen(AdoptOptions, options),
            base=base,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, _rows(report, dry_run), as_json=as_json, quiet=quiet)


def _rows(report: "AdoptReport", dry_run: bool) -> list[Row]:
    what = f"{report.kind}, {counted(len(report.files), 'file')}, {size(report.bytes)}"
    base = None
    if report.base is not None:
        changed = counted(report.base_fingerprints, "changed tensor")
        base = f"{report.base}: fingerprints of {changed} recorded, so another base will be rejected"
    elif report.kind == "adapter":
        base = "unknown, so a wrong one cannot be rejected; add --base BASE to record it"
    return [
        ("would write" if dry_run else "wrote", f"{report.output} ({what})"),
        ("tensors", f"{report.tensors:,}"),
        ("base", base),
        ("not copied", ", ".join(map(_printable, report.not_copied))),
        ("manifest sha256", report.manifest_sha256),
    ]


def _printable(name: str) -> str:
    """Return a file's name with control characters, which could change what a terminal shows, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
