"""``adaptkit plan``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import InSections, chosen, report_options, settings_options
from adaptkit.cli.output import Row, aligned, counted, percent, show, size
from adaptkit.cli.paths import ConfigPath
from adaptkit.training.plan_options import PlanOptions


@click.command(cls=InSections)
@click.argument("model", type=ConfigPath())
@settings_options(PlanOptions)
@report_options
def command(model: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Predict the memory and parameters of fine-tuning MODEL.

    MODEL is a folder, its config.json, or org/name[@revision] on the Hub, from which only config.json is downloaded.

    Prints memory by part and trainable parameters by rank. The options are those of train.
    """
    from adaptkit.training.plan import plan

    report = plan(model, chosen(PlanOptions, options))
    share = percent(report.trainable_parameters / report.parameters)
    released = f", without {size(report.released_bytes)} released after use" if report.released_bytes else ""
    ranks = [(f"{r.rank}", f"{r.parameters:,}", percent(r.fraction), f"{r.one_square:,}") for r in report.ranks]
    rows: list[Row] = [
        ("model", f"{report.architecture}, {report.parameters:,} parameters"),
        ("method", f"{report.method}, {report.compute_dtype}"),
        ("device", report.device),
        ("trainable", f"{counted(report.trainable_parameters, 'parameter')} ({share})"),
        ("layers", report.checkpointing),
        *((name, size(count) + (released if name == "weights" else "")) for name, count in report.memory.items()),
        ("total", size(report.total_bytes)),
        *(("note", note) for note in report.notes),
        ("by rank", "\n".join(aligned([("rank", "trainable", "of the model", "2 r √N"), *ranks], right=range(4)))),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
