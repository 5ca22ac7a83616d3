"""``adaptkit merge``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import output_options, threads_option, weight_option
from adaptkit.cli.output import Row, counted, percent, show
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress

_CHANGED = "the changed weights match those that the adapters were trained on"
_LOST = (
    "the rest is below half a unit in the weights' last place; train longer, or use the adapter unmerged "
    "(docs/merge.md)"
)


@click.command()
@click.argument("base", type=ArtifactPath())
@click.argument("adapters", nargs=-1, required=True, type=ArtifactPath())
@output_options
@weight_option
@click.option(
    "--format",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "nf4"]),
    help="keep: the base's types; nf4: merge into the 16-bit weights and quantize the result.",
)
@click.option(
    "--undo/--no-undo", default=True, show_default=True, help="Write the undo record that makes unmerge exact."
)
@click.option("--embed-adapter", is_flag=True, help="Store copies of the adapters in the output, for unmerge.")
@click.option("--untie", is_flag=True, help="Untie the head from the embedding if the merge makes them differ.")
@click.option("--allow-base-mismatch", is_flag=True, help="Merge into a base that the adapter was not trained on.")
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
@threads_option
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
    from adaptkit.operations.merge import LITTLE_KEPT, NOTHING_MOVED, MergeOptions, merge

    with byte_progress("merge", as_json or quiet) as progress:
        report = merge(base, adapters, output, MergeOptions(**options), force=force, dry_run=dry_run, progress=progress)
    verified = "unverified; names and shapes match"
    if report.base_verified:
        verified = "the one the adapters were trained on" if report.same_base else _CHANGED
    rows: list[Row] = [
        ("would write" if dry_run else "wrote", report.output),
        ("merged", f"{report.merged} of {counted(report.tensors, 'tensor')}"),
        ("base", "to be compared while merging" if dry_run and report.base_verified else verified),
        *(("note", text) for text in report.told),
    ]
    if report.relative_delta is not None and report.moved is not None and report.effect is not None:  # not a dry run
        quantized = options["format"] != "keep"
        least = f"; least in {report.changes[0].name}, {percent(report.changes[0].effect)}" if report.changes else ""
        record = f"{report.undo_bits:.3f} bits per parameter" if options["undo"] and not quantized else "none"
        rows += [
            ("change", f"{percent(report.relative_delta)} of the weights' norm; {percent(report.moved)} of them moved"),
            ("change kept", f"{percent(report.effect)} after {'quantizing' if quantized else 'rounding'}{least}"),
            ("note", _LOST if report.effect < LITTLE_KEPT and not quantized else None),
            ("note", NOTHING_MOVED if report.effect >= LITTLE_KEPT and not report.moved else None),
            ("undo record", record),
            ("manifest sha256", str(report.manifest_sha256)),
        ]
    show(report, rows, as_json=as_json, quiet=quiet)
