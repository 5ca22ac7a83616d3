"""``adaptkit merge``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import Row, counted, percent, show
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.operations.options import MergeOptions

_CHANGED = "the changed weights match those that the adapters were trained on"
_LOST = (
    "the rest is below half a unit in the weights' last place; train longer, or use the adapter unmerged "
    "(docs/merge.md)"
)


@click.command()
@click.argument("base", type=ArtifactPath())
@click.argument("adapters", nargs=-1, required=True, type=ArtifactPath())
@output_options
@settings_options(MergeOptions)
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
def command(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Merge ADAPTERS into the 16-bit checkpoint BASE.

    The changes are summed exactly and rounded once; the base's shards, types and tokenizer are kept. If BASE is
    quantized, the checkpoint that it was made from is used, provided that it is in the same parent folder.
    """
    from adaptkit.operations.merge import LITTLE_KEPT, NOTHING_MOVED, merge

    wanted = chosen(MergeOptions, options)
    with byte_progress("merge", as_json or quiet) as progress:
        report = merge(base, adapters, output, wanted, force=force, dry_run=dry_run, progress=progress)
    verified = "unverified; names and shapes match"
    if report.base_verified:
        verified = "the one the adapters were trained on" if report.same_base else _CHANGED
    rows: list[Row] = [
        ("would write" if dry_run else "wrote", report.output),
        ("merged", f"{report.merged} of {counted(report.tensors, 'tensor')}"),
        ("base", "to be compared while merging" if dry_run and report.base_verified else verified),
        *(("note", text) for text in report.notes),
    ]
    if report.relative_delta is not None and report.moved is not None and report.effect is not None:  # not a dry run
        quantized = wanted.format != "keep"
        least = f"; least in {report.changes[0].name}, {percent(report.changes[0].effect)}" if report.changes else ""
        record = f"{report.undo_bits:.3f} bits per parameter" if wanted.undo and not quantized else "none"
        rows += [
            ("change", f"{percent(report.relative_delta)} of the weights' norm; {percent(report.moved)} of them moved"),
            ("change kept", f"{percent(report.effect)} after {'quantizing' if quantized else 'rounding'}{least}"),
            ("note", _LOST if report.effect < LITTLE_KEPT and not quantized else None),
            ("note", NOTHING_MOVED if report.effect >= LITTLE_KEPT and not report.moved else None),
            ("undo record", record),
            ("manifest sha256", str(report.manifest_sha256)),
        ]
    show(report, rows, as_json=as_json, quiet=quiet)
