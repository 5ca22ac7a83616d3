"""``adaptkit train``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import ArtifactPath, given, output_options, settings_options
from adaptkit.cli.output import show
from adaptkit.cli.progress import step_progress
from adaptkit.training.config import TrainConfig
from adaptkit.training.settings import read_config_file


@click.command()
@output_options
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML or JSON file of these options.")
@settings_options(TrainConfig, base=ArtifactPath())
def command(output: Path, force: bool, as_json: bool, quiet: bool, config_file: Path | None, **options: Any) -> None:
    """Train a LoRA adapter on an NF4 checkpoint (QLoRA).

    Every option is also a key of the --config file (dashes as underscores); the command line wins. A killed run goes on
    when the same command is given again.
    """
    from adaptkit.training.loop import train

    values = read_config_file(config_file) if config_file else {}
    values |= given(TrainConfig, options)
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
