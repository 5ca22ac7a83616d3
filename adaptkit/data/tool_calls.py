"""Tools and tool calls in rows, and their words in a rendered text.

    row        "tools": functions with their JSON schemas, as a list or its JSON text; or "functions", a list
    assistant  "tool_calls": [{"type": "function", "function": {"name", "arguments"}}, ...], with or without content;
               also just {"name", "arguments"}, or one call as "function_call"; arguments are an object or its JSON text
    tool       result of a call: its content, optionally with name and tool_call_id

The model learns the assistant's calls; tool results are input only, like questions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptkit.data.values import are_of_text, check_value, joined, parse
from adaptkit.errors import DataError

Tools = tuple[Mapping[str, Any], ...]
"""Tools of a row, each {"type": "function", "function": {"name", ...}}."""

CALLS = "tool_calls"
_RESULT_FIELDS = ("name", "tool_call_id")
"""Fields of a tool's message besides its content."""
_CALL_KEYS = {"name", "arguments", "parameters", "id", "type", "index"}


def read_tools(value: Any, where: str, column: str) -> Tools:
    """Return the tools of a row, normalized.

    Raises:
        DataError: the value is not a list of functions.
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
        check_value(tool, f"{where}: {column}")
    return tuple(found)


def read_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the calls in an assistant's message; empty if there are none.

    Raises:
        DataError: a call has no name, or its arguments are not an object.
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
    """Return the calls in a message that holds nothing else, as ShareGPT's ``function_call``, or their JSON text."""
    found = _parsed(value, where) if isinstance(value, str) else value
    calls = [_call(call, where) for call in (found if isinstance(found, list) else [found])]
    if not calls:
        raise DataError(f"{where}: contains no tool call", hint='write a call as {"name", "arguments"}')
    return calls


def read_result(message: Mapping[str, Any], where: str) -> tuple[Any, dict[str, str]]:
    """Return a tool's result as text, and its name and call id; text parts are joined, objects and lists become JSON.

    Raises:
        DataError: the message holds a value that is not JSON, or an unpaired surrogate.
    """
    content = message.get("content", message.get("value"))
    content = joined(content, where)[0] if are_of_text(content) else content
    others = {name: message[name] for name in _RESULT_FIELDS if isinstance(message.get(name), str)}
    check_value([content, others], where)
    return (as_json(content) if isinstance(content, dict | list) else content), others


def _call(given: Any, where: str) -> dict[str, Any]:
    function: Any = given.get("function", given) if isinstance(given, dict) else None
    name = _named(function, f"{where}: a tool call")
    given_as = next((key for key in ("arguments", "parameters") if function.get(key) is not None), None)
    arguments = function[given_as] if given_as else None
    others = [key for key, value in function.items() if key not in _CALL_KEYS and value is not None]
    if given_as is None and others:
        hint = f'rename {others[0]} to arguments, or add "arguments": {{}}'
        raise DataError(f"{where}: the call of {name} has {others[0]}, but no arguments", hint=hint)
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {name}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise DataError(f"{where}: the arguments of {name} are not an object", hint="write a JSON object, or its text")
    known = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    call = {"type": "function", **known, "function": {"name": name, "arguments": arguments or {}}}
    check_value(call, f"{where}: a call of {name!r}")
    return call


def _named(function: Any, what: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{what} has no name", hint='write a function as {"name", ...}')
    return name


def _parsed(text: str, what: str) -> Any:
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        hint = "write an object or a list, or the JSON text of one"
        raise DataError(f"{what}: not JSON ({error})", hint=hint) from error


def words_of(calls: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the names, keys and strings of calls."""
    for function in (call["function"] for call in calls):
        yield str(function["name"])
        yield from (leaf for leaf in leaves(function["arguments"]) if isinstance(leaf, str))


def words_of_tools(tools: Tools) -> Iterator[str]:
    """Yield the keys and strings of tools."""
    return (leaf for leaf in leaves([*tools]) if isinstance(leaf, str))


def first_missing_word(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """Return the first name, key or value of calls that is missing in a text; empty if all are there.

    Names must occur in their order, as many times as they are called.
    """
    at = 0
    for function in (call["function"] for call in calls):
        at = text.find(function["name"], at) + len(function["name"])
        if at < len(function["name"]):
            return str(function["name"])
        for leaf in leaves(function["arguments"]):
            forms = _forms(leaf) if isinstance(leaf, str) else (json.dumps(leaf), str(leaf))
            if not any(form in text for form in forms):
                return str(forms[0])
    return ""


def end_of_words(calls: Sequence[Mapping[str, Any]], text: str) -> int:
    """Return the end offset of the last name, key or string of calls in a text; 0 if there is none."""
    forms = [form for word in words_of(calls) for form in _forms(word)]
    return max((at + len(form) for form in forms if (at := text.rfind(form)) >= 0), default=0)


def is_written(word: str, text: str) -> bool:
    """Return whether a text contains a word, as it is or escaped for JSON."""
    return any(form in text for form in _forms(word))


def leaves(value: Any) -> Iterator[Any]:
    """Yield all keys, and all values that are neither objects nor lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def _forms(word: str) -> tuple[str, ...]:
    """Return the forms that a word may have in a text: as it is, or escaped for JSON (ASCII only, or not)."""
    bare = word.strip()
    return (bare, *(json.dumps(some, ensure_ascii=ascii)[1:-1] for some in (bare, word) for ascii in (False, True)))


def as_json(value: Any) -> str:
    """Return a value as JSON text, not escaped to ASCII."""
    return json.dumps(value, ensure_ascii=False)
