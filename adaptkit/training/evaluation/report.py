"""How to evaluate a model, and what was found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.arguments import several, texts, typed_fields
from adaptkit.checkpoint.progress import counted
from adaptkit.errors import UsageError
from adaptkit.text.conversation import LAYOUTS
from adaptkit.training.config import COMPUTE_DTYPES
from adaptkit.training.evaluation.perplexity import TextReport
from adaptkit.training.evaluation.scores import Scores


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        prompts: user messages to answer, greedily.
        generate: answer the questions of the data too, and score the answers against the data's.
        samples: how many of the questions, chosen by the seed; None is all.
        seed: of that choice, and of the choice of examples.
        shots: examples put before every question, as turns of the chat.
        shots_from: files that the examples are chosen from.
        max_new_tokens: of an answer.
        max_length: tokens of a sample; no more than the model's context.
        batch_size: samples at a time.
        window: tokens of a window of text.
        max_tokens: of text; None is all of it.
        layout: of the data's rows; None to find out for each.
        chat_template_kwargs: variables of the chat templates; those of the adapter's training run.
        compute_dtype: bfloat16, float32, or auto; see ``training.device``.
        device: cpu, cuda, or auto.
    """

    prompts: tuple[str, ...] = ()
    generate: bool = False
    samples: int | None = None
    seed: int = 0
    shots: int = 0
    shots_from: tuple[Path, ...] = ()
    max_new_tokens: int = 64
    max_length: int = 1024
    batch_size: int = 8
    window: int = 512
    max_tokens: int | None = None
    layout: str | None = None
    chat_template_kwargs: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    compute_dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        typed_fields(self)
        object.__setattr__(self, "shots_from", several(self.shots_from))
        object.__setattr__(self, "prompts", texts(self.prompts))
        for name, least in (
            ("samples", 1),
            ("shots", 0),
            ("max_new_tokens", 1),
            ("max_length", 2),
            ("batch_size", 1),
            ("window", 2),
            ("max_tokens", 2),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UsageError(f"{name}: must be at least {least}, found {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed: must be from 0 to 2^63 - 1, found {self.seed}")
        if self.layout not in (None, *LAYOUTS):
            raise UsageError(f"layout: must be one of {', '.join(LAYOUTS)}, found {self.layout!r}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UsageError(f"compute_dtype: must be one of {', '.join(COMPUTE_DTYPES)}, found {self.compute_dtype!r}")
        if bool(self.shots) != bool(self.shots_from):
            raise UsageError("shots and shots_from must be given together", hint="give --shots K and --shots-from FILE")
        if self.samples is not None and not self.generate:
            raise UsageError("samples: needs generate", hint="add --generate")


@dataclass(frozen=True)
class GenerationReport:
    """What was generated on the data's questions.

    Attributes:
        questions: answered.
        references: of them all.
        too_long: questions left out since they and an answer are longer than a model's context.
        unfinished: answers that the limit of new tokens ended.
        empty: answers without text, which are scored as such.
        scores: of the answers.
    """

    questions: int
    references: int
    too_long: int
    unfinished: int
    empty: int
    scores: Scores


@dataclass(frozen=True)
class Answer:
    """An answer to a question of the data.

    Attributes:
        model: its label; see ``EvaluateReport.label``.
        messages: the question, without examples.
        answer: generated.
        references: that it is scored against.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class EvaluateReport:
    """What was measured.

    Attributes:
        base: folder.
        adapter: folder, or None.
        shots: examples before every question.
        fewer_shots: samples and questions that had room for fewer.
        compute_dtype: of weights and activations.
        parameters: of the base.
        trained_parameters: of the adapter, or of the base if adaptkit trained all of it; None if nothing says.
        samples: number of them that were measured.
        truncated: samples cut to the longest length, and measured.
        dropped: samples left out since the cut took their whole answer.
        answer_tokens: that carry loss.
        loss: mean over the answer tokens, in nats; None without data.
        perplexity: its exponential; None without data.
        text: what was measured on text; None without it.
        generated: what was generated on the data's questions; None if nothing was.
        answers: prompt -> answer.
        cut_answers: the prompts whose answers the limit of new tokens ended.
        own_template: whether prompts went through a chat template that came with the adapter, and is not the base's.
        trained_template: the ``chat_template_kwargs`` of the model's training run, if prompts are others now.
        without_template: whether there is no chat template, so that messages are lines that follow each other.
        unused: columns that no layout has, of the files of the data that have some.
        twice: rows with an answer that has an end token, which the template's follows; scores are without either.
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

    @property
    def template_remark(self) -> str | None:
        """What is to be said of prompts that are not those of the base, or of the training run."""
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
        """What is to be said of columns that nothing was made of, for each file that has some, and of end tokens."""
        twice = counted(self.twice, "row", "have")
        return [
            *(
                f"{file}: not used: {', '.join(name or 'an unnamed column' for name in names)}"
                for file, names in self.unused.items()
            ),
            *([f"{twice} an answer with an end token, and the loss counts another after it"] if self.twice else []),
        ]

    @property
    def label(self) -> str:
        """The model in a few words."""
        shots = f", {counted(self.shots, 'shot')}" if self.shots else ""
        return (f"{self.base} + {self.adapter}" if self.adapter else self.base) + shots
