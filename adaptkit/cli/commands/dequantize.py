"""``adaptkit dequantize``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import chosen, output_options, settings_options
from adaptkit.cli.output import counted, show, size
from adaptkit.cli.paths import ArtifactPath
from adaptkit.cli.progress import byte_progress
from adaptkit.operations.options import DequantizeOptions


@click.command()
@click.argument("source", type=ArtifactPath())
@output_options
@settings_options(DequantizeOptions)
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
def command(source: Path, output: Path, force: bool, as_json: bool, quiet: bool, dry_run: bool, **options: Any) -> None:
    """Convert the quantized checkpoint SOURCE back to a plain one.

    SOURCE was quantized by adaptkit, or to 4 bits by bitsandbytes, or
    released in FP8 with scales for blocks (DeepSeek-V3), MXFP4 (gpt-oss), AWQ,
    GPTQ, or integers packed by compressed-tensors.
    """
    from adaptkit.operations.dequantize import dequantize

    with byte_progress("dequantize", as_json or quiet) as progress:
        report = dequantize(
            source,
            output,
            chosen(DequantizeOptions, options),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    rows = [
        ("would write" if dry_run else "wrote", report.output),
        ("dequantized", f"{counted(report.dequantized, 'matrix')}, {size(report.bytes_after)} in total"),
        ("left out", f"{counted(report.input_scales, 'scale')} of 8-bit inputs" if report.input_scales else None),
        ("manifest sha256", report.manifest_sha256),
    ]
    show(report, rows, as_json=as_json, quiet=quiet)
