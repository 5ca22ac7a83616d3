"""``adaptkit merge``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import Row, counted, percent, show
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress, count_progress
from adaptkit.formats._format import writable
from adaptkit.operations.options import MergeOptions

if TYPE_CHECKING:
    from adaptkit.operations.merge import MergeReport, TextEffect

_CHANGED = "the changed weights match those that the adapters were trained on"
_ONTO = {
    "original": "the 16-bit weights that the base was quantized from",
    "trained": "the values that the quantized base has",
}
_LOST = (
    "the rest is below half a unit in the weights' last place; train longer, or use the adapter unmerged "
    "(docs/merge.md)"
)
_LOST_IN_CODES = "the rest is less than half the distance of levels; --calibrate FILE or --format plain keeps more"


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
    """Merge ADAPTERS into the checkpoint BASE.

    The changes are summed exactly and rounded once; the base's shards, types and tokenizer are kept. If BASE is
    quantized, the 16-bit checkpoint that it was made from is used, provided that it is in the same parent folder. If
    BASE was released quantized, the result has its format: below 8 bits --calibrate decides what is rounded how.
    """
    from adaptkit.operations.merge import LITTLE_KEPT, NOTHING_MOVED, merge

    wanted, hidden = chosen(MergeOptions, options), as_json or quiet
    with byte_progress("merge", hidden) as progress, count_progress("run text", hidden) as text_progress:
        both = {"progress": progress, "text_progress": text_progress}
        report = merge(base, adapters, output, wanted, force=force, dry_run=dry_run, **both)
    verified = "unverified; names and shapes match"
    if report.base_verified:
        verified = "the one the adapters were trained on" if report.same_base else _CHANGED
    rows: list[Row] = [
        ("would write" if dry_run else "wrote", report.output),
        ("merged", f"{report.merged} of {counted(report.tensors, 'tensor')}"),
        ("onto", _ONTO.get(report.onto)),
        ("base", "to be compared while merging" if dry_run and report.base_verified else verified),
        *(("note", text) for text in report.notes),
    ]
    if report.relative_delta is not None and report.moved is not None and report.effect is not None:  # not a dry run
        quantized = wanted.format in writable()
        least = f"; least in {report.changes[0].name}, {percent(report.changes[0].effect)}" if report.changes else ""
        record = f"{report.undo_bits:.3f} bits per parameter" if report.undo_bits else "none"
        is_recoded = report.onto == "trained" and wanted.format == "keep"
        lost = _LOST if not is_recoded else _LOST_IN_CODES if report.outputs_effect is None else None
        rows += [
            ("change", f"{percent(report.relative_delta)} of the weights' norm; {percent(report.moved)} of them moved"),
            ("change kept", f"{percent(report.effect)} after {'quantizing' if quantized else 'rounding'}{least}"),
            ("outputs kept", _outputs(report)),
            ("quantization", _quantization(report)),
            *(("text", line) for line in _on_text(report.text)),
            ("note", lost if report.effect < LITTLE_KEPT and not quantized else None),
            ("note", NOTHING_MOVED if report.effect >= LITTLE_KEPT and not report.moved else None),
            ("undo record", record),
            ("manifest sha256", str(report.manifest_sha256)),
        ]
    show(report, rows, as_json=as_json, quiet=quiet)


def _outputs(report: "MergeReport") -> str | None:
    if report.outputs_effect is None:
        return None
    return f"{percent(report.outputs_effect)} of the change of the linears' outputs on the text"


def _quantization(report: "MergeReport") -> str | None:
    """Describe the distance of a quantized base from its original, and in which module it is largest."""
    if report.quantization_error is None:
        return None
    known = [c for c in report.changes if c.distance is not None and c.delta_norm]
    most = max(known, key=lambda c: (c.distance or 0) / c.delta_norm)
    return (
        f"the original and its quantized values differ by {report.quantization_error:.2f} times the change; most in "
        f"{most.name}, {(most.distance or 0) / most.delta_norm:.2f}"
    )


def _on_text(effect: "TextEffect | None") -> list[str]:
    """Describe how the result predicts a text."""
    if effect is None:
        return []
    losses = f"BASE {effect.base_loss:.4f}, with adapters {effect.adapted_loss:.4f}, merged {effect.merged_loss:.4f}"
    divergences = f"merged {effect.divergence:.5f}, BASE alone {effect.base_divergence:.5f}"
    if effect.other_loss is not None and effect.other_divergence is not None:
        losses += f"; with --onto {effect.other} {effect.other_loss:.4f}"
        divergences += f"; with --onto {effect.other} {effect.other_divergence:.5f}"
    return [
        f"loss over {counted(effect.tokens, 'token')}: {losses}",
        f"KL to BASE with adapters: {divergences}",
    ]
