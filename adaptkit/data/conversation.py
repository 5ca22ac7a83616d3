"""Layouts of rows, and reading the conversation or text in a row.

    instruction    {"instruction", "output"}            a question and an answer. The answer's column may also be named
    question       {"question", "answer"}               output, response, completion or answer. Optional: context or
    prompt         {"prompt", "completion"}             input, appended to the question; system; history, the earlier
                                                        turns; the answer's reasoning, named as in messages. Prompt
                                                        and completion may also be lists of messages.
    messages       {"messages": [{"role", "content"}, ...]}         see ``messages``; the row lists the tools
    conversations  {"conversations": [{"from", "value"}, ...]}
    text           {"text"}

``LAYOUTS`` and ``_ANSWERS`` have further column names. A row must have exactly one layout, unless the caller names one.
Some names are ambiguous: beside the columns of another layout they mean something else (an ``input`` beside an
instruction, a database ``query`` beside a question). They count only if the row has no unambiguous layout.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from adaptkit.data.messages import (
    EXCLUDING,
    REASONING,
    REASONING_FIELDS,
    Message,
    Turn,
    read_reasoning,
    read_turns,
    text_in,
)
from adaptkit.data.tool_calls import Tools, read_tools
from adaptkit.data.values import is_text
from adaptkit.errors import DataError

_QUESTIONS = ("instruction", "question", "prompt")
_OTHER_QUESTIONS = ("input", "query", "problem", "inputs")
_CERTAIN = (*_QUESTIONS, "messages", "conversations", "text")
LAYOUTS = (*_CERTAIN, "conversation", *_OTHER_QUESTIONS)
_ANSWERS = ("output", "response", "completion", "answer")
_OTHER_ANSWERS = {"problem": ("solution",), "inputs": ("targets",)}
_CONTEXTS = ("context", "input")
_OF_TREES = ("message_id", "parent_id")
"""Columns of OASST1, where each row is a single message of a conversation tree."""
_KNOWN = "instruction and output, question and answer, prompt and completion, messages, conversations, or text"

_PREFERENCE = ("chosen", "rejected")
_UNWANTED = ("label", "kto_tag", "desirable")
"""Boolean columns of TRL, LLaMA-Factory and others; texts and numbers under these names are other class labels."""
_VARIABLES = "chat_template_kwargs"
_PLACEHOLDERS = [(f"<{kind}>", column) for kind in ("image", "video", "audio") for column in (kind, f"{kind}s")]
"""Placeholders that LLaVA, LLaMA-Factory and ms-swift put into a text, each with the column of what they stand for."""


@dataclass(frozen=True)
class Example:
    """The conversation or text of a row.

    Attributes:
        layout: one of ``LAYOUTS``.
        messages: the conversation's messages; empty if the row holds text.
        tools: tools that the assistant may call.
        learned: indices of the messages that the model learns, ascending.
        text: the text; None if the row holds a conversation.
        columns: columns of the row that were used.
        ignored: keys of messages that were not used.
    """

    layout: str
    messages: tuple[Message, ...] = ()
    tools: Tools = ()
    learned: tuple[int, ...] = ()
    text: str | None = None
    columns: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()


def read_example(row: Mapping[str, Any], where: str, layout: str | None = None) -> Example:
    """Read the conversation or text in a row.

    Args:
        row: columns that are None, as in Parquet, count as absent.
        where: place of the row, for error messages.
        layout: layout of the row; None to detect it.

    Raises:
        DataError: the row has none of the layouts or more than one, or a column's value is invalid.
    """
    empty = [name for name, value in row.items() if value is None]
    row = {name: value for name, value in row.items() if value is not None}
    layout = layout or _layout_of(row, where, empty)
    if layout not in row:
        _refuse_null(where, empty, [layout])
        raise DataError(f"{where}: no column {layout}", hint=f"columns: {_names_in(row)}")
    if layout == "text":
        return Example(layout, text=text_in(row, layout, where), columns=frozenset({layout}))
    if _has_question(layout):
        turns, columns = _asked(row, layout, where, empty)
    else:
        turns, columns = read_turns(row, layout, where), {layout}
    system = "system" if row.get("system", "") != "" or turns[0].role == "system" else "system_prompt"
    if row.get(system, "") != "":
        if turns[0].role == "system":
            raise DataError(f"{where}: has both a column {system} and a system message", hint="remove one of them")
        turns, columns = [Turn("system", text_in(row, system, where)), *turns], {*columns, system}
    messages = tuple(turn.message for turn in turns)
    _check_wanted(row, where, layout, messages)
    # OpenAI's older format.
    is_older = layout == "messages" and isinstance(row.get("functions"), list) and not row.get("tools")
    offered = {"functions" if is_older else "tools"} & row.keys()
    tools = tuple(tool for name in offered for tool in read_tools(row[name], where, name))
    learned = tuple(number for number, turn in enumerate(turns) if turn.learned)
    if not learned:
        hint = "add an answer, or remove the row; weight 0, or loss or train false, excludes an answer"
        raise DataError(f"{where}: no assistant message to learn", hint=hint)
    ignored = frozenset[str]().union(*(turn.ignored for turn in turns))
    return Example(layout, messages, tools, learned, None, frozenset({*columns, *offered}), ignored)


def _asked(row: Mapping[str, Any], layout: str, where: str, empty: Sequence[str]) -> tuple[list[Turn], set[str]]:
    """Return the conversation in separate columns for question, context and answer, and the columns used."""
    others = [name for name in _CONTEXTS if name in row and name != layout]
    contexts = [name for name in others if row[name] != ""]
    answers = _answers_in(row, layout)
    if not answers:
        _refuse_null(where, empty, _answers_in(dict.fromkeys(empty), layout))
        raise DataError(f"{where}: no column {' or '.join(_ANSWERS)}", hint=f"columns: {_names_in(row)}")
    for names in (answers, contexts):
        if len(names) > 1:
            raise DataError(f"{where}: has both {names[0]} and {names[1]}", hint="remove one of the columns")
    columns = {layout, answers[0], *others}
    if isinstance(row[layout], list) and isinstance(row[answers[0]], list):
        before = [replace(turn, learned=False) for turn in read_turns(row, layout, where)]
        return before + read_turns(row, answers[0], where), columns - set(others)
    question = "\n\n".join(filter(None, (text_in(row, name, where) for name in (layout, *contexts))))
    answer = text_in(row, answers[0], where)
    apart = {name: row[name] for name in REASONING_FIELDS if is_text(row.get(name))}  # not flags or scores
    said = Turn("assistant", answer, True, {REASONING: read_reasoning(apart, answer, where)})
    earlier = _earlier_turns(row.get("history", []), where)
    return [*earlier, Turn("user", question), said], columns | apart.keys() | ({"history"} & row.keys())


def _earlier_turns(history: Any, where: str) -> list[Turn]:
    """Return the turns of a LLaMA-Factory ``history``; as there, its answers are learned too."""
    pairs = [] if history in ("", "[]") else history  # also from a CSV cell
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair)) for pair in pairs
    ):
        hint = 'write [["question", "answer"], ...], or rename the column if it means something else'
        raise DataError(f"{where}: history is not a list of earlier turns", hint=hint)
    return [turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said, True))]


def _layout_of(row: Mapping[str, Any], where: str, empty: Sequence[str]) -> str:
    """Return the layout of a row; refuse one without any, with several, or with a single message of a conversation."""
    fitting = [name for name in LAYOUTS if name in row and (_answers_in(row, name) or not _has_question(name))]
    found = [name for name in fitting if name in _CERTAIN] or fitting
    asked, answered = any(name in row for name in _QUESTIONS), any(name in row for name in _ANSWERS)
    if not found and asked != answered:
        missing, what = (_QUESTIONS, "question") if answered else (_ANSWERS, "answer")
        _refuse_null(where, empty, missing)
        hint = f"columns: {_names_in(row)}; rename the one with the {what}"
        raise DataError(f"{where}: no column {' or '.join(missing)}", hint=hint)
    if not found:
        _refuse_null(where, empty, (*LAYOUTS, *_ANSWERS, *chain(*_OTHER_ANSWERS.values())))
        hint = f"columns: {_names_in(row)}; rename or convert them to one of these"
        raise DataError(f"{where}: unknown layout; expected {_KNOWN}", hint=hint)
    if len(found) > 1:
        hint = f"choose one, such as --layout {found[0]}"
        raise DataError(f"{where}: has columns of more than one layout: {' and '.join(found)}", hint=hint)
    if found == ["text"] and "role" in row and any(name in row for name in _OF_TREES):
        raise DataError(
            f"{where}: text beside role and {next(name for name in _OF_TREES if name in row)} is a single message",
            hint="write each conversation as a row with a list of messages; --layout text learns the texts as they are",
        )
    return found[0]


def _has_question(layout: str) -> bool:
    """Return whether rows of a layout have separate columns for question and answer."""
    return layout in (*_QUESTIONS, *_OTHER_QUESTIONS)


def _answers_in(row: Mapping[str, Any], layout: str) -> list[str]:
    """Return the columns of a row that may hold the answer, where column ``layout`` holds the question."""
    return [name for name in (*_ANSWERS, *_OTHER_ANSWERS.get(layout, ())) if name in row]


def _refuse_null(where: str, empty: Sequence[str], wanted: Iterable[str]) -> None:
    """Raise if one of the columns that a row needs is null."""
    for name in wanted:
        if name in empty:
            may_be_empty = name not in LAYOUTS or _has_question(name)  # an empty text or conversation is refused
            or_write = ', or write "" if an empty text is meant' if may_be_empty else ""
            raise DataError(f"{where}: {name} is null", hint=f"remove the row{or_write}")


def _names_in(row: Mapping[str, Any]) -> str:
    return ", ".join(name if name == name.strip() else repr(name) for name in map(str, row)) or "none"


def check_not_excluded(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a row that is excluded from the loss as a whole: it should not be in the data."""
    for name, out in EXCLUDING.items():
        if isinstance(row.get(name), int | float) and row[name] == out:
            raise DataError(
                f"{where}: {name} {row[name]!r} excludes the whole row from the loss",
                hint=f"remove such rows, or rename the column if {name} means something else; on a message, {name} "
                "excludes that answer",
            )


def _check_wanted(row: Mapping[str, Any], where: str, layout: str, messages: Sequence[Message]) -> None:
    """Refuse a row if the conversation alone does not say what to learn.

    That is so if the answer is in another column, is marked as unwanted, or if the prompt also depends on template
    variables or on images, video or audio. Without these, ``chosen`` and ``rejected`` are ignored.
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
        hint = "remove the column; --chat-template-kwargs NAME=VALUE of train and evaluate sets them for all rows"
        raise DataError(f"{where}: {_VARIABLES} cannot be set for a single row", hint=hint)
    for mark, column in _PLACEHOLDERS:
        if row.get(column) and any(mark in message["content"] for message in messages):
            raise DataError(
                f"{where}: has {mark} in its text, but {column} is not read: only text is supported",
                hint="remove rows with images, video or audio",
            )
    for name in _UNWANTED:
        if row.get(name) is False:
            hint = f"remove such rows, or rename the column if {name} means something else"
            raise DataError(f"{where}: {name} is false, which marks an unwanted answer", hint=hint)
