"""``adaptkit evaluate``."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli.measured import CUT, NONE, answer_to, columns, forgetting, place_of, remarks, short_label
from adaptkit.cli.options import NamedValue, by_name, html_option, report_options
from adaptkit.cli.output import (
    Row,
    check_place,
    counted,
    in_turn,
    percent,
    show,
    show_table,
    torchrun_rank,
    write_whole,
)
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import count_progress
from adaptkit.data.conversation import LAYOUTS
from adaptkit.training.product_cache import limit_product_cache

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison
    from adaptkit.training.evaluation.perplexity import TextReport
    from adaptkit.training.evaluation.report import Answer, EvaluateReport, GenerationReport

_FILE = LocalPath()


@click.command()
@click.option("--base", "bases", type=ArtifactPath(), multiple=True, required=True,
              help="Checkpoint, quantized or not. Repeatable.")  # fmt: skip
@click.option("--adapter", "adapters", type=ArtifactPath(), multiple=True,
              help="Adapter to evaluate on its base. Repeatable.")  # fmt: skip
@click.option("--compare", "compared", is_flag=True,
              help="Also evaluate the base without its adapter. Implied by several models.")  # fmt: skip
@click.option("--data", type=_FILE, multiple=True, help="File of rows with answers, as for train. Repeatable.")
@click.option(
    "--text", type=_FILE, multiple=True, help="File to measure perplexity on: text, or rows as for train. Repeatable."
)
@click.option(
    "--reference", type=ArtifactPath(), help="Also measure the KL divergence from this checkpoint on the text."
)
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window of text.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Maximum number of text tokens.")
@click.option("--generate", is_flag=True,
              help="Answer the data's questions; score them by BLEU, NIST, METEOR, ROUGE-L and CIDEr.")  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(min=1), help="Maximum number of questions to answer, chosen by the seed."
)
@click.option("--samples-file", type=LocalPath(dir_okay=False),
              help="Write questions, answers and references to this file, one JSON object per line.")  # fmt: skip
@click.option("--shots", type=click.IntRange(min=0), default=0, metavar="K",
              help="Also evaluate every base with K examples before each question.")  # fmt: skip
@click.option("--shots-from", type=_FILE, multiple=True, help="File to take the examples from. Repeatable.")
@click.option("--seed", type=int, default=0, show_default=True,
              help="Seed for choosing questions and examples.")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, help="Prompt to answer. Repeatable.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Maximum tokens per sample."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Samples per forward pass.")  # fmt: skip
@click.option("--layout", type=click.Choice(LAYOUTS), help="Layout of the rows. Default: detected for each row.")
@click.option("--chat-template-kwargs", type=NamedValue(), multiple=True, callback=by_name,
              help="Variable of the chat template, as for train. Repeatable.")  # fmt: skip
@click.option("--compute-dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto",
              show_default=True, help="auto: bfloat16 if the device multiplies bfloat16 matrices.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@html_option
@report_options
def command(
    bases: tuple[Path, ...],
    adapters: tuple[Path, ...],
    compared: bool,
    data: tuple[Path, ...],
    text: tuple[Path, ...],
    reference: Path | None,
    samples_file: Path | None,
    html: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evaluate models: losses, and answers to questions.

    With several bases, an adapter is evaluated on the base that its manifest names, or else on the one that has the
    weights it was trained on.
    """
    limit_product_cache()
    from adaptkit.cli.pages import prepare
    from adaptkit.cli.pages.evaluate import evaluate_page
    from adaptkit.training.evaluation.comparison import Comparison, compare
    from adaptkit.training.evaluation.evaluate import evaluate
    from adaptkit.training.evaluation.report import EvaluateOptions

    chosen = EvaluateOptions(**options)
    if torchrun_rank() != "0":  # every process of torchrun measures everything; rank 0 reports
        as_json, quiet, samples_file, html = False, True, None, None
    if samples_file is not None:
        _check_samples_file(samples_file, chosen.generate, html)
    prepare(html, pictures=False)
    answers: list[Answer] = []
    more: dict[str, Any] = {"text": text, "reference": reference, "on_answer": answers.append}
    if compared or chosen.shots or len(bases) > 1 or len(adapters) > 1:
        with count_progress("models", as_json or quiet) as progress:
            report = comparison = compare(bases, adapters, data, chosen, progress=progress, **more)
        printed = partial(show_table, report, *_table(report), as_json=as_json, quiet=quiet)
    else:
        single = evaluate(bases[0], adapters[0] if adapters else None, data, chosen, **more)
        comparison = Comparison((single,), ())
        printed = partial(show, single, _rows(single), as_json=as_json, quiet=quiet)
    written: list[Callable[[], None]] = []
    if samples_file is not None:
        written.append(partial(write_whole, samples_file, "".join(map(_line, answers))))
    if html is not None:
        written.append(lambda: write_whole(html, evaluate_page(comparison, answers)))
    in_turn(*written, printed)


def _table(comparison: "Comparison") -> tuple[list[tuple[str, list[str]]], list[Row]]:
    """Return the columns of a table of models, and the rows below it."""
    cells = [
        (heading, [cell if isinstance(cell, str) else cell.shown or "–" for cell in column])
        for heading, column in columns(comparison)
    ]
    rows = [("forgetting", "\n".join(forgetting(found, comparison) for found in comparison.forgetting))]
    rows = rows if comparison.forgetting else []
    rows += [("note", remark) for remark in remarks(comparison)]
    for prompt in comparison.models[0].answers:
        rows.append(("prompt", " ".join(prompt.split())))
        rows += [(short_label(report, comparison), answer_to(prompt, report)) for report in comparison.models]
    return cells, rows


def _rows(report: "EvaluateReport") -> list[Row]:
    rows = [("model", place_of(report.base) + (f" with {place_of(report.adapter)}" if report.adapter else ""))]
    rows.append(("computed in", report.compute_dtype))
    if report.trained_parameters is not None:
        share = percent(report.trained_parameters / report.parameters)
        rows.append(("trained", f"{report.trained_parameters:,} parameters, {share} of the base's"))
    if report.template_remark:
        rows.append(("note", report.template_remark))
    if report.loss is not None:
        rows.append(
            ("loss", f"{_loss(report.loss, report.perplexity)} over {counted(report.answer_tokens, 'answer token')}")
        )
        rows.append(("samples", _samples(report)))
        rows += [("note", remark) for remark in report.unused_remarks]
    if report.text is not None:
        rows += _text_rows(report.text)
    if report.generated is not None:
        rows += _score_rows(report.generated)
    for prompt in report.answers:
        rows += [("prompt", " ".join(prompt.split())), ("answer", answer_to(prompt, report))]
    return rows


def _loss(loss: float, perplexity: float | None) -> str:
    return f"{loss:.4f}" + ("" if perplexity is None else f" (perplexity {perplexity:.2f})")


def _samples(report: "EvaluateReport") -> str:
    left_out = [(report.truncated, CUT), (report.dropped, "dropped: no answer left after the cut")]
    return "; ".join([str(report.samples), *(f"{count} {what}" for count, what in left_out if count)])


def _text_rows(text: "TextReport") -> list[Row]:
    size = f"{counted(text.tokens, 'token')} of text in {counted(text.windows, 'window')}"
    rows = [("loss on text", f"{_loss(text.loss, text.perplexity)} over {size}")]
    if text.reference_loss is not None:
        rows += [
            ("reference", f"{place_of(text.reference or '')}: {_loss(text.reference_loss, text.reference_perplexity)}"),
            ("KL divergence", f"{text.kl_divergence:.5f} nats per token from the reference"),
            ("same top token", percent(text.same_top_token or 0.0)),
        ]
    return rows


def _score_rows(generated: "GenerationReport") -> list[Row]:
    scores = generated.scores
    count = f"{counted(generated.questions, 'question')} with {counted(generated.references, 'reference answer')}"
    parts = [
        count,
        *([f"{generated.too_long:,} left out: longer than the context"] if generated.too_long else []),
        *([f"{counted(generated.unfinished, 'answer')} cut at --max-new-tokens"] if generated.unfinished else []),
        *([counted(generated.empty, "empty answer")] if generated.empty else []),
    ]
    return [
        ("answered", "; ".join(parts)),
        ("BLEU", f"{scores.bleu:.2f}"),
        ("NIST", NONE["NIST"] if scores.nist is None else f"{scores.nist:.3f}"),
        ("METEOR", f"{scores.meteor:.4f} ({scores.meteor_variant})"),
        ("ROUGE-L", f"{scores.rouge_l:.4f}"),
        ("CIDEr", NONE["CIDEr"] if scores.cider is None else f"{scores.cider:.4f}"),
        ("computed by", scores.signature),
    ]


def _check_samples_file(path: Path, generate: bool, html: Path | None) -> None:
    """Refuse, before the work, a path at which the answers cannot be written or another kind of file exists."""
    if not generate:
        raise click.UsageError("--samples-file needs --generate")
    if html is not None and path.absolute() == html.absolute():
        raise click.UsageError(f"--samples-file {path}: is also the --html page; choose another name")
    check_place(path, "--samples-file", "file of answers", _are_answers)


def _are_answers(beginning: bytes) -> bool:
    from adaptkit.training.evaluation.report import Answer

    try:
        found = json.loads(beginning.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == {f.name for f in fields(Answer)}


def _line(answer: "Answer") -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
