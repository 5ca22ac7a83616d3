"""``adaptkit evaluate``."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.cli import measured
from adaptkit.cli.options import chosen, html_option, report_options, settings_options
from adaptkit.cli.output import Row, aligned, check_page, check_place, in_turn, show, torchrun_rank, write_whole
from adaptkit.cli.paths import ArtifactPath, LocalPath
from adaptkit.cli.progress import count_progress
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.product_cache import limit_product_cache

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison
    from adaptkit.training.evaluation.report import GeneratedAnswer

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
@click.option("--samples-file", type=LocalPath(dir_okay=False),
              help="Write questions, answers and references to this file, one JSON object per line.")  # fmt: skip
@settings_options(EvaluateOptions)
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
    from adaptkit.training.evaluation.comparison import Comparison, compare
    from adaptkit.training.evaluation.evaluate import evaluate

    wanted = chosen(EvaluateOptions, options)
    if torchrun_rank() != "0":  # every process of torchrun measures everything; rank 0 reports
        as_json, quiet, samples_file, html = False, True, None, None
    if samples_file is not None:
        _check_samples_file(samples_file, wanted.generate, html)
    check_page(html, pictures=False)
    answers: list[GeneratedAnswer] = []
    more: dict[str, Any] = {"text": text, "reference": reference, "on_answer": answers.append}
    if compared or wanted.shots or len(bases) > 1 or len(adapters) > 1:
        with count_progress("models", as_json or quiet) as progress:
            comparison = compare(bases, adapters, data, wanted, progress=progress, **more)
        report: Any = comparison
    else:
        report = evaluate(bases[0], adapters[0] if adapters else None, data, wanted, **more)
        comparison = Comparison((report,), ())
    written: list[Callable[[], None]] = []
    if samples_file is not None:
        written.append(partial(write_whole, samples_file, "".join(map(_line, answers))))
    if html is not None:
        from adaptkit.cli.pages.evaluate import evaluate_page

        written.append(lambda: write_whole(html, evaluate_page(comparison, answers)))
    above, rows = _printed(comparison)
    in_turn(*written, partial(show, report, rows, as_json=as_json, quiet=quiet, above=above))


def _printed(comparison: "Comparison") -> tuple[list[str], list[Row]]:
    """Return a table of several models, and the rows below it; rows alone of a single one."""
    labels, found = measured.short_labels(comparison), measured.measures(comparison)
    table = [("model", *(measure.heading for measure in found))]
    table += [(label, *(measure.shown[place] or "–" for measure in found)) for place, label in enumerate(labels)]
    is_single = len(labels) == 1
    rows: list[Row] = [(heading, cell) for heading, cell in zip(*table, strict=True)] if is_single else []
    rows += measured.material(comparison)
    if comparison.forgetting:
        rows.append(("forgetting", "\n".join(measured.forgetting(comparison))))
    rows += [("note", remark) for remark in measured.remarks(comparison)]
    for prompt, label, answer in measured.answers(comparison):
        rows += [("prompt", " ".join(prompt.split()))] if label == labels[0] else []
        rows.append(("answer" if is_single else label, answer))
    return [] if is_single else list(aligned(table, right=range(1, len(table[0])))), rows


def _check_samples_file(path: Path, generate: bool, html: Path | None) -> None:
    """Refuse, before the work, a path at which the answers cannot be written or another kind of file exists."""
    if not generate:
        raise click.UsageError("--samples-file needs --generate")
    if html is not None and path.absolute() == html.absolute():
        raise click.UsageError(f"--samples-file {path}: is also the --html page; choose another name")
    check_place(path, "--samples-file", "file of answers", _are_answers)


def _are_answers(beginning: bytes) -> bool:
    from adaptkit.training.evaluation.report import GeneratedAnswer

    try:
        found = json.loads(beginning.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == {f.name for f in fields(GeneratedAnswer)}


def _line(answer: "GeneratedAnswer") -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
