"""``adaptkit evaluate``."""

from pathlib import Path
from typing import Any

import click

from adaptkit.cli.options import ArtifactPath, report_options
from adaptkit.cli.output import show


@click.command()
@click.option("--base", type=ArtifactPath(), required=True, help="Checkpoint, quantized or not.")
@click.option("--adapter", type=ArtifactPath(), help="Measure it with this adapter.")
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="jsonl file. Repeatable.")
@click.option("--prompt", "prompts", multiple=True, help="Show the answer to it. Repeatable.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a sample.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--compute-dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@report_options
def command(
    base: Path, adapter: Path | None, data: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Measure the loss on answers, and show what the model says."""
    from adaptkit.training.evaluate import EvaluateOptions, evaluate

    report = evaluate(base, adapter, data, EvaluateOptions(**options))
    rows = [("model", f"{report.base}" + (f" with {report.adapter}" if report.adapter else ""))]
    if report.loss is not None:
        perplexity = "" if report.perplexity is None else f" (perplexity {report.perplexity:.2f})"
        rows.append(("loss", f"{report.loss:.4f}{perplexity} over {report.answer_tokens} answer tokens"))
    for prompt, text in report.answers.items():
        rows += [("prompt", " ".join(prompt.split())), ("answer", text)]
    show(report, rows, as_json=as_json, quiet=quiet)
