"""Marks in rows, in the formats of several trainers, that say which answers to learn and how to prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptkit.data.reasoning import Message
from adaptkit.errors import DataError

_MARKS = {"weight": 0, "loss": 0, "loss_scale": 0, "train": 0, "training": 0, "masked": 1}
"""Fields of a message, each with the value that excludes it from the loss.

``weight`` is OpenAI's, ``loss`` and ``loss_scale`` are ms-swift's, ``train`` and ``training`` axolotl's, ``masked``
torchtune's.
"""
_AMBIGUOUS = "mask"
"""Ambiguous: true excludes a message from the loss in some data and includes it in others, as a loss mask does."""
_SPANS = "train_detail"
"""Axolotl's: spans of characters to learn."""

_PREFERENCE = ("chosen", "rejected")
_UNWANTED = ("label", "kto_tag", "desirable")
"""Boolean columns of TRL, LLaMA-Factory and others; texts and numbers under these names are other class labels."""
_VARIABLES = "chat_template_kwargs"
_PLACEHOLDERS = [(f"<{kind}>", column) for kind in ("image", "video", "audio") for column in (kind, f"{kind}s")]
"""Placeholders that LLaVA, LLaMA-Factory and ms-swift put into a text, each with the column of what they stand for."""


def check_not_marked_out(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row that is excluded from the loss as a whole: it should not be in the data.

    Raises:
        DataError: names the column.
    """
    given = {name: row[name] for name in _MARKS if isinstance(row.get(name), int | float)}
    for name, value in given.items():
        if value == _MARKS[name]:
            raise DataError(
                f"{where}: {name} {value!r} excludes the whole row from the loss",
                hint=f"remove such rows, or rename the column if {name} means something else; on a message, {name} "
                "excludes that answer",
            )


def check_wanted(row: Mapping[str, Any], where: str, layout: str, messages: Sequence[Message]) -> None:
    """Refuse a row if the conversation alone does not say what to learn.

    That is so if the answer is in another column, is marked as unwanted, or if the prompt also depends on template
    variables or on images, video or audio.

    Args:
        row: a row without columns that are None.
        where: place of the row, for error messages.
        layout: layout of the conversation.
        messages: the conversation; if it already ends with an answer, ``chosen`` and ``rejected`` are ignored.

    Raises:
        DataError: the row is refused.
    """
    if messages[-1]["role"] != "assistant" and all(name in row for name in _PREFERENCE):
        raise DataError(
            f"{where}: {layout} does not end with an answer, and chosen and rejected are not read",
            hint=f"append the chosen answer to {layout}; preference training is not supported",
        )
    variables = row.get(_VARIABLES)
    if isinstance(variables, dict):  # Parquet gives every row the keys of all rows
        variables = [value for value in variables.values() if value is not None]
    if variables:
        raise DataError(
            f"{where}: {_VARIABLES} cannot be set for a single row",
            hint="remove the column; --chat-template-kwargs NAME=VALUE of train and evaluate sets them for all rows",
        )
    for mark, column in _PLACEHOLDERS:
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
    """Return whether a message is excluded from the loss.

    Raises:
        DataError: a mark is neither 0, 1, false nor true, two marks contradict each other, or one marks parts of a
            message or is ambiguous.
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
    if message.get(_AMBIGUOUS) in (0, 1):
        raise DataError(
            f"{where}: has {_AMBIGUOUS}, which excludes an answer from the loss in some data and includes it in others",
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
    """Return the marks that hold: on an answer all; elsewhere those that exclude, since only answers are learned."""
    return {name for name, out in _MARKS.items() if is_answer or message.get(name) == out}
