"""Results of ``adaptkit evaluate`` as columns and remarks, shared by the terminal and the HTML page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.checkpoint.layout import name_of
from adaptkit.cli.html import Number
from adaptkit.cli.output import counted, percent

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison, Forgetting
    from adaptkit.training.evaluation.report import EvaluateReport

CUT = "cut to --max-length or the model's context"
Column = tuple[str, Sequence[str | Number]]
_Value = Callable[["EvaluateReport"], float | None]

_COLUMNS: tuple[tuple[str, str, _Value], ...] = (
    ("trained", ",.0f", lambda r: r.trained_parameters),
    ("share %", ".3g", lambda r: None if r.trained_parameters is None else 100 * r.trained_parameters / r.parameters),
    ("loss", ".4f", lambda r: r.loss),
    ("perplexity", ".2f", lambda r: r.perplexity),
    ("text perplexity", ".2f", lambda r: r.text.perplexity if r.text else None),
    ("KL", ".4f", lambda r: r.text.kl_divergence if r.text else None),
    ("BLEU", ".2f", lambda r: r.generated.scores.bleu if r.generated else None),
    ("NIST", ".3f", lambda r: r.generated.scores.nist if r.generated else None),
    ("METEOR", ".4f", lambda r: r.generated.scores.meteor if r.generated else None),
    ("ROUGE-L", ".4f", lambda r: r.generated.scores.rouge_l if r.generated else None),
    ("CIDEr", ".4f", lambda r: r.generated.scores.cider if r.generated else None),
)
NONE = {
    "NIST": "none: no answer, or no reference, contains a word",
    "CIDEr": "none: there is only one question, or no reference contains a word",
}
"""Reasons why answers may have no score."""


def columns(comparison: "Comparison") -> list[Column]:
    """Return the models' names, then a column for each measure that some model has."""
    made: list[Column] = [("model", [short_label(report, comparison) for report in comparison.models])]
    for heading, form, value_of in _COLUMNS:
        values = [value_of(report) for report in comparison.models]
        if any(value is not None for value in values):
            made.append((heading, [Number(v, "" if v is None else format(v, form)) for v in values]))
    return made


def short_label(report: "EvaluateReport", comparison: "Comparison") -> str:
    """Return the names of a model's folders or repositories; paths if another evaluated folder has the same name."""
    folders = {folder for other in comparison.models for folder in (other.base, other.adapter) if folder}
    names = [name_of(Path(folder)) for folder in folders]

    def short(folder: str) -> str:
        name = name_of(Path(folder))
        return name if names.count(name) == 1 else folder

    label = short(report.base) + (f" + {short(report.adapter)}" if report.adapter else "")
    return label + (f", {counted(report.shots, 'shot')}" if report.shots else "")


def place_of(folder: str) -> str:
    """Return the path of a folder, or ``org/name`` instead of a path in huggingface_hub's cache."""
    name = name_of(Path(folder))
    return name if "/" in name else folder


def answer_to(prompt: str, report: "EvaluateReport") -> str:
    """Return a model's answer, with a note if it was cut."""
    return report.answers[prompt] + (" … (cut at --max-new-tokens)" if prompt in report.cut_answers else "")


def forgetting(found: "Forgetting", comparison: "Comparison") -> str:
    """Return one line on how a model's perplexity on general text changed."""
    by_label = {report.label: short_label(report, comparison) for report in comparison.models}
    before, after = found.perplexity_before, found.perplexity_after
    if before is None or after is None:
        numbers = f"loss on text {found.loss_before:.4f} -> {found.loss_after:.4f}"
    else:
        numbers = f"{before:.2f} -> {after:.2f} ({'+' if after >= before else '-'}{percent(abs(after / before - 1))})"
    return f"{by_label[found.model]}: {numbers}, from {by_label[found.before]}"


def remarks(comparison: "Comparison") -> list[str]:
    """Return notes that the numbers need."""
    models, said = comparison.models, []
    said.append(f"computed in {' and '.join(sorted({report.compute_dtype for report in models}))}")
    if len({report.answer_tokens for report in models}) > 1:
        said.append("losses are means over different numbers of answer tokens: tokenizers or cuts differ")
    if not comparison.same_text:
        said.append(
            "perplexities of text are over different tokens and cannot be compared: tokenizers or chat templates differ"
        )
    said += models[0].unused_remarks
    for remark, names in _left_out(comparison).items():
        said.append(f"{remark} ({'each model' if len(names) == len(models) > 1 else '; '.join(names)})")
    generated = next((report.generated for report in models if report.generated), None)
    if generated is not None:
        if generated.too_long:
            said.append(f"{counted(generated.too_long, 'question')} left out: longer than a model's context")
        said += [f"{score}: {why}" for score, why in NONE.items() if score not in dict(columns(comparison))]
        said.append(f"METEOR: {generated.scores.meteor_variant}; {generated.scores.signature}")
    return said


def _left_out(comparison: "Comparison") -> dict[str, list[str]]:
    """Return remark -> labels of the models: cut or dropped samples, prompts and answers, and template remarks."""
    found: dict[str, list[str]] = {}
    for report in comparison.models:
        counts = (
            (report.truncated, "sample", f" {CUT}"),
            (report.dropped, "sample", " dropped: no answer left after the cut"),
            (report.fewer_shots, "question", " with room for fewer examples than --shots"),
            (report.generated.unfinished if report.generated else 0, "answer", " cut at --max-new-tokens"),
            (report.generated.empty if report.generated else 0, "empty answer", ""),
        )
        for count, what, why in counts:
            if count:
                found.setdefault(f"{counted(count, what)}{why}", []).append(short_label(report, comparison))
        if report.template_remark:
            found.setdefault(report.template_remark, []).append(short_label(report, comparison))
    return found
