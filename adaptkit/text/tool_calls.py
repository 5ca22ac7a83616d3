"""Tools in conversations: what data have of them, what a chat template takes, and what has to be in its text.

    row        "tools": functions, each with its JSON schema; a list, or the JSON text of one; or "functions", a list
    assistant  "tool_calls": [{"type": "function", "function": {"name", "arguments"}}, ...], with content or without;
               also {"name", "arguments"} alone, or one as "function_call"; arguments are an object or its JSON text
    tool       what a call gave: its content, with its name and tool_call_id if there are such

The assistant learns to make the calls; what tools give is read, as a question is.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adaptkit.errors import DataError
from adaptkit.text.chat_template import HINT
from adaptkit.text.parts import are_of_text, joined
from adaptkit.text.thoughts import FIELD

Tools = tuple[Mapping[str, Any], ...]
"""Of a row, each {"type": "function", "function": {"name", ...}}."""

CALLS = "tool_calls"
WHOLE = "write characters beyond U+FFFF whole, or as surrogate pairs"
"""A hint."""
_GIVEN = ("name", "tool_call_id")
"""What a tool's message has beside its content."""
_DEEPEST = 64
_HALF = re.compile("[\ud800-\udfff]")
_FORMS: tuple[tuple[bool, str | None], ...] = ((False, ""), (False, None), (True, ""), (True, None))
"""Whether arguments are text, and what no content is; transformers (5.24) leaves out what is None."""


def read_tools(value: Any, where: str, column: str = "tools") -> Tools:
    """The tools of a row.

    Raises:
        DataError: it is no list of functions.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{where}: {column}") if value.strip() else None
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        hint = f'write each as {{"name", "description", "parameters"}}, or rename {column} if it means something else'
        raise DataError(f"{where}: {column} is not a list of functions", hint=hint)
    found = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for tool in found:
        _named(tool["function"], f"{where}: a tool")
        _check(tool, f"{where}: {column}")
    return tuple(found)


def read_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls in a message of the assistant's; empty if there are none.

    Raises:
        DataError: one has no name, or arguments that are no object.
    """
    given = message.get(CALLS) or []
    if isinstance(given, str):
        given = _parsed(given, f"{where}: {CALLS}") or []
    if not isinstance(given, list):
        raise DataError(f"{where}: {CALLS} is not a list", hint='write each as {"function": {"name", "arguments"}}')
    calls = [_call(call, where) for call in given]
    old = [_call(message["function_call"], where)] if message.get("function_call") else []
    functions = [call["function"] for call in calls]
    return calls + [call for call in old if call["function"] not in functions]


def calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls in a message that is nothing else, as ShareGPT's ``function_call`` has them.

    Raises:
        DataError: it is no JSON of calls.
    """
    found = _parsed(value, where) if isinstance(value, str) else value
    calls = [_call(call, where) for call in (found if isinstance(found, list) else [found])]
    if not calls:
        raise DataError(f"{where}: contains no tool call", hint='write a call as {"name", "arguments"}')
    return calls


def read_given(message: Mapping[str, Any], where: str) -> tuple[Any, dict[str, str]]:
    """What a tool's message says, parts of text joined, objects as their JSON text, and which call it answers.

    Raises:
        DataError: it holds what is no text.
    """
    content = message.get("content", message.get("value"))
    content = joined(content, where)[0] if are_of_text(content) else content
    others = {name: message[name] for name in _GIVEN if isinstance(message.get(name), str)}
    _check([content, others], where)
    return (_json(content) if isinstance(content, dict | list) else content), others


def is_text(value: Any) -> bool:
    """Whether this is a string that tokenizers take: JSON's escapes can write half a character."""
    return isinstance(value, str) and _HALF.search(value) is None


def found_in(value: Any) -> str:
    """What stands where a text should, for people."""
    return "an unpaired surrogate" if isinstance(value, str) else type(value).__name__


def names_of(tools: Tools) -> list[str]:
    """What the tools are called."""
    return [str(tool["function"]["name"]) for tool in tools]


def missing_in(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """The first of the calls' names, keys and words that a text does not have; empty if all are there."""
    return next((word for call in calls for word in _words(call["function"]) if not is_written(word, text)), "")


def end_of_words(calls: Sequence[Mapping[str, Any]], text: str) -> int:
    """Where the last word of calls ends that a text ends with."""
    forms = [form for call in calls for word in _words(call["function"]) for form in _forms(word)]
    return max((at + len(form) for form in forms if (at := text.rfind(form)) >= 0), default=0)


def is_written(word: str, text: str) -> bool:
    """Whether a text has a word as it is, or as JSON writes it."""
    return any(form in text for form in _forms(word))


class ToolForm:
    """How one chat template takes tools and calls, and what it loses of them; it is asked once.

    Arguments are an object or its text, beside empty content or none: transformers asks for the first of these.

    Args:
        render: a conversation with tools to the text that the template makes of it; to nothing where it refuses it.
        prepare: a message to what the template takes but for its calls.
    """

    def __init__(
        self,
        render: Callable[[Sequence[dict[str, Any]], Tools], str],
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._render, self._prepare, self._answers = render, prepare, dict[str, bool]()
        self._as_text, self._nothing = next(filter(self._is_taken, _FORMS), _FORMS[0])

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as the template takes it."""
        message = self._prepare(message)
        if CALLS not in message:
            return message
        calls = [
            call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
            if self._as_text
            else call
            for call in message[CALLS]
        ]
        return message | {"content": message["content"] or self._nothing, CALLS: calls}

    def lost(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> DataError | None:
        """What the template loses of a conversation, whatever its words are; None if nothing."""
        for kind in sorted(_kinds(messages, tools)):
            if self._loses(kind):
                return DataError(
                    f"the chat template leaves out {kind}", hint=f"leave such conversations out, or {HINT}"
                )
        return None

    def _is_taken(self, form: tuple[bool, str | None]) -> bool:
        self._as_text, self._nothing = form
        text = self._written([_answer()])
        return _WORD in text and f"'{_WORD}'" not in text  # which is how Python writes it

    def _loses(self, kind: str) -> bool:
        if kind not in self._answers:
            messages, tools, words = _PROBES[kind]
            text = self._written(messages, tools)
            written = all(any(form in text for form in word.split("|")) for word in words)
            self._answers[kind] = bool(text) and not written
        return self._answers[kind]

    def _written(self, messages: Sequence[dict[str, Any]], tools: Tools = ()) -> str:
        return self._render([_QUESTION, *map(self.message, messages)], tools)


def _kinds(messages: Sequence[Mapping[str, Any]], tools: Tools) -> set[str]:
    """What a conversation has that a template may lose."""
    found = {_TOOLS} if tools else set()
    for message in messages:
        if message["role"] == "tool":
            found.add(_RESULTS)
        calls = message.get(CALLS, ())
        found |= {_SEVERAL} if len(calls) > 1 else set()
        found |= {_BESIDE} if calls and message["content"].strip() else set()
        found |= {_AFTER} if calls and message.get(FIELD) else set()
        found |= {_ALONE} if calls else set()
        found |= {_KINDS[type(leaf)] for call in calls for leaf in _leaves(call["function"]["arguments"])} - {""}
    return found


def _answer(content: str = "", count: int = 1, **arguments: Any) -> dict[str, Any]:
    """An assistant's message with calls that no data have."""
    calls = [
        {"type": "function", "id": f"call0000{number}", "function": {"name": f"probe{number}", "arguments": given}}
        for number, given in enumerate([{"key": _WORD, **arguments}, {"key": f"{_WORD}ed"}][:count])
    ]
    return {"role": "assistant", "content": content, CALLS: calls}


_WORD = "inkling"
_QUESTION = {"role": "user", "content": "question"}
_TOOL = {"name": "probe0", "description": "", "parameters": {"type": "object", "properties": {"key": {}}}}
OTHER_TOOLS: Tools = ({"type": "function", "function": _TOOL | {"name": "sundial"}},)
"""What no probe calls."""
_TOOLS, _RESULTS, _ALONE = "the list of tools", "tool results", "tool calls"
_SEVERAL, _BESIDE, _AFTER = "tool calls after the first", "tool calls beside content", "tool calls after reasoning"
_NUMBERS, _TRUTHS, _NOTHING = (
    "tool arguments that are numbers",
    "tool arguments that are true or false",
    "tool arguments that are null",
)
_KINDS = {str: "", int: _NUMBERS, float: _NUMBERS, bool: _TRUTHS, type(None): _NOTHING}
_GIVEN_BACK = {"role": "tool", "content": "murmur", "name": "probe0", "tool_call_id": "call00000"}
_PROBES: dict[str, tuple[list[dict[str, Any]], Tools, tuple[str, ...]]] = {
    _TOOLS: ([], ({"type": "function", "function": _TOOL},), ("probe0",)),
    _RESULTS: ([_answer(), _GIVEN_BACK], (), ("murmur",)),
    _ALONE: ([_answer()], (), ("probe0", _WORD)),
    _SEVERAL: ([_answer(count=2)], (), ("probe0", "probe1", f"{_WORD}ed")),
    _BESIDE: ([_answer("murmur")], (), (_WORD, "murmur")),
    _AFTER: ([_answer() | {FIELD: "murmur"}], (), (_WORD,)),
    _NUMBERS: ([_answer(number=271828)], (), ("271828",)),
    _TRUTHS: ([_answer(flag=True)], (), ("true|True",)),
    _NOTHING: ([_answer(nothing=None)], (), ("null|None",)),
}
"""A conversation after a question, its tools, and what has to be in the text of them."""


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    name = _named(function, f"{where}: a tool call")
    arguments = function.get("arguments", function.get("parameters")) if isinstance(function, dict) else None
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {name}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise DataError(f"{where}: the arguments of {name} are not an object", hint="write a JSON object, or its text")
    known = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    call = {"type": "function", **known, "function": {"name": name, "arguments": arguments or {}}}
    _check(call, f"{where}: a call of {name!r}")
    return call


def _named(function: Any, what: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{what} has no name", hint='write a function as {"name", ...}')
    return name


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what}: not JSON ({error})", hint="write an object or a list, or the JSON text of one"
        ) from error


def _words(function: Mapping[str, Any]) -> Iterator[str]:
    yield str(function["name"])
    yield from (leaf for leaf in _leaves(function["arguments"]) if isinstance(leaf, str))


def _leaves(value: Any) -> Iterator[Any]:
    """Keys, and what is neither object nor list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _check(value: Any, what: str, depth: int = 0) -> None:
    """Refuse what no tokenizer and no template can take."""
    if depth > _DEEPEST:
        raise DataError(f"{what}: nested more than {_DEEPEST} levels deep", hint="leave such conversations out")
    if isinstance(value, dict | list):
        for inner in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check(inner, what, depth + 1)
    elif isinstance(value, str):
        if not is_text(value):
            raise DataError(f"{what}: expected text, found {found_in(value)}", hint=WHOLE)
    elif type(value) not in _KINDS or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{what}: {value!r} is not a JSON value", hint="write it as a string")


def _forms(word: str) -> tuple[str, ...]:
    """A word as a text may have it: as it is, or as JSON writes it."""
    bare = word.strip()
    return (bare, *(json.dumps(some, ensure_ascii=ascii)[1:-1] for some in (bare, word) for ascii in (False, True)))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
