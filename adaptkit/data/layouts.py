"""Detection of a row's layout from its column names.

Some names are ambiguous: beside the columns of another layout they mean something else (an ``input`` beside an
instruction, a database ``query`` beside a question). They count only if the row has no unambiguous layout.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from adaptkit.errors import DataError

QUESTIONS = ("instruction", "question", "prompt")
_OTHER_QUESTIONS = ("input", "query", "problem", "inputs")
_CERTAIN = (*QUESTIONS, "messages", "conversations", "text")
LAYOUTS = (*_CERTAIN, "conversation", *_OTHER_QUESTIONS)
ANSWERS = ("output", "response", "completion", "answer")
_OTHER_ANSWERS = {"problem": ("solution",), "inputs": ("targets",)}
_OF_TREES = ("message_id", "parent_id")
"""Columns of OASST1, where each row is a single message of a conversation tree."""
_KNOWN = "instruction and output, question and answer, prompt and completion, messages, conversations, or text"


def has_question(layout: str) -> bool:
    """Return whether rows of a layout have separate columns for question and answer."""
    return layout in (*QUESTIONS, *_OTHER_QUESTIONS)


def answers_in(row: Mapping[str, Any], layout: str) -> list[str]:
    """Return the columns of a row that may hold the answer, where column ``layout`` holds the question."""
    return [name for name in (*ANSWERS, *_OTHER_ANSWERS.get(layout, ())) if name in row]


def require_answers(row: Mapping[str, Any], layout: str, where: str, empty: Sequence[str]) -> list[str]:
    """Return ``answers_in``.

    Raises:
        DataError: there is none.
    """
    found = answers_in(row, layout)
    if not found:
        refuse_null(where, empty, answers_in(dict.fromkeys(empty), layout))
        raise DataError(f"{where}: no column {' or '.join(ANSWERS)}", hint=f"columns: {names_in(row)}")
    return found


def layout_of(row: Mapping[str, Any], where: str, empty: Sequence[str] = ()) -> str:
    """Return the layout of a row.

    Args:
        row: columns that have a value.
        where: place of the row, for error messages.
        empty: names of the row's columns that have none.

    Raises:
        DataError: the row has no layout or more than one, or is a single message of a conversation.
    """
    fitting = [name for name in LAYOUTS if name in row and (answers_in(row, name) or not has_question(name))]
    found = [name for name in fitting if name in _CERTAIN] or fitting
    asked, answered = any(name in row for name in QUESTIONS), any(name in row for name in ANSWERS)
    if not found and asked != answered:
        missing, what = (QUESTIONS, "question") if answered else (ANSWERS, "answer")
        refuse_null(where, empty, missing)
        raise DataError(
            f"{where}: no column {' or '.join(missing)}",
            hint=f"columns: {names_in(row)}; rename the one with the {what}",
        )
    if not found:
        refuse_null(where, empty, (*LAYOUTS, *ANSWERS, *chain(*_OTHER_ANSWERS.values())))
        raise DataError(
            f"{where}: unknown layout; expected {_KNOWN}",
            hint=f"columns: {names_in(row)}; rename or convert them to one of these",
        )
    if len(found) > 1:
        raise DataError(
            f"{where}: has columns of more than one layout: {' and '.join(found)}",
            hint=f"choose one, such as --layout {found[0]}",
        )
    if found == ["text"] and "role" in row and any(name in row for name in _OF_TREES):
        raise DataError(
            f"{where}: text beside role and {next(name for name in _OF_TREES if name in row)} is a single message",
            hint="write each conversation as a row with a list of messages; --layout text learns the texts as they are",
        )
    return found[0]


def refuse_null(where: str, empty: Sequence[str], wanted: Iterable[str]) -> None:
    """Raise if one of the columns that a row needs is null.

    Raises:
        DataError: names the column.
    """
    for name in wanted:
        if name in empty:
            may_be_empty = name not in LAYOUTS or has_question(name)  # an empty text or conversation is refused
            or_write = ', or write "" if an empty text is meant' if may_be_empty else ""
            raise DataError(f"{where}: {name} is null", hint=f"remove the row{or_write}")


def names_in(row: Mapping[str, Any]) -> str:
    """Return the column names of a row as one string, for messages."""
    return ", ".join(name if name == name.strip() else repr(name) for name in map(str, row)) or "none"
