"""The page of ``adaptkit evaluate --html``: measures of all models, forgetting, and answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptkit.cli import measured
from adaptkit.cli.pages.page import render

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison
    from adaptkit.training.evaluation.report import GeneratedAnswer

_QUESTIONS = 20
"""Maximum number of questions with their answers."""


def evaluate_page(comparison: "Comparison", answers: Sequence["GeneratedAnswer"] = ()) -> str:
    """Return a self-contained HTML document.

    Args:
        comparison: results of one or more models.
        answers: the models' answers to the data's questions.
    """
    labels = measured.short_labels(comparison)
    names = dict(zip((report.label for report in comparison.models), labels, strict=True))
    asked: dict[tuple[str, ...], list[GeneratedAnswer]] = {}
    for answer in answers:
        asked.setdefault(tuple(message["content"] for message in answer.messages), []).append(answer)
    measures, rows = measured.measures(comparison), []
    for question, found in list(asked.items())[:_QUESTIONS]:
        rows += [(question[-1], names[answer.model], answer.answer) for answer in found]
        rows += [(question[-1], "reference", reference) for reference in found[0].references]
    return render(
        "evaluate.html",
        name=labels[0] if len(labels) == 1 else f"{len(labels)} models",
        rows=measured.material(comparison),
        labels=labels,
        columns=["model", *(f"#{measure.heading}" for measure in measures)],
        measures=measures,
        forgetting=measured.forgetting(comparison),
        prompts=measured.answers(comparison),
        questions=len(asked),
        shown=min(_QUESTIONS, len(asked)),
        answers=rows,
        notes=measured.remarks(comparison),
    )
