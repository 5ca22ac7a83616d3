"""Rendering of one conversation with a chat template, a program that comes with the model.

transformers runs it in jinja2's sandbox: it reaches no files and no attributes of Python's objects, and a ``range`` has
at most 100,000 items. Its time and memory are not limited, only the length of the text that it returns.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from adaptkit.data.chat_template import HINT, require_jinja, template_of
from adaptkit.data.reasoning import Message
from adaptkit.data.tool_calls import CALLS, Tools
from adaptkit.errors import DataError

DAY = datetime(2024, 7, 26)
"""The date given to templates that ask for it; Llama 3's templates have it as their default.

Today's date would change the samples every day, so a killed run could not resume after midnight.
"""

_DIRECTIVES = (*"aAbBcCdDefFgGhHIjklmMnpPrRStTuUVwWxXyYzZ", *(f"-{letter}" for letter in "deHIjmMSy"))

_MAX_ADDED_CHARACTERS, _MAX_GROWTH = 1 << 20, 8
"""Limit on a rendered text: this many characters plus this factor times the conversation; JSON escapes take up to 6."""
_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)
"""What a template can raise besides jinja2's own errors, being a program: ``{% break %}`` outside of a loop, say."""


class Conversation(NamedTuple):
    """Input of a template.

    Attributes:
        messages: ``role`` and ``content`` of each, and other fields that the template reads.
        opening: whether to append the opening of the assistant's next turn (``add_generation_prompt``).
        tools: tools that the assistant may call; see ``tool_calls``.
    """

    messages: Sequence[Message]
    opening: bool
    tools: Tools = ()

    @property
    def uses_tools(self) -> bool:
        """Whether it offers tools, calls one, or has the result of a call."""
        return bool(self.tools) or any(CALLS in message or message["role"] == "tool" for message in self.messages)


def call_template(tokenizer: Any, conversation: Conversation) -> str:
    """Render one conversation.

    Args:
        tokenizer: a tokenizer with a chat template.
        conversation: the conversation.

    Raises:
        DataError: the template refuses the conversation, or makes a text far longer than it, which would be tokenized.
        UsageError: jinja2 is not installed.
    """
    require_jinja()
    from jinja2 import TemplateError

    try:
        tools = list(conversation.tools) or None
        template = _with_fixed_date(template_of(tokenizer, tools)) if asks_for_the_date(tokenizer) else None
        text = str(
            tokenizer.apply_chat_template(
                list(conversation.messages),
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=conversation.opening,
            )
        )
    except (TemplateError, *_ERRORS) as error:
        raise DataError(
            f"the chat template refuses the conversation ({error})", hint=f"leave such conversations out, or {HINT}"
        ) from error
    except MemoryError as error:
        raise DataError("the chat template takes too much memory", hint=HINT) from error
    said = length_of(conversation)
    if len(text) > _MAX_ADDED_CHARACTERS + _MAX_GROWTH * said:
        raise DataError(f"the chat template turns {said:,} characters into {len(text):,}", hint=HINT)
    return text


def length_of(conversation: Conversation) -> int:
    """Return the number of characters in a conversation's messages, without roles, and tools."""
    said = [value for message in conversation.messages for key, value in message.items() if key != "role"]
    return sum(
        len(value) if isinstance(value, str) else len(json.dumps(value)) for value in (*said, *conversation.tools)
    )


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
