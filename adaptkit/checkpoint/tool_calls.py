"""Tools in conversations: what data have of them, what a chat template takes, and what has to be in its text.

    row        "tools": functions, each with its JSON schema; a list, or the JSON text of one
    assistant  "tool_calls": [{"type": "function", "function": {"name", "arguments"}}, ...], with content or without;
               also {"name", "arguments"} alone, or one as "function_call"; arguments are an object or its JSON text
    tool       what a call gave: its content, with its name and tool_call_id if there are such

The assistant learns to make the calls; what tools give is read, as a question is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adaptkit.errors import DataError

Tools = tuple[Mapping[str, Any], ...]
"""Of a row, each {"type": "function", "function": {"name", ...}}."""

CALLS = "tool_calls"
GIVEN = ("name", "tool_call_id")
"""What a tool's message has beside its content."""
_ARGUMENT = "inkling"
_QUESTION = {"role": "user", "content": "question"}
_DEEPEST = 64
_FORMS: tuple[tuple[bool, str | None], ...] = ((False, ""), (False, None), (True, ""), (True, None))
"""Whether arguments are text, and what no content is: as transformers asks for them, and as older templates do."""


def read_tools(value: Any, where: str) -> Tools:
    """The tools of a row.

    Raises:
        DataError: it is no list of functions.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{where}: tools") if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools is no list of functions", hint='each is {"name", "description", "parameters"}')
    found = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for tool in found:
        _named(tool["function"], f"{where}: a tool")
        _check(tool, f"{where}: tools")
    return tuple(found)


def read_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls in a message of the assistant's; empty if there are none.

    Raises:
        DataError: one has no name, or arguments that are no object.
    """
    given = message.get(CALLS) or []
    if isinstance(given, str):
        given = _parsed(given, f"{where}: {CALLS}")
    if not isinstance(given, list):
        raise DataError(f"{where}: {CALLS} is no list", hint='each is {"function": {"name", "arguments"}}')
    if message.get("function_call"):
        given = [*given, message["function_call"]]
    return [_call(call, where) for call in given]


def calls_in(text: str, where: str) -> list[dict[str, Any]]:
    """The calls in the text of a message that is nothing else, as ShareGPT's ``function_call`` has them.

    Raises:
        DataError: it is no JSON of calls.
    """
    found = _parsed(text, where)
    return [_call(call, where) for call in (found if isinstance(found, list) else [found])]


def names_of(tools: Tools) -> list[str]:
    """What the tools are called."""
    return [str(tool["function"]["name"]) for tool in tools]


def missing_in(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """The first of the calls' names, keys and words that a text does not have; empty if all are there."""
    return next((word for call in calls for word in _words(call["function"]) if not is_written(word, text)), "")


def is_written(word: str, text: str) -> bool:
    """Whether a text has a word as it is, or as JSON writes it."""
    return any(form in text for form in (word.strip(), _escaped(word, False), _escaped(word, True)))


def knows_tools(render: Callable[[Sequence[dict[str, Any]], Tools], str]) -> bool:
    """Whether a chat template writes which tools there are.

    Args:
        render: a conversation with tools to the text that the template makes of it.
    """
    tool = {"name": _ARGUMENT, "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        return _ARGUMENT in render([_QUESTION], ({"type": "function", "function": tool},))
    except DataError:  # it refuses this question; each row tells what it is refused for
        return True


class CallForm:
    """How one chat template takes calls: their arguments as an object or as text, beside empty content or none.

    Args:
        render: a conversation to the text that the template makes of it.
    """

    def __init__(self, render: Callable[[Sequence[dict[str, Any]]], str]) -> None:
        call = _call({"name": "probe", "id": "call00000", "arguments": {"key": _ARGUMENT}}, "")
        answer = {"role": "assistant", "content": "", CALLS: [call]}
        for self._as_text, self._nothing in _FORMS:
            try:
                if _ARGUMENT in render([_QUESTION, self.message(answer)]):
                    return
            except DataError:  # each row tells what it is refused for
                continue
        self._as_text, self._nothing = _FORMS[0]

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with calls as the template takes it."""
        calls = [
            call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
            if self._as_text
            else call
            for call in message[CALLS]
        ]
        return message | {"content": message["content"] or self._nothing, CALLS: calls}


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    name = _named(function, f"{where}: a call of a tool")
    arguments = function.get("arguments", function.get("parameters")) if isinstance(function, dict) else None
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {name}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise DataError(f"{where}: the arguments of {name} are no object", hint="they are a JSON object, or its text")
    _check(arguments, f"{where}: the arguments of {name}")
    known = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {"type": "function", **known, "function": {"name": name, "arguments": arguments or {}}}


def _named(function: Any, what: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{what} has no name", hint='a function is {"name", ...}')
    return name


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what}: is no JSON ({error})", hint="it is an object or a list, or the JSON text of one"
        ) from error


def _words(function: Mapping[str, Any]) -> Iterator[str]:
    yield str(function["name"])
    yield from _leaves(function["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _check(value: Any, what: str, depth: int = 0) -> None:
    """Refuse what no tokenizer and no template can take."""
    if depth > _DEEPEST:
        raise DataError(f"{what}: nested more than {_DEEPEST} times", hint="leave such conversations out")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{what}: half a character is no text", hint="JSON writes whole ones, or pairs of halves")
    if isinstance(value, dict | list):
        for inner in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check(inner, what, depth + 1)


def _escaped(word: str, ascii_only: bool) -> str:
    return json.dumps(word, ensure_ascii=ascii_only)[1:-1]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
