"""Options and report of an evaluation."""

import json
from dataclasses import dataclass, field
from typing import Any

from adaptkit.training.evaluation.perplexity import TextReport
from adaptkit.training.evaluation.scores import Scores
from adaptkit.wording import counted


@dataclass(frozen=True)
class GenerationReport:
    """Generated answers to the data's questions.

    Attributes:
        questions: number of answered questions.
        references: number of their reference answers.
        too_long: number of questions left out, because one with an answer exceeds a model's context.
        unfinished: number of answers cut off by the limit of new tokens.
        empty: number of answers without text, which are scored too.
        scores: scores of the answers.
    """

    questions: int
    references: int
    too_long: int
    unfinished: int
    empty: int
    scores: Scores


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer to a question of the data.

    Attributes:
        model: label of the model; see ``EvaluateReport.label``.
        messages: the question, without examples.
        answer: generated answer.
        references: answers that it is scored against.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class EvaluateReport:
    """Measurements of one model.

    Attributes:
        base: folder of the base.
        adapter: folder of the adapter, or None.
        shots: number of examples before every question.
        fewer_shots: number of rows, questions and prompts without room for all examples.
        compute_dtype: dtype of weights and activations.
        parameters: number of parameters of the base.
        trained_parameters: those of the adapter, or of the base if adaptkit trained all of it; None if unknown.
        samples: number of samples measured.
        truncated: number of samples cut to the maximum length, and measured.
        dropped: number of samples left out because the cut removed their whole answer.
        answer_tokens: number of tokens that carry loss.
        loss: mean over the answer tokens, in nats; None without data.
        perplexity: exponential of the loss; None without data, or if it is too large.
        text: measurements on text; None without text.
        generated: report on answers to the data's questions; None if none were generated.
        answers: maps prompts to answers.
        cut_answers: the prompts whose answers were cut off by the limit of new tokens.
        own_template: whether prompts used a chat template of the adapter that is not the base's.
        trained_template: ``chat_template_kwargs`` of the training run, if they differ from the present ones; else None.
        without_template: whether there is no chat template, so that messages are joined as plain lines.
        unused: maps each file that has columns that no layout has to their names.
        twice: number of rows with an answer that has an end token before the template's; scores ignore both.
        special: number of rows with a special token inside a message, which a model does not read as text.
    """

    base: str
    adapter: str | None
    shots: int
    fewer_shots: int
    compute_dtype: str
    parameters: int
    trained_parameters: int | None
    samples: int
    truncated: int
    dropped: int
    answer_tokens: int
    loss: float | None
    perplexity: float | None
    text: TextReport | None
    generated: GenerationReport | None
    answers: dict[str, str]
    cut_answers: tuple[str, ...] = ()
    own_template: bool = False
    trained_template: dict[str, Any] | None = None
    without_template: bool = False
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    twice: int = 0
    special: int = 0

    @property
    def template_remark(self) -> str | None:
        """Remark on prompts that differ from those of the base, or of the training run; None if they do not."""
        remarks = ["prompts use the adapter's own chat template"] if self.own_template else []
        if self.trained_template is not None:
            given = " ".join(f"{name}={json.dumps(value)}" for name, value in sorted(self.trained_template.items()))
            named = f"chat_template_kwargs {given}" if given else "no chat_template_kwargs"
            remarks.append(f"trained with {named}, unlike this evaluation")
        if self.without_template:
            remarks.append("no chat template: messages are joined as plain lines")
        return "; ".join(remarks) or None

    @property
    def unused_remarks(self) -> list[str]:
        """Remarks on unused columns, one for each file that has some, on duplicate end tokens and on special tokens."""
        twice, special = (counted(count, "row", "have") for count in (self.twice, self.special))
        return [
            *(
                f"{file}: not used: {', '.join(name or 'an unnamed column' for name in names)}"
                for file, names in self.unused.items()
            ),
            *([f"{twice} an answer with an end token, and the loss counts another after it"] if self.twice else []),
            *([f"{special} a special token in a message or tool, which is not read as text"] if self.special else []),
        ]

    @property
    def label(self) -> str:
        """Short name of the model: base, adapter and number of examples."""
        shots = f", {counted(self.shots, 'shot')}" if self.shots else ""
        return (f"{self.base} + {self.adapter}" if self.adapter else self.base) + shots
