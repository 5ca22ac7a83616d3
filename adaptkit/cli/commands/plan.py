"""``adaptkit plan``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import report_options
from adaptkit.cli.output import Row, counted, percent, show, size
from adaptkit.cli.paths import ConfigPath


@click.command()
@click.argument("model", type=ConfigPath())
@click.option("--method", type=click.Choice(("full", "lora", "qlora")), default="qlora", show_default=True)
@click.option("--rank", type=int, default=16, show_default=True, help="Rank of the adapter.")
@click.option("--seq-len", type=int, default=1024, show_default=True, help="Tokens per row.")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows per forward pass.")
@click.option(
    "--checkpointing", default="layer", show_default=True,
    help="Activation checkpointing: none, layer, sqrt, segments:K or budget:MIB.",
)  # fmt: skip
@click.option("--offload-checkpoints", is_flag=True, help="Keep the inputs of segments in host memory.")
@click.option("--optimizer", type=click.Choice(("adamw", "adamw8bit")), default="adamw", show_default=True)
@click.option(
    "--targets", multiple=True, help="Shell pattern of module paths that get an adapter. Repeatable. [default: *]"
)
@click.option(
    "--moe", type=click.Choice(("keep", "quantize")),
    help="With qlora, experts: in 16 bits, or quantized by quantize --moe quantize. [default: as in MODEL if it is "
    "quantized, otherwise keep]",
)  # fmt: skip
@click.option(
    "--compute-dtype", type=click.Choice(("bfloat16", "float32")), default="bfloat16", show_default=True,
    help="Dtype of activations and of unquantized weights.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True,
    help="auto: a GPU if this machine has one, or with --offload-checkpoints.",
)  # fmt: skip
@report_options
def command(model: Path, targets: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Predict the memory and parameters of fine-tuning MODEL.

    MODEL is a folder, its config.json, or org/name[@revision] on the Hub, from which only config.json is downloaded.

    Prints memory by part and trainable parameters by rank.
    """
    from adaptkit.training.plan import PlanOptions, plan

    report = plan(model, PlanOptions(targets=targets or ("*",), **options))
    share = percent(report.trainable_parameters / report.parameters)
    released = f", without {size(report.released_bytes)} released after use" if report.released_bytes else ""
    rows: list[Row] = [
        ("model", f"{report.architecture}, {report.parameters:,} parameters"),
        ("method", f"{report.method}, {options['compute_dtype']}"),
        ("device", report.device),
        ("trainable", f"{counted(report.trainable_parameters, 'parameter')} ({share})"),
        ("layers", report.checkpointing),
        *((name, size(count) + (released if name == "weights" else "")) for name, count in report.memory.items()),
        ("total", size(report.total_bytes)),
        *(("note", note) for note in report.notes),
        ("", ""),
        ("rank", f"{'trainable':>15}  {'of the model':>12}  {'2 r √N':>13}"),
    ]
    rows += [
        (str(row.rank), f"{row.parameters:>15,}  {percent(row.fraction):>12}  {row.one_square:>13,}")
        for row in report.ranks
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
