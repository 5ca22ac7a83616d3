"""Rendering of a conversation as the text that a model reads, with its chat template, a program that comes with it.

transformers runs it in jinja2's sandbox: it reaches no files and no attributes of Python's objects, and a ``range`` has
at most 100,000 items. Its time and memory are not limited, only the length of the text that it returns.

Data have reasoning in the content, as ``<think>...</think>`` before the answer, or in a separate field. Templates read
it from the content, from a field, or from both; some write other tags around it, and some do not support it. Where a
template reads it, and in which form it takes tool calls, is found out by rendering probes.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from adaptkit.data.chat_template import ADD_ONE, HINT, template_of
from adaptkit.data.messages import REASONING, REASONING_FIELDS, Message, content_with_reasoning, split_reasoning
from adaptkit.data.tool_calls import CALLS, Tools, as_json
from adaptkit.errors import DataError

DAY = datetime(2024, 7, 26)
"""The date given to templates that ask for it; Llama 3's templates have it as their default.

Today's date would change the samples every day, so a killed run could not resume after midnight.
"""
_DIRECTIVES = (*"aAbBcCdDefFgGhHIjklmMnpPrRStTuUVwWxXyYzZ", *(f"-{letter}" for letter in "deHIjmMSy"))
_MAX_ADDED_CHARACTERS, _MAX_GROWTH = 1 << 20, 8
"""Limit on a rendered text: this many characters plus this factor times the conversation; JSON escapes take up to 6."""
_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What a template can raise besides jinja2's own errors, being a program: ``{% break %}`` outside of a loop, say."""
_QUESTION = {"role": "user", "content": "question"}
_WORD, _ANSWER = "inkling", "answer"
_TOOLS: Tools = (
    {
        "type": "function",
        "function": {"name": "sundial", "description": "", "parameters": {"type": "object", "properties": {"key": {}}}},
    },
)
_FORMS_OF_CALLS: tuple[tuple[bool, str | None], ...] = ((False, ""), (False, None), (True, ""), (True, None))
"""Those that transformers documents come first; transformers 5.24 omits content that is None."""


def render(messages: Sequence[Message], tokenizer: Any, tools: Tools = (), *, opening: bool = False) -> str:
    """Render a conversation; without a chat template, messages are joined by line breaks and answers end with EOS.

    Args:
        messages: the messages; without any, the text is empty.
        tokenizer: a tokenizer with a chat template or an end token.
        tools: tools that the assistant may call.
        opening: whether to append the opening of the assistant's next turn (``add_generation_prompt``).

    Raises:
        DataError: the template refuses the conversation or leaves a part of it out, or there is neither a template nor
            an end token.
    """
    if not messages:
        return ""
    uses_tools = bool(tools) or any(CALLS in message or message["role"] == "tool" for message in messages)
    if tokenizer.chat_template is None:
        return _joined(messages, tokenizer, uses_tools)
    has_another = isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template
    form = _form(tokenizer, str(tokenizer.chat_template), bool(tools) and has_another)
    if tools and form.loses_tools:
        raise _left_out("the list of tools")
    return call_template(tokenizer, [form.message(message) for message in messages], tools, opening)


def _left_out(what: str) -> DataError:
    return DataError(f"the chat template leaves out {what}", hint=f"leave such conversations out, or {HINT}")


def _joined(messages: Sequence[Message], tokenizer: Any, uses_tools: bool) -> str:
    if uses_tools:
        raise DataError("the model has no chat template, which tools need", hint=f"leave tools out, or {ADD_ONE}")
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has neither a chat template nor an end token", hint=ADD_ONE)
    return "".join(
        (content_with_reasoning(message) if REASONING in message else message["content"])
        + (tokenizer.eos_token if message["role"] == "assistant" else "\n")
        for message in messages
    )


def call_template(tokenizer: Any, messages: Sequence[Message], tools: Tools = (), opening: bool = False) -> str:
    """Render a conversation as its template takes it; see ``render``.

    Raises:
        DataError: the template refuses the conversation, or makes a text far longer than it, which would be tokenized.
    """
    from jinja2 import TemplateError

    given = list(tools) or None
    try:
        template = _with_fixed_date(template_of(tokenizer, given)) if asks_for_the_date(tokenizer) else None
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tools=given, chat_template=template, tokenize=False, add_generation_prompt=opening
            )
        )
    except (TemplateError, *_ERRORS) as error:
        reason = str(error) or type(error).__name__
        hint = f"leave such conversations out, or {HINT}"
        raise DataError(f"the chat template refuses the conversation ({reason})", hint=hint) from error
    said = sum(len(str(value)) for message in messages for value in message.values()) + len(str(tools))
    if len(text) > _MAX_ADDED_CHARACTERS + _MAX_GROWTH * said:
        raise DataError(f"the chat template turns {said:,} characters into {len(text):,}", hint=HINT)
    return text


def asks_for_the_date(tokenizer: Any) -> bool:
    """Return whether a tokenizer's chat template asks for the date; it is given ``DAY``."""
    return "strftime_now" in str(tokenizer.chat_template)


def _with_fixed_date(template: str) -> str:
    """Return a chat template with ``strftime_now`` defined as a macro that formats ``DAY``.

    It is a macro because callers cannot pass functions through transformers. The template still begins on a line of its
    own; transformers trims the line break after a block.
    """
    words = "".join(f"|replace('%{letter}','{DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    formatted = f"format|replace('%%','\\0'){words}|replace('\\0','%')"
    return f"{{% macro strftime_now(format) %}}{{{{ {formatted} }}}}{{% endmacro %}}\n{template}"


@lru_cache(maxsize=4)
def _form(tokenizer: Any, template: str, for_tools: bool) -> "MessageForm":
    """Return how a template takes messages.

    Args:
        tokenizer: a tokenizer with a chat template.
        template: its text, since a tokenizer's may be set.
        for_tools: whether every probe has tools: some tokenizers have a separate template for conversations with them.
    """

    def written(messages: Sequence[Message], tools: Tools = _TOOLS if for_tools else ()) -> str:
        try:
            return call_template(tokenizer, messages, tools)
        except DataError:  # the template refuses the probe; each row reports its own errors
            return ""

    return MessageForm(written)


class MessageForm:
    """Where one chat template reads reasoning, and in which form it takes tool calls.

    Args:
        render: returns the rendered text of a conversation, also with tools; "" if the template refuses it.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        def written(**answer: Any) -> str:
            return render([_QUESTION, {"role": "assistant", "content": _ANSWER, **answer}])

        names = REASONING_FIELDS if written() else ()
        self._render, self._written = render, written
        self._names = tuple(name for name in names if _WORD in written(**{name: _WORD}))
        self._knows_content = True
        if self._names:
            apart = written(**dict.fromkeys(self._names, _WORD))
            inline = written(content=content_with_reasoning({REASONING: _WORD, "content": _ANSWER}))
            self._knows_content = "".join(apart.split()) == "".join(inline.split())

    def message(self, message: Message) -> Message:
        """Return a message as the template takes it.

        Raises:
            DataError: it has tool calls, which the template leaves out.
        """
        if message["role"] != "assistant":
            return message
        message = self._with_reasoning(message)
        if CALLS not in message:
            return message
        if self._form_of_calls is None:
            raise _left_out("tool calls")
        return self._with_calls(message, *self._form_of_calls)

    @cached_property
    def loses_tools(self) -> bool:
        """Whether the template leaves out the list of tools."""
        text = self._render([_QUESTION], _TOOLS)
        return bool(text) and "sundial" not in text

    def _with_reasoning(self, message: Message) -> Message:
        if REASONING in message:
            reasoning, content = message[REASONING], message["content"]
        elif self._names and not self._knows_content and (inline := split_reasoning(message["content"])):
            reasoning, content = inline
        else:
            return message
        others = {name: value for name, value in message.items() if name not in (REASONING, "content")}
        if not self._names:
            return others | {"content": content_with_reasoning(message)}
        return others | {"content": content.strip(), **dict.fromkeys(self._names, reasoning.strip())}

    def _with_calls(self, message: Message, as_text: bool, nothing: str | None) -> Message:
        calls = message[CALLS]
        if as_text:
            functions = [call["function"] | {"arguments": as_json(call["function"]["arguments"])} for call in calls]
            calls = [call | {"function": function} for call, function in zip(calls, functions, strict=True)]
        return message | {"content": message["content"] or nothing, CALLS: calls}

    @cached_property
    def _form_of_calls(self) -> tuple[bool, str | None] | None:
        """Whether arguments are JSON text, and the value of empty content; None if the template leaves out calls."""
        function = {"name": "probe0", "arguments": {"key": _WORD}}
        message = {"content": "", CALLS: [{"type": "function", "id": "call00000", "function": function}]}
        texts = {form: self._written(**self._with_calls(message, *form)) for form in _FORMS_OF_CALLS}
        # a Python repr shows that the template wants JSON text
        taken = [form for form, text in texts.items() if _WORD in text and f"'{_WORD}'" not in text]
        first = texts[_FORMS_OF_CALLS[0]]
        return next(iter(taken), None if first and _WORD not in first else _FORMS_OF_CALLS[0])
