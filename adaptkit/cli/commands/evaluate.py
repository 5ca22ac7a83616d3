"""``adaptkit evaluate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.options import ArtifactPath, report_options
from adaptkit.cli.output import percent, show

if TYPE_CHECKING:
    from adaptkit.training.evaluate import EvaluateReport, TextReport


@click.command()
@click.option("--base", type=ArtifactPath(), required=True, help="Checkpoint, quantized or not.")
@click.option("--adapter", type=ArtifactPath(), help="Measure it with this adapter.")
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="jsonl file. Repeatable.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Text, or jsonl, to measure perplexity on. Repeatable.",
)
@click.option("--reference", type=ArtifactPath(), help="Also measure the divergence from this checkpoint on the text.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of text at a time.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Read no more text than this.")
@click.option("--prompt", "prompts", multiple=True, help="Show the answer to it. Repeatable.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a sample.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--compute-dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@report_options
def command(
    base: Path,
    adapter: Path | None,
    data: tuple[Path, ...],
    text: tuple[Path, ...],
    reference: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the loss on answers and text, and show what the model says."""
    from adaptkit.training.evaluate import EvaluateOptions, evaluate

    report = evaluate(base, adapter, data, EvaluateOptions(**options), text=text, reference=reference)
    rows = [("model", f"{report.base}" + (f" with {report.adapter}" if report.adapter else ""))]
    if report.loss is not None:
        rows.append(("loss", f"{_loss(report.loss, report.perplexity)} over {report.answer_tokens} answer tokens"))
        rows.append(("samples", _samples(report)))
    if report.text is not None:
        rows += _text_rows(report.text)
    for prompt, said in report.answers.items():
        rows += [("prompt", " ".join(prompt.split())), ("answer", said)]
    show(report, rows, as_json=as_json, quiet=quiet)


def _loss(loss: float, perplexity: float | None) -> str:
    return f"{loss:.4f}" + ("" if perplexity is None else f" (perplexity {perplexity:.2f})")


def _samples(report: "EvaluateReport") -> str:
    left_out = [(report.truncated, "cut to --max-length"), (report.dropped, "dropped since the cut took their answer")]
    return "; ".join([str(report.samples), *(f"{count} {what}" for count, what in left_out if count)])


def _text_rows(text: "TextReport") -> list[tuple[str, str]]:
    size = f"{text.tokens} tokens of text in {text.windows} window(s)"
    rows = [("loss on text", f"{_loss(text.loss, text.perplexity)} over {size}")]
    if text.reference_loss is not None:
        rows += [
            ("reference", f"{text.reference}: {_loss(text.reference_loss, text.reference_perplexity)}"),
            ("KL divergence", f"{text.kl_divergence:.5f} nats a token from the reference"),
            ("same top token", percent(text.same_top_token or 0.0)),
        ]
    return rows
