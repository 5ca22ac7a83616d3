"""The page of ``adaptkit evaluate --html``: measures of all models, forgetting, and answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptkit.cli.html import Html, Number, facts, page, paragraph, section, table
from adaptkit.cli.measured import answer_to, columns, forgetting, place_of, remarks, short_label
from adaptkit.cli.output import counted

if TYPE_CHECKING:
    from adaptkit.training.evaluation.comparison import Comparison
    from adaptkit.training.evaluation.report import Answer, EvaluateReport

_SHOWN_QUESTIONS = 20


def evaluate_page(comparison: "Comparison", answers: Sequence["Answer"] = ()) -> str:
    """Return a self-contained HTML document.

    Args:
        comparison: results of one or more models.
        answers: the models' answers to the data's questions.
    """
    names = {report.label: short_label(report, comparison) for report in comparison.models}
    parts = [facts(_summary(comparison)), section("Models", _models(comparison))]
    if comparison.forgetting:
        lines = [forgetting(found, comparison) for found in comparison.forgetting]
        parts.append(section("Perplexity of general text, before and after", *map(paragraph, lines)))
    said = [(short_label(r, comparison), p, answer_to(p, r)) for r in comparison.models for p in r.answers]
    if said:
        rows = [(prompt, name, answer) for name, prompt, answer in said]
        parts.append(section("Answers to prompts", table(("prompt", "model", "answer"), rows)))
    if answers:
        parts.append(_answers(answers, names))
    if remarks(comparison):
        parts.append(section("Notes", *map(paragraph, remarks(comparison))))
    return page("Evaluation of " + (names.popitem()[1] if len(names) == 1 else f"{len(names)} models"), *parts)


def _summary(comparison: "Comparison") -> list[tuple[str, str]]:
    first: EvaluateReport = comparison.models[0]
    rows = [("models", f"{len(comparison.models)}")]
    if first.loss is not None:
        rows.append(("samples", f"{first.samples:,} with {counted(first.answer_tokens, 'answer token')}"))
    if first.text is not None:
        rows.append(("text", f"{counted(first.text.tokens, 'token')} in {counted(first.text.windows, 'window')}"))
        if first.text.reference is not None:
            rows.append(("reference", place_of(first.text.reference)))
    if first.generated is not None:
        count = f"{first.generated.questions:,}"
        rows.append(("questions", f"{count} with {counted(first.generated.references, 'reference answer')}"))
    return rows


def _models(comparison: "Comparison") -> Html:
    found = columns(comparison)
    return table([heading for heading, _ in found], zip(*(cells for _, cells in found), strict=True))


def _answers(answers: Sequence["Answer"], names: dict[str, str]) -> Html:
    """Return the first questions with every model's answer and the references."""
    asked: dict[tuple[str, ...], list[Answer]] = {}
    for answer in answers:
        asked.setdefault(tuple(message["content"] for message in answer.messages), []).append(answer)
    rows: list[tuple[str | Number, ...]] = []
    for question, found in list(asked.items())[:_SHOWN_QUESTIONS]:
        rows += [(question[-1], names[answer.model], answer.answer) for answer in found]
        rows += [(question[-1], "reference", reference) for reference in found[0].references]
    heading = f"The first {min(_SHOWN_QUESTIONS, len(asked))} of {counted(len(asked), 'question')}"
    return section(heading, table(("question", "who", "answer"), rows), collapsed=True)
