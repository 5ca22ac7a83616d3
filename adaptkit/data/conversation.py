"""Layouts of rows, and reading the conversation or text in a row.

    instruction    {"instruction", "output"}            a question and an answer. The answer's column may also be named
    question       {"question", "answer"}               output, response, completion or answer. Optional: context or
    prompt         {"prompt", "completion"}             input, appended to the question; system; history, the earlier
                                                        turns; the answer's reasoning, named as in messages. Prompt
                                                        and completion may also be lists of messages.
    messages       {"messages": [{"role", "content"}, ...]}         from and value are read too. Marks such as
    conversations  {"conversations": [{"from", "value"}, ...]}      "weight": 0 exclude an answer from the loss.
                                                                    Reasoning may be in reasoning_content, reasoning
                                                                    or thinking, tool calls in tool_calls; the row
                                                                    lists the tools.
    text           {"text"}

``layouts`` has further column names for questions, answers and conversations.

A row must have exactly one layout, unless the caller names one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaptkit.data.layouts import has_question, layout_of, names_in, refuse_null, require_answers
from adaptkit.data.learning_marks import check_wanted, is_marked_out, obeyed_marks
from adaptkit.data.parts import joined
from adaptkit.data.reasoning import FIELD, NAMES, Message, read_reasoning
from adaptkit.data.tool_calls import CALLS, Tools, calls_in, read_calls, read_given, read_tools
from adaptkit.data.values import SURROGATE_HINT, found_in, is_text
from adaptkit.errors import DataError

_CONTEXTS = ("context", "input")
_ONE_CALL = "tool_call"
"""A role of ms-swift; such a message joins the answer or call before it into one turn."""
_WRITE = 'write messages as {"role": ..., "content": ...} or {"from": ..., "value": ...}'
_ROLES = {
    **{"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"developer": "system", "model": "assistant", "function_call": "assistant", "tool_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool"},
}


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
    layout = layout or layout_of(row, where, empty)
    if layout not in row:
        refuse_null(where, empty, [layout])
        raise DataError(f"{where}: no column {layout}", hint=f"columns: {names_in(row)}")
    if layout == "text":
        return Example(layout, text=_text(row, layout, where), columns=frozenset({layout}))
    if has_question(layout):
        messages, columns = _asked(row, layout, where, empty)
    else:
        messages, columns = _turns(row, layout, where), {layout}
    system = "system" if row.get("system", "") != "" or messages[0].role == "system" else "system_prompt"
    if row.get(system, "") != "":
        if messages[0].role == "system":
            raise DataError(f"{where}: has both a column {system} and a system message", hint="remove one of them")
        messages, columns = [_Turn("system", _text(row, system, where)), *messages], {*columns, system}
    check_wanted(row, where, layout, [turn.message for turn in messages])
    # OpenAI's older format.
    is_older = layout == "messages" and isinstance(row.get("functions"), list) and not row.get("tools")
    offered = {"functions" if is_older else "tools"} & row.keys()
    tools = tuple(tool for name in offered for tool in read_tools(row[name], where, name))
    learned = tuple(number for number, turn in enumerate(messages) if turn.learned)
    if not learned:
        raise DataError(
            f"{where}: no assistant message to learn",
            hint="add an answer, or remove the row; weight 0, or loss or train false, excludes an answer",
        )
    return Example(
        layout,
        tuple(turn.message for turn in messages),
        tools,
        learned,
        columns=frozenset({*columns, *offered}),
        ignored=frozenset[str]().union(*(turn.ignored for turn in messages)),
    )


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str
    learned: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def message(self) -> Message:
        """The message, without empty fields."""
        return {
            "role": self.role,
            "content": self.content,
            **{key: value for key, value in self.others.items() if value},
        }


def _asked(row: Mapping[str, Any], layout: str, where: str, empty: Sequence[str]) -> tuple[list[_Turn], set[str]]:
    """Return the conversation in separate columns for question, context and answer, and the columns used."""
    others = [name for name in _CONTEXTS if name in row and name != layout]
    contexts = [name for name in others if row[name] != ""]
    answers = require_answers(row, layout, where, empty)
    for names in (answers, contexts):
        if len(names) > 1:
            raise DataError(f"{where}: has both {names[0]} and {names[1]}", hint="remove one of the columns")
    columns = {layout, answers[0], *others}
    if isinstance(row[layout], list) and isinstance(row[answers[0]], list):
        before = [replace(turn, learned=False) for turn in _turns(row, layout, where)]
        return before + _turns(row, answers[0], where), columns - set(others)
    question = "\n\n".join(filter(None, (_text(row, name, where) for name in (layout, *contexts))))
    answer = _text(row, answers[0], where)
    apart = {name: row[name] for name in NAMES if is_text(row.get(name))}  # not flags or scores
    said = _Turn("assistant", answer, True, {FIELD: read_reasoning(apart, answer, where)})
    earlier = _history_turns(row.get("history", []), where)
    return [*earlier, _Turn("user", question), said], columns | apart.keys() | ({"history"} & row.keys())


def _history_turns(history: Any, where: str) -> list[_Turn]:
    """Return the turns of a LLaMA-Factory ``history``; as there, its answers are learned too."""
    pairs = [] if history in ("", "[]") else history  # also from a CSV cell
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair)) for pair in pairs
    ):
        hint = 'write [["question", "answer"], ...], or rename the column if it means something else'
        raise DataError(f"{where}: history is not a list of earlier turns", hint=hint)
    return [turn for asked, said in pairs for turn in (_Turn("user", asked), _Turn("assistant", said, True))]


def _turns(row: Mapping[str, Any], column: str, where: str) -> list[_Turn]:
    messages = row[column]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        found = type(messages).__name__ if not isinstance(messages, list) else "other values" if messages else "none"
        raise DataError(f"{where}: {column}: expected a list of messages, found {found}", hint=_WRITE)
    turns: list[_Turn] = []
    for number, given in enumerate(messages, 1):
        message = {name: value for name, value in given.items() if value is not None}
        at = f"{where}: message {number} of {column}"
        turn, is_call = _turn(message, at), message.get("role", message.get("from")) == _ONE_CALL
        follows = is_call and turns and turns[-1].role == "assistant"
        turns.append(_with_call(turns.pop(), turn, at) if follows else turn)
    return turns


def _with_call(before: _Turn, call: _Turn, where: str) -> _Turn:
    """Append a call to the answer or call before it, as ms-swift does."""
    own = call.others[FIELD] not in ("", before.others[FIELD])
    if own or before.learned != call.learned:
        said = "only the call has this reasoning" if own else "only one of them is learned"
        hint = "write reasoning into the first of them" if own else "mark both or none to be excluded from the loss"
        raise DataError(f"{where}: the call and the answer or call before it are one turn, and {said}", hint=hint)
    calls = [*before.others.get(CALLS, ()), *call.others[CALLS]]
    return replace(before, others={**before.others, CALLS: calls}, ignored=before.ignored | call.ignored)


def _turn(message: Mapping[str, Any], where: str) -> _Turn:
    said_by, says = ("role" if "role" in message else "from"), ("content" if "content" in message else "value")
    role, content = message.get(said_by), message.get(says)
    if not isinstance(role, str) or role not in _ROLES:
        problem = "no role" if role is None else f"unknown role {role!r}"
        raise DataError(f"{where}: {problem}", hint=_WRITE if role is None else f"roles: {', '.join(_ROLES)}")
    is_answer = _ROLES[role] == "assistant"
    others: dict[str, Any] = {}
    unread = frozenset[str]()
    if role in (_ONE_CALL, "function_call"):  # function_call as a role is ShareGPT's
        content, others = "", {CALLS: calls_in(content, f"{where}, its value")}
    elif _ROLES[role] == "tool":
        content, others = read_given(message, where)
    else:
        content, unread = joined(content, where)
        others = {CALLS: read_calls(message, where)} if is_answer else {}
    content = "" if content in (None, []) and others.get(CALLS) else content
    if not is_text(content):
        raise DataError(
            f"{where}: expected text, found {found_in(content)}",
            hint='write content (or value) as a string, "" if it is empty, or as a list of text parts',
        )
    is_learned = not is_marked_out(message, where) and is_answer
    known = {said_by, says} | set(others) | ({*NAMES, "function_call"} if is_answer else set())
    known |= obeyed_marks(message, is_answer)
    ignored = frozenset(str(key) for key in message if key not in known)
    fields = {name: _text(message, name, where) for name in NAMES if is_answer and message.get(name)}
    reasoning = read_reasoning(fields, str(content), where)
    return _Turn(_ROLES[role], str(content), is_learned, {FIELD: reasoning} | others, ignored | unread)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not is_text(row[name]):
        hint = SURROGATE_HINT if isinstance(row[name], str) else f"write {name} as a string"
        raise DataError(f"{where}: {name}: expected text, found {found_in(row[name])}", hint=hint)
    return str(row[name])
