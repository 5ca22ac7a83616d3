"""What models are measured on, tokenized for each before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.chat_template import set_template_kwargs
from adaptkit.data.dataset import Dataset, load_data
from adaptkit.data.encoding import as_message
from adaptkit.data.ending import without_ends
from adaptkit.data.limits import check_prompt, check_vocabulary, check_window, context_length, vocabulary_size
from adaptkit.data.tokenizer_files import has_tokenizer, load_tokenizer, load_tokenizer_of, template_beside
from adaptkit.data.windows import read_tokens
from adaptkit.errors import DataError
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.evaluation.questions import (
    Messages,
    Question,
    choose,
    load_data_with_shots,
    prompt_with_shots,
    read_questions,
    read_shots,
)
from adaptkit.wording import counted


@dataclass(frozen=True)
class Asked:
    """Where a model's tokenizer and chat template come from.

    Attributes:
        base: folder of its checkpoint.
        adapter: folder of its adapter, if that has a tokenizer or a chat template of its own; else None.
    """

    base: Path
    adapter: Path | None = None

    @classmethod
    def of(cls, base: Path, adapter: Path | None) -> Self:
        """Return this for a base, or for a base with an adapter."""
        brings = adapter is not None and (has_tokenizer(adapter) or template_beside(adapter) is not None)
        return cls(base, adapter if brings else None)


@dataclass(frozen=True)
class EvaluationData:
    """What one model is measured on.

    Attributes:
        tokenizer: tokenizer of the model.
        own_template: whether its chat template differs from the checkpoint's.
        dataset: samples with answers; empty without data.
        windows: (windows, window) int64, token IDs of text; None without text.
        shots: examples before every question and sample.
        fewer_shots: number of rows, questions and prompts without room for all examples.
        prompts: tokens of each of the options' prompts.
        questions: questions of the data to answer.
        question_prompts: tokens of each question.
        too_long: number of questions left out, because one with an answer exceeds some model's context.
    """

    tokenizer: Any
    own_template: bool
    dataset: Dataset
    windows: Tensor | None
    shots: tuple[Messages, ...]
    fewer_shots: int
    prompts: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]
    question_prompts: tuple[tuple[int, ...], ...]
    too_long: int


def read_material(
    models: Sequence[Asked],
    data: Sequence[Path],
    text: Sequence[Path],
    options: EvaluateOptions,
    reference: Path | None = None,
    others: Sequence[Asked] = (),
) -> list[EvaluationData]:
    """Read everything that models are measured on.

    Args:
        models: models to read for; all get the same questions, each with its own tokenizer and chat template.
        data: files of rows with answers.
        text: text files.
        options: how to evaluate.
        reference: folder of the checkpoint that the models are compared with on the text.
        others: further models that questions must fit, because they get the same ones in another call.

    Returns:
        The material of each of ``models``.

    Raises:
        DataError: a file that cannot be used, or no question fits a model's context.
        UsageError: a window of text, or a prompt, is longer than a context, or there is no tokenizer.
    """
    if reference is not None:
        check_window(reference, options.window)
    wanted: Sequence[Question] = ()
    if options.generate or (data and options.shots):
        wanted = read_questions(data, options.layout, to_score=options.generate)
    shots = read_shots(options.shots_from, options.shots, options.seed, wanted, options.layout) if options.shots else ()
    asked = choose(wanted, options.samples, options.seed) if options.generate else ()
    readers = [_ModelReader(model, data, text, options) for model in models]
    everyone = [*readers, *(_ModelReader(other, data, text, options) for other in others)]
    questions = tuple(question for question in asked if all(reader.has_room(question) for reader in everyone))
    if asked and not questions:
        raise DataError(
            f"none of {counted(len(asked), 'question')} fits a model's context with "
            f"{counted(options.max_new_tokens, 'new token')}",
            hint="lower --max-new-tokens, or use shorter questions",
        )
    return [reader.read(questions, shots, len(asked) - len(questions)) for reader in readers]


class _ModelReader:
    """Reads the material of one model."""

    def __init__(self, model: Asked, data: Sequence[Path], text: Sequence[Path], options: EvaluateOptions) -> None:
        base = model.base
        self._base, self._data, self._text, self._options = base, data, text, options
        Checkpoint(base)  # first, or the error would be about the tokenizer
        self._tokenizer = load_tokenizer_of(base, model.adapter)
        own = None if model.adapter is None else load_tokenizer(base).chat_template
        self._own_template = model.adapter is not None and self._tokenizer.chat_template != own
        set_template_kwargs(self._tokenizer, options.chat_template_kwargs)
        self._context, self._known = context_length(base), vocabulary_size(base)
        self._max_length = min(options.max_length, self._context or options.max_length)

    def has_room(self, question: Question) -> bool:
        """Whether a question and an answer to it fit in the context."""
        room = self._room
        return room is None or len(self._prompt(question, ())[0]) <= room

    def read(self, questions: tuple[Question, ...], shots: tuple[Messages, ...], too_long: int) -> EvaluationData:
        """Tokenize everything."""
        options = self._options
        dataset, fewer = Dataset(), 0
        rows: Any = {"layout": options.layout, "known": self._known}
        if self._data and shots:
            dataset, fewer = load_data_with_shots(
                self._data, self._tokenizer, shots, self._max_length, self._context, **rows
            )
        elif self._data:
            dataset = load_data(self._data, self._tokenizer, self._max_length, **rows)
        windows = None
        if self._text:
            windows = read_tokens(
                self._text,
                self._base,
                window=options.window,
                max_tokens=options.max_tokens,
                template_kwargs=options.chat_template_kwargs,
            )
        prompts = [self._prompt(Question((as_message(prompt),), ()), shots) for prompt in options.prompts]
        for prompt, (ids, _) in zip(options.prompts, prompts, strict=True):
            check_prompt(self._base, prompt, len(ids), options.max_new_tokens)
        asked = [self._prompt(question, shots) for question in questions]
        for what, (ids, _) in zip((*options.prompts, *questions), (*prompts, *asked), strict=True):
            check_vocabulary(ids, self._known, f"{self._base}: {'a prompt' if isinstance(what, str) else 'a question'}")
        questions = tuple(replace(q, references=without_ends(q.references, self._tokenizer)) for q in questions)
        if not all(answer.strip() for question in questions for answer in question.references):
            raise DataError(
                f"{', '.join(map(str, self._data))}: an answer is empty but for an end token",
                hint="give every row a reference answer",
            )
        return EvaluationData(
            tokenizer=self._tokenizer,
            own_template=self._own_template,
            dataset=dataset,
            windows=windows,
            shots=shots,
            fewer_shots=fewer + sum(used < len(shots) for _, used in [*prompts, *asked]),
            prompts=tuple(tuple(ids) for ids, _ in prompts),
            questions=questions,
            question_prompts=tuple(tuple(ids) for ids, _ in asked),
            too_long=too_long,
        )

    @property
    def _room(self) -> int | None:
        return None if self._context is None else self._context - self._options.max_new_tokens

    def _prompt(self, question: Question, shots: Sequence[Messages]) -> tuple[list[int], int]:
        return prompt_with_shots(question.messages, shots, self._tokenizer, self._room, question.tools)
