"""``adaptkit quantize``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import ArtifactPath, Size, output_options, threads_option
from adaptkit.cli.output import show, size
from adaptkit.cli.progress import byte_progress


@click.command()
@click.argument("source", type=ArtifactPath())
@output_options
@click.option("--block-size", default=64, show_default=True, help="Weights sharing one constant; a power of two.")
@click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the constants too.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave modules in 16 bits: '*.down_proj'. Repeatable.")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True)
@click.option("--dry-run", is_flag=True, help="Plan and validate only.")
@threads_option
def command(
    source: Path,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    max_shard_size: int,
    dry_run: bool,
    skip: tuple[str, ...],
    **options: Any,
) -> None:
    """Quantize the checkpoint SOURCE into NF4 shards with doubly quantized constants.

    transformers with bitsandbytes, vLLM and unsloth load the result.
    """
    from adaptkit.operations.quantize import QuantizeOptions, quantize

    chosen = QuantizeOptions(skip=skip, max_shard_bytes=max_shard_size, **options)
    with byte_progress("quantize", as_json or quiet) as progress:
        report = quantize(source, output, chosen, force=force, dry_run=dry_run, progress=progress)
    kept = ", ".join(f"{count} {reason}" for reason, count in report.kept.items())
    rows = [
        ("would write" if dry_run else "wrote", f"{report.output} ({report.shards} shard(s))"),
        ("size", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"),
        (
            "quantized",
            f"{report.quantized} matrices, {report.quantized_parameters:,} of {report.parameters:,} parameters",
        ),
        ("bits per weight", f"{report.bits_per_parameter:.3f} in them, constants included"),
        ("kept in 16 bits", kept or "nothing"),
    ]
    if report.manifest_sha256:
        rows.append(("manifest sha256", report.manifest_sha256))
    show(report, rows, as_json=as_json, quiet=quiet)
