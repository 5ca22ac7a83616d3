"""How a chat template takes tools and tool calls, and what it leaves out, found out by rendering probes."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from adaptkit.data.chat_template import HINT
from adaptkit.data.messages import REASONING
from adaptkit.data.tool_calls import CALLS, Tools, as_json, leaves
from adaptkit.errors import DataError

_FORMS: tuple[tuple[bool, str | None], ...] = ((False, ""), (False, None), (True, ""), (True, None))
"""Forms of a call: (whether arguments are JSON text, the value of empty content); transformers 5.24 omits None."""


class ToolForm:
    """How one chat template takes tools and calls, and what it leaves out.

    Arguments are an object or JSON text, with empty content or None; the form that transformers documents, an object
    with empty content, is tried first.

    Args:
        render: returns the rendered text of a conversation with tools; "" if the template refuses it.
        prepare: converts a message for the template, except for its calls.
    """

    def __init__(
        self,
        render: Callable[[Sequence[dict[str, Any]], Tools], str],
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._render, self._prepare, self._lost = render, prepare, dict[str, bool]()

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in the form that the template takes."""
        return self._in_form(message, *self._form)

    def check(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> None:
        """Refuse a conversation if the template leaves out a kind of content that it has.

        Raises:
            DataError: names the kind.
        """
        found = _kinds(messages, tools)
        for kind in _PROBES:
            if kind in found and self._loses(kind):
                raise DataError(f"the chat template leaves out {kind}", hint=f"leave such conversations out, or {HINT}")

    @cached_property
    def _form(self) -> tuple[bool, str | None]:
        for form in _FORMS:
            text = self._render([_QUESTION, self._in_form(_answer(), *form)], ())
            if _WORD in text and f"'{_WORD}'" not in text:  # not a Python repr, whose template wants JSON text
                return form
        return _FORMS[0]

    def _in_form(self, message: dict[str, Any], as_text: bool, nothing: str | None) -> dict[str, Any]:
        message = self._prepare(message)
        if CALLS not in message:
            return message
        calls = message[CALLS]
        if as_text:
            functions = [call["function"] | {"arguments": as_json(call["function"]["arguments"])} for call in calls]
            calls = [call | {"function": function} for call, function in zip(calls, functions, strict=True)]
        return message | {"content": message["content"] or nothing, CALLS: calls}

    def _loses(self, kind: str) -> bool:
        if kind not in self._lost:
            messages, tools, words = _PROBES[kind]
            text = self._render([_QUESTION, *map(self.message, messages)], tools)
            written = all(any(form in text for form in word.split("|")) for word in words)
            self._lost[kind] = bool(text) and not written
        return self._lost[kind]


def _kinds(messages: Sequence[Mapping[str, Any]], tools: Tools) -> set[str]:
    """Return the kinds of content in a conversation that a template may leave out."""
    found = {_TOOLS} if tools else set()
    for message in messages:
        if message["role"] == "tool":
            found.add(_RESULTS)
        calls = message.get(CALLS, ())
        found |= {_SEVERAL} if len(calls) > 1 else set()
        found |= {_BESIDE} if calls and message["content"].strip() else set()
        found |= {_AFTER} if calls and message.get(REASONING) else set()
        found |= {_ALONE} if calls else set()
        found |= {_KINDS[type(leaf)] for call in calls for leaf in leaves(call["function"]["arguments"])} - {""}
    return found


def _answer(content: str = "", count: int = 1, **arguments: Any) -> dict[str, Any]:
    """Return an assistant's message with made-up calls, for probes."""
    calls = [
        {"type": "function", "id": f"call0000{number}", "function": {"name": f"probe{number}", "arguments": given}}
        for number, given in enumerate([{"key": _WORD, **arguments}, {"key": f"{_WORD}ed"}][:count])
    ]
    return {"role": "assistant", "content": content, CALLS: calls}


_WORD = "inkling"
_QUESTION = {"role": "user", "content": "question"}
_TOOL = {"name": "probe0", "description": "", "parameters": {"type": "object", "properties": {"key": {}}}}
OTHER_TOOLS: Tools = ({"type": "function", "function": _TOOL | {"name": "sundial"}},)
"""Tools that no probe calls."""
_TOOLS, _RESULTS, _ALONE = "the list of tools", "tool results", "tool calls"
_SEVERAL, _BESIDE, _AFTER = "tool calls after the first", "tool calls beside content", "tool calls after reasoning"
_NUMBERS, _TRUTHS, _NOTHING = (
    "tool arguments that are numbers",
    "tool arguments that are true or false",
    "tool arguments that are null",
)
_KINDS = {str: "", int: _NUMBERS, float: _NUMBERS, bool: _TRUTHS, type(None): _NOTHING}
_TOOL_RESULT = {"role": "tool", "content": "murmur", "name": "probe0", "tool_call_id": "call00000"}
_PROBES: dict[str, tuple[list[dict[str, Any]], Tools, tuple[str, ...]]] = {
    _TOOLS: ([], ({"type": "function", "function": _TOOL},), ("probe0",)),
    _ALONE: ([_answer()], (), ("probe0", _WORD)),
    _RESULTS: ([_answer(), _TOOL_RESULT], (), ("murmur",)),
    _SEVERAL: ([_answer(count=2)], (), ("probe0", "probe1", f"{_WORD}ed")),
    _BESIDE: ([_answer("murmur")], (), (_WORD, "murmur")),
    _AFTER: ([_answer() | {REASONING: "murmur"}], (), (_WORD,)),
    _NUMBERS: ([_answer(number=271828)], (), ("271828",)),
    _TRUTHS: ([_answer(flag=True)], (), ("true|True",)),
    _NOTHING: ([_answer(nothing=None)], (), ("null|None",)),
}
"""For each kind: messages after a question, tools, and words that must be in the text (``|`` separates variants).
What a template leaves out altogether comes before a part of it."""
