"""``adaptkit extract``."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import WORST, Row, counted, percent, show, span
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.operations.options import ExtractOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptkit.operations.extract import ExtractedModule, ExtractReport, OtherTensor


@click.command()
@click.argument("tuned", type=ArtifactPath())
@click.argument("base", type=ArtifactPath())
@output_options
@settings_options(ExtractOptions)
@click.option("--dry-run", is_flag=True, help="Plan and validate only, without reading weights.")
def command(
    tuned: Path, base: Path, output: Path, force: bool, as_json: bool, quiet: bool, dry_run: bool, **options: Any
) -> None:
    """Extract the adapter that turns the checkpoint BASE into TUNED.

    The changes of linear layers become low-rank matrices; other tensors that differ are stored in full. The report
    says what is lost.
    """
    from adaptkit.operations.extract import extract

    with byte_progress("extract", as_json or quiet) as progress:
        report = extract(
            tuned,
            base,
            output,
            chosen(ExtractOptions, options),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    rows = _planned(report) if dry_run else _rows(report)
    show(report, rows, as_json=as_json, quiet=quiet)


def _planned(report: "ExtractReport") -> list[Row]:
    return [
        ("would write", report.output),
        ("would compare", f"{counted(report.tensors, 'tensor')}, {report.candidates} of them weights of linear layers"),
        ("linear layers", f"read from {report.read_from}"),
        *report.remarks.items(),
    ]


def _rows(report: "ExtractReport") -> list[Row]:
    none = f"none; {report.placeholder} gets a zero change, since peft needs at least one"
    left_out = f"{percent(report.left_out_energy)} of the squared norm of everything that differs"
    copied = f"from the tuned checkpoint: {', '.join(report.tokenizer)}"
    return [
        ("wrote", report.output),
        ("equal", f"{report.equal} of {counted(report.tensors, 'tensor')}"),
        *(_low_rank(report) if report.modules else ()),
        ("low-rank", none if report.placeholder else None),
        ("saved whole", _named(report.saved)),
        ("left out", _named(report.left_out)),
        ("", left_out if report.left_out else None),
        ("also copied", copied if report.tokenizer else None),
        *report.remarks.items(),
        ("manifest sha256", report.manifest_sha256),
    ]


def _low_rank(report: "ExtractReport") -> list[Row]:
    kept = f"kept {_kept(report.energy_kept)} of the change; {counted(report.below_90, 'module')} below 90 %"
    rounding = f"to the tuned weights' dtype is about {percent(report.rounding)} of the change"
    missed = f"{counted(report.unreached, 'module', 'keep')} less than --energy asks for; raise --max-rank"
    worst = sorted(report.modules, key=lambda module: (module.energy_kept, module.module))[:WORST]
    return [
        ("low-rank", f"{counted(len(report.modules), 'module')}, rank {span(report.ranks)}"),
        ("parameters", f"{report.parameters:,}"),
        ("change", f"{kept}; relative error {percent(report.relative_error)}"),
        ("rounding", rounding if report.rounding >= 0.001 else None),
        ("not reached", missed if report.unreached else None),
        ("kept least", "\n".join(_line(module) for module in worst)),
    ]


def _kept(share: float) -> str:
    """Format a share, rounding down near 100 % so that an incomplete one is not shown as 100 %."""
    is_close = 0.9995 <= share < 1 - 1e-6
    return f"{math.floor(1e4 * share) / 100} %" if is_close else percent(share)


def _line(module: "ExtractedModule") -> str:
    more = f"99 % needs rank {module.rank_99}" if module.rank_99 else "99 % needs a larger rank"
    return f"{_kept(module.energy_kept)} {module.module} (rank {module.rank}; {more})"


def _named(tensors: "Sequence[OtherTensor]") -> str | None:
    if not tensors:
        return None
    kinds = Counter(tensor.why for tensor in tensors)
    counts = ", ".join(f"{count} {why}" for why, count in sorted(kinds.items()))
    first = "\n".join(tensor.name for tensor in tensors[:WORST])
    more = f"\nand {len(tensors) - WORST} more" if len(tensors) > WORST else ""
    return f"{counted(len(tensors), 'tensor')} ({counts})\n{first}{more}"
