"""``adaptkit quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from adaptkit.cli.options import Size, html_option, output_options, threads_option
from adaptkit.cli.output import WORST, Row, check_page, counted, percent, show, size, write_whole
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import byte_progress, count_progress
from adaptkit.errors import UsageError
from adaptkit.formats._format import writable

if TYPE_CHECKING:
    from adaptkit.operations.quantize import QuantizeReport

_OF_CALIBRATION = ("calibration_tokens", "window", "compensate", "init_adapter", "bits_budget")
"""Options that need --calibrate."""


@click.command()
@click.argument("source", type=ArtifactPath())
@output_options
@click.option("--format", default="nf4", show_default=True, type=click.Choice(writable()))
@click.option("--block-size", default=64, show_default=True, help="Weights per constant; a power of two.")
@click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the constants too.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Modules to keep in 16 bits: '*.down_proj'. Repeatable.")
@click.option("--include-head", is_flag=True, help="Quantize the output layer too.")
@click.option(
    "--moe",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "quantize"]),
    help="Experts; only adaptkit, not bitsandbytes, loads them quantized.",
)
@click.option(
    "--calibrate",
    type=LocalPath(),
    multiple=True,
    metavar="FILE",
    help="Text, or rows as for train: choose constants and codes by the model's activations on it. Repeatable.",
)
@click.option(
    "--calibration-tokens", type=click.IntRange(min=2), default=8192, show_default=True,
    help="With --calibrate: maximum number of tokens.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(min=2), default=512, show_default=True,
    help="With --calibrate: tokens per sequence.",
)  # fmt: skip
@click.option(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="With --calibrate: each column compensates the error of those before it. Slower, closer.",
)
@click.option(
    "--init-adapter",
    type=click.IntRange(min=1),
    metavar="RANK",
    help="With --calibrate: also write an adapter that offsets much of the loss, for train --init.",
)
@click.option("--init-adapter-output", type=LocalPath(), help="Folder of that adapter.  [default: <output>-init]")
@click.option(
    "--bits-budget",
    type=float,
    metavar="BITS",
    help="With --calibrate: spend bits where they help most, up to this average per quantized weight, such as 4.5.",
)
@click.option("--max-shard-size", "max_shard_bytes", type=Size(), default="5GB", show_default=True)
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
@html_option
@threads_option
def command(
    source: Path,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    html: Path | None,
    calibrate: tuple[Path, ...],
    calibration_tokens: int,
    window: int,
    init_adapter: int | None,
    bits_budget: float | None,
    compensate: bool,
    init_adapter_output: Path | None,
    **options: Any,
) -> None:
    """Quantize the checkpoint SOURCE to NF4, FP4 or int8.

    transformers with bitsandbytes, vLLM and unsloth load NF4 and FP4; only adaptkit loads int8.
    SOURCE has 16- or 32-bit weights, or was released in FP8 with scales for blocks (DeepSeek-V3)
    or MXFP4 (gpt-oss).
    """
    from adaptkit.operations.quantize import Calibration, QuantizeOptions, quantize

    source_of = click.get_current_context().get_parameter_source
    given = [name for name in _OF_CALIBRATION if source_of(name) is not ParameterSource.DEFAULT]
    if given and not calibrate:
        option = "no_compensate" if given[0] == "compensate" and not compensate else given[0]
        raise UsageError(
            f"--{option.replace('_', '-')}: needs --calibrate", hint="add --calibrate FILE, with text to calibrate on"
        )
    calibration = None
    if calibrate:
        calibration = Calibration(
            files=calibrate,
            tokens=calibration_tokens,
            window=window,
            init_rank=init_adapter,
            bits_budget=bits_budget,
            compensate=compensate,
        )
    chosen = QuantizeOptions(calibration=calibration, **options)
    check_page(html)
    hidden = as_json or quiet
    with byte_progress("quantize", hidden) as progress, count_progress("calibrate", hidden) as calibration_progress:
        report = quantize(
            source,
            output,
            chosen,
            force=force,
            dry_run=dry_run,
            companion=init_adapter_output,
            progress=progress,
            calibration_progress=calibration_progress,
        )
    rows = quantize_rows(report, dry_run)
    if html is not None:
        from adaptkit.cli.pages.quantize import quantize_page

        write_whole(html, quantize_page(report, rows))
    show(report, rows, as_json=as_json, quiet=quiet)


def quantize_rows(report: "QuantizeReport", dry_run: bool) -> list[Row]:
    """Return labels and values of a report, for the terminal and the page."""
    # A reason of one word is a kind of tensor; the others are phrases, such as "not a matrix".
    kept = ", ".join(f"{n:,} {why}" if " " in why else counted(n, why) for why, n in report.kept.items())
    part = f"{report.quantized_parameters:,} of {report.parameters:,}"
    left_out = f"; left out {counted(report.input_scales, 'scale')} of 8-bit inputs" if report.input_scales else ""
    relative = worst = weighted = more = None
    if report.relative_error is not None:
        relative = f"{percent(report.relative_error)} of the weights' norm"
        measured = [(t.relative_error, t.name) for t in report.tensors if t.relative_error is not None]
        largest = sorted(measured, key=lambda found: (-found[0], found[1]))[:WORST]
        worst = "\n".join(f"{percent(error)} {name}" for error, name in largest)
    if report.weighted_error is not None:
        inputs = counted(report.calibrated, "calibrated matrix")
        weighted = f"{percent(report.weighted_error)}, weighted by the inputs of {inputs}"
    if report.upgrades:
        count = counted(len({upgrade.module for upgrade in report.upgrades}), "matrix")
        gain = f"{sum(upgrade.gain for upgrade in report.upgrades):.4f} nats"
        first = "\n".join(f"{upgrade.module}: {upgrade.to}" for upgrade in report.upgrades[:WORST])
        more = f"{count} in {counted(len(report.upgrades), 'step')}, expected gain {gain}; first:\n{first}"
    return [
        ("would write" if dry_run else "wrote", f"{report.output} ({counted(report.shards, 'shard')})"),
        ("size", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"),
        ("source", f"{report.decoded_from}, decoded to bfloat16{left_out}" if report.decoded_from else None),
        ("quantized", f"{counted(report.quantized, 'matrix')}, {part} parameters"),
        ("bits per weight", f"{report.bits_per_parameter:.3f} in the quantized matrices, including constants"),
        ("linear layers", f"read from {report.read_from}"),
        ("kept as is", kept or "nothing"),
        ("relative error", relative),
        ("worst", worst),
        ("weighted error", weighted),
        ("more bits for", more),
        ("companion", f"{report.companion}; start from it with train --init" if report.companion else None),
        ("manifest sha256", report.manifest_sha256),
    ]
