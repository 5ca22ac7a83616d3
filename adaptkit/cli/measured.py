"""Results of ``adaptkit evaluate`` as measures, rows and remarks, shared by the terminal and the HTML page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.checkpoint.layout import name_of
from adaptkit.cli.output import Row, counted, percent

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison, Forgetting
    from adaptkit.training.evaluation.report import EvaluateReport


@dataclass(frozen=True)
class Measure:
    """A measure of several models: its heading, and the value of each as a number and as text; None if it has none."""

    heading: str
    values: tuple[float | None, ...]
    shown: tuple[str | None, ...]


_MEASURES: tuple[tuple[str, str, Callable[["EvaluateReport"], float | None]], ...] = (
    ("trained", ",.0f", lambda r: r.trained_parameters),
    ("share %", ".3g", lambda r: None if (n := r.trained_parameters) is None else 100 * n / r.parameters),
    ("loss", ".4f", lambda r: r.loss),
    ("perplexity", ".2f", lambda r: r.perplexity),
    ("text loss", ".4f", lambda r: r.text.loss if r.text and r.text.perplexity is None else None),  # too large
    ("text perplexity", ".2f", lambda r: r.text.perplexity if r.text else None),
    ("KL", ".5f", lambda r: r.text.kl_divergence if r.text else None),
    (
        "same top %",
        ".3g",
        lambda r: 100 * r.text.same_top_token if r.text and r.text.same_top_token is not None else None,
    ),
    ("BLEU", ".2f", lambda r: r.generated.scores.bleu if r.generated else None),
    ("NIST", ".3f", lambda r: r.generated.scores.nist if r.generated else None),
    ("METEOR", ".4f", lambda r: r.generated.scores.meteor if r.generated else None),
    ("ROUGE-L", ".4f", lambda r: r.generated.scores.rouge_l if r.generated else None),
    ("CIDEr", ".4f", lambda r: r.generated.scores.cider if r.generated else None),
)
_NO_SCORE = {
    "NIST": "none: no answer, or no reference, contains a word",
    "CIDEr": "none: there is only one question, or no reference contains a word",
}
"""Reasons why answers may have no score."""


def measures(comparison: "Comparison") -> list[Measure]:
    """Return each measure that some model has."""
    made = []
    for heading, form, value_of in _MEASURES:
        values = tuple(value_of(report) for report in comparison.models)
        if any(value is not None for value in values):
            made.append(Measure(heading, values, tuple(None if v is None else format(v, form) for v in values)))
    return made


def short_labels(comparison: "Comparison") -> list[str]:
    """Return the names of each model's folders or repositories; paths if another evaluated folder has the same name."""
    folders = {folder for report in comparison.models for folder in (report.base, report.adapter) if folder}
    names = [name_of(Path(folder)) for folder in folders]

    def short(folder: str) -> str:
        name = name_of(Path(folder))
        return name if names.count(name) == 1 else folder

    return [
        short(report.base)
        + (f" + {short(report.adapter)}" if report.adapter else "")
        + (f", {counted(report.shots, 'shot')}" if report.shots else "")
        for report in comparison.models
    ]


def material(comparison: "Comparison") -> list[Row]:
    """Return labels and values of what the models were measured on."""
    first = comparison.models[0]
    text, generated = first.text, first.generated
    samples = f"{first.samples:,} with {counted(first.answer_tokens, 'answer token')}"
    of_text = reference = questions = None
    if text is not None:
        of_text = f"{counted(text.tokens, 'token')} in {counted(text.windows, 'window')}"
        if text.reference is not None and text.reference_loss is not None:
            perplexity = text.reference_perplexity
            known = "" if perplexity is None else f", text perplexity {perplexity:.2f}"
            reference = f"{_place_of(text.reference)}: text loss {text.reference_loss:.4f}{known}"
    if generated is not None:
        questions = f"{generated.questions:,} with {counted(generated.references, 'reference answer')}"
    return [
        ("computed in", " and ".join(sorted({report.compute_dtype for report in comparison.models}))),
        ("samples", None if first.loss is None else samples),
        ("text", of_text),
        ("reference", reference),
        ("questions", questions),
    ]


def _place_of(folder: str) -> str:
    """Return the path of a folder, or ``org/name`` instead of a path in huggingface_hub's cache."""
    name = name_of(Path(folder))
    return name if "/" in name else folder


def answers(comparison: "Comparison") -> list[tuple[str, str, str]]:
    """Return prompt, model and answer for each prompt and model, with a note if the answer was cut."""
    labels = short_labels(comparison)
    return [
        (
            prompt,
            label,
            report.answers[prompt] + (" … (cut at --max-new-tokens)" if prompt in report.cut_answers else ""),
        )
        for prompt in comparison.models[0].answers
        for label, report in zip(labels, comparison.models, strict=True)
    ]


def forgetting(comparison: "Comparison") -> list[str]:
    """Return one line for each model whose perplexity on general text is compared with another's."""
    names = dict(zip((report.label for report in comparison.models), short_labels(comparison), strict=True))
    return [f"{names[f.model]}: {_change(f)}, from {names[f.before]}" for f in comparison.forgetting]


def _change(found: "Forgetting") -> str:
    before, after = found.perplexity_before, found.perplexity_after
    if before is None or after is None:
        return f"loss on text {found.loss_before:.4f} -> {found.loss_after:.4f}"
    return f"{before:.2f} -> {after:.2f} ({'+' if after >= before else '-'}{percent(abs(after / before - 1))})"


def remarks(comparison: "Comparison") -> list[str]:
    """Return notes that the numbers need."""
    models, said = comparison.models, list[str]()
    if len({report.answer_tokens for report in models}) > 1:
        said.append("losses are means over different numbers of answer tokens: tokenizers or cuts differ")
    if not comparison.same_text:
        said.append(
            "perplexities of text are over different tokens and cannot be compared: tokenizers or chat templates differ"
        )
    said += models[0].unused_remarks
    for remark, names in _left_out(comparison).items():
        of_which = "" if len(models) == 1 else "each model" if len(names) == len(models) else "; ".join(names)
        said.append(f"{remark} ({of_which})" if of_which else remark)
    generated = next((report.generated for report in models if report.generated), None)
    if generated is not None:
        if generated.too_long:
            said.append(f"{counted(generated.too_long, 'question')} left out: longer than a model's context")
        known = {measure.heading for measure in measures(comparison)}
        said += [f"{score}: {why}" for score, why in _NO_SCORE.items() if score not in known]
        said.append(f"METEOR: {generated.scores.meteor_variant}; {generated.scores.signature}")
    return said


def _left_out(comparison: "Comparison") -> dict[str, list[str]]:
    """Return remark -> labels of the models: cut or dropped samples, prompts and answers, and template remarks."""
    found: dict[str, list[str]] = {}
    for label, report in zip(short_labels(comparison), comparison.models, strict=True):
        counts = (
            (report.truncated, "sample", " cut to --max-length or the model's context"),
            (report.dropped, "sample", " dropped: no answer left after the cut"),
            (report.fewer_shots, "question", " with room for fewer examples than --shots"),
            (report.generated.unfinished if report.generated else 0, "answer", " cut at --max-new-tokens"),
            (report.generated.empty if report.generated else 0, "empty answer", ""),
        )
        said = [f"{counted(count, what)}{why}" for count, what, why in counts if count]
        for remark in [*said, *([report.template_remark] if report.template_remark else [])]:
            found.setdefault(remark, []).append(label)
    return found
