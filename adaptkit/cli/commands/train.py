"""``adaptkit train``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import ArtifactPath, output_options
from adaptkit.cli.output import show
from adaptkit.cli.progress import step_progress


@click.command()
@click.option("--base", type=ArtifactPath(), help="NF4 checkpoint that quantize made.")
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="jsonl file. Repeatable.")
@output_options
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML or JSON file of these options.")
@click.option("--rank", type=int, help="Of the adapter's matrices. [16]")
@click.option("--alpha", type=float, help="The change is scaled by alpha / rank. [32]")
@click.option(
    "--targets", multiple=True, metavar="PATTERN", help="Layers that get an adapter. [all linear] Repeatable."
)
@click.option("--init", help="Of A: kaiming or normal; or an adapter's folder to begin with. [kaiming]")
@click.option("--dropout", type=float, help="Of the adapter's input. [0]")
@click.option("--steps", type=int, help="Optimizer steps; default: as many as the epochs take.")
@click.option("--epochs", type=float, help="Passes over the data. [1]")
@click.option("--batch-size", type=int, help="Samples in a step. [8]")
@click.option("--micro-batch-size", type=int, help="Samples at a time. [the whole batch]")
@click.option("--max-length", type=int, help="Tokens of a sample. [1024]")
@click.option("--learning-rate", type=float, help="[2e-4]")
@click.option("--schedule", help="constant, linear or cosine. [constant]")
@click.option("--warmup", type=float, help="Fraction of the steps. [0.03]")
@click.option("--weight-decay", type=float, help="[0]")
@click.option("--max-grad-norm", type=float, help="0 leaves gradients as they are. [1]")
@click.option("--checkpointing", help="none, layer, sqrt or segments:K. [layer]")
@click.option("--optimizer-pages-mib", type=float, help="Resident optimizer state; the rest is paged. [all]")
@click.option("--page-kib", type=int, help="Size of a page. [512]")
@click.option("--compute-dtype", help="bfloat16 or float32. [bfloat16]")
@click.option("--held-out", type=float, help="Fraction not trained on, measured before and after. [0.1]")
@click.option("--eval-every", type=int, help="Steps; 0: only before and after. [0]")
@click.option("--save-every", type=int, help="Steps between checkpoints; 0: none. [50]")
@click.option("--seed", type=int, help="[0]")
@click.option("--device", help="cpu, cuda or auto. [auto]")
def command(
    base: Path | None,
    data: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Train a LoRA adapter on an NF4 checkpoint (QLoRA).

    Every option is also a key of the --config file (dashes as underscores); the command line wins. A killed run goes on
    when the same command is given again.
    """
    from adaptkit.training.config import TrainConfig, read_config_file
    from adaptkit.training.loop import train

    given = {"base": str(base) if base else None, "data": [str(path) for path in data]} | options
    values = read_config_file(config_file) if config_file else {}
    values |= {name: value for name, value in given.items() if value not in (None, (), [])}
    config = TrainConfig.from_values(values, str(config_file) if config_file else "options")
    with step_progress(as_json or quiet) as on_step:
        report = train(config, output, force=force, on_step=on_step)
    rows = [
        ("wrote", report.output),
        ("trained", f"{report.trainable_parameters:,} parameters, {report.steps} steps, {report.samples} samples"),
        ("speed", f"{report.tokens_per_second:.0f} tokens/s"),
        ("memory", f"{report.segments or 'no'} checkpointed segments"),
        (
            "optimizer state",
            "{slots} of {pages} pages resident, {faults} faults, {write_backs} write-backs".format(**report.paging),
        ),
    ]
    if report.resumed_from:
        rows.insert(1, ("went on from", f"step {report.resumed_from}"))
    if report.held_out_before is not None and report.held_out_after is not None:
        rows.insert(2, ("held-out loss", f"{report.held_out_before:.4f} -> {report.held_out_after:.4f}"))
    if report.truncated or report.dropped:
        rows.append(
            ("cut", f"{report.truncated} samples to max_length; {report.dropped} lost their answer and were left out")
        )
    rows.append(("manifest sha256", report.manifest_sha256))
    show(report, rows, as_json=as_json, quiet=quiet)
