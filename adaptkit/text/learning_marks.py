"""What rows of many trainers say of which answers are to be learned, and after which prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptkit.errors import DataError
from adaptkit.text.thoughts import Message

_MARKS = {"weight": 0, "loss": 0, "loss_scale": 0, "train": 0, "training": 0, "masked": 1}
"""Of a message, and what takes it out of the loss; OpenAI's, ms-swift's two, axolotl's two, and torchtune's."""
_UNCLEAR = "mask"
"""Takes a message out of the loss in some data; in others all without it, as masks of the loss do."""
_SPANS = "train_detail"
"""Axolotl's, of characters."""

_PREFERENCE = ("chosen", "rejected")
_UNWANTED = ("label", "kto_tag", "desirable")
"""TRL's, LLaMA-Factory's and others': booleans. Texts and numbers under these names are classes of something else."""
_VARIABLES = "chat_template_kwargs"
_PLACED = [(f"<{kind}>", column) for kind in ("image", "video", "audio") for column in (kind, f"{kind}s")]
"""What LLaVA, LLaMA-Factory and ms-swift write into a text where something comes in, and the column that has it."""


def check_wanted(row: Mapping[str, Any], where: str, layout: str, messages: Sequence[Message]) -> None:
    """Refuse a conversation whose answer is somewhere else than in it, or is not wanted, or whose prompt is another.

    Args:
        row: without columns that are None.
        where: it came from.
        layout: of the conversation.
        messages: of it; rows whose conversation has the chosen answer, too, are read.

    Raises:
        DataError: as it says.
    """
    if messages[-1]["role"] != "assistant" and all(name in row for name in _PREFERENCE):
        raise DataError(
            f"{where}: {layout} does not end with an answer, and chosen and rejected are not read",
            hint=f"append the chosen answer to {layout}; preference training is not supported",
        )
    variables = row.get(_VARIABLES)
    if isinstance(variables, dict):  # in parquet each has the keys of all
        variables = [value for value in variables.values() if value is not None]
    if variables:
        raise DataError(
            f"{where}: {_VARIABLES} cannot be set for a single row",
            hint="remove the column; --chat-template-kwargs NAME=VALUE of train and evaluate sets them for all rows",
        )
    for mark, column in _PLACED:
        if row.get(column) and any(mark in message["content"] for message in messages):
            raise DataError(
                f"{where}: has {mark} in its text, but {column} is not read: only text is supported",
                hint="remove rows with images, video or audio",
            )
    unwanted = next((name for name in _UNWANTED if row.get(name) is False), None)
    if unwanted is not None:
        raise DataError(
            f"{where}: {unwanted} is false, which marks an unwanted answer",
            hint=f"remove such rows, or rename the column if {unwanted} means something else",
        )


def is_marked_out(message: Mapping[str, Any], where: str) -> bool:
    """Whether a message is taken out of the loss.

    Raises:
        DataError: what says so is neither 0, 1, false nor true, two say different things, one speaks of parts, or it
            does not say which way it is meant.
    """
    given = {name: message[name] for name in _MARKS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            out = _MARKS[name]
            raise DataError(
                f"{where}: invalid {name} {value!r}",
                hint=f"use {out} or {str(bool(out)).lower()} to exclude an answer from the loss, "
                f"{1 - out} or {str(not out).lower()} to include it",
            )
    if message.get(_UNCLEAR) in (0, 1):
        raise DataError(
            f"{where}: has {_UNCLEAR}, which excludes an answer from the loss in some data and includes it in others",
            hint='remove it; "train": false excludes an answer',
        )
    out_of_it = {value == _MARKS[name] for name, value in given.items()}
    if len(out_of_it) > 1:
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise DataError(f"{where}: {said} contradict each other", hint="remove one of them")
    if message.get(_SPANS):
        raise DataError(
            f"{where}: has {_SPANS}, but parts of a message cannot be excluded from the loss",
            hint='remove it; "train": false excludes the whole answer',
        )
    return True in out_of_it


def obeyed_marks(message: Mapping[str, Any], is_answer: bool) -> set[str]:
    """The marks in a message that are done as they say: what is no answer is not learned, whatever they say."""
    return {name for name, out in _MARKS.items() if is_answer or message.get(name) == out}
