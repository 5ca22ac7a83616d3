"""``adaptkit quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import given, html_option, output_options, settings_options
from adaptkit.cli.output import WORST, Row, check_page, counted, percent, show, size, write_whole
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import byte_progress, count_progress
from adaptkit.errors import UsageError
from adaptkit.operations.options import QuantizeOptions

if TYPE_CHECKING:
    from adaptkit.operations.quantize import QuantizeReport


@click.command()
@click.argument("source", type=ArtifactPath())
@output_options
@settings_options(QuantizeOptions)
@click.option("--init-adapter-output", type=LocalPath(), help="Folder of that adapter.  [default: <output>-init]")
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
@html_option
def command(
    source: Path,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    html: Path | None,
    init_adapter_output: Path | None,
    **options: Any,
) -> None:
    """Quantize the checkpoint SOURCE to 4 or 8 bits.

    NF4 and FP4 are for train, and for transformers and unsloth with bitsandbytes; vLLM, SGLang and
    transformers load the other formats, in the layouts of compressed-tensors.
    SOURCE has 16- or 32-bit weights, or was released in FP8, MXFP4, NVFP4 (compressed-tensors or
    ModelOpt), AWQ, GPTQ, or integers packed by compressed-tensors.
    """
    from adaptkit.operations.quantize import quantize

    chosen = given(QuantizeOptions, options)
    if "calibration" in chosen and "files" not in chosen["calibration"]:
        raise UsageError(
            f"{next(iter(chosen['calibration']))}: needs --calibrate", hint="add --calibrate FILE, with text"
        )
    check_page(html)
    hidden = as_json or quiet
    with byte_progress("quantize", hidden) as progress, count_progress("calibrate", hidden) as calibration_progress:
        report = quantize(
            source,
            output,
            QuantizeOptions(**chosen),
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
