"""Rendering of conversations for a model, in the form that its chat template takes."""

from collections.abc import Iterator, Sequence
from typing import Any

from adaptkit.data.chat_template import ADD_ONE
from adaptkit.data.reasoning import FIELD, Message, ReasoningFields, content_with_reasoning
from adaptkit.data.template_call import Conversation, call_template
from adaptkit.data.tool_calls import OTHER_TOOLS, ToolForm, Tools
from adaptkit.errors import DataError


def render(conversations: Sequence[Conversation], tokenizer: Any) -> Iterator[str]:
    """Render conversations; without a chat template, messages are joined by line breaks and answers end with EOS.

    Args:
        conversations: the conversations to render.
        tokenizer: a tokenizer with a chat template or an end token.

    Yields:
        The text of each conversation, in order.

    Raises:
        DataError: the template refuses a conversation or leaves a part of it out, or there is neither a template nor an
            end token.
    """
    if tokenizer.chat_template is not None:
        for conversation in conversations:
            given = _forms_of(tokenizer, conversation.tools).given(conversation)
            yield call_template(tokenizer, given) if given.messages else ""
        return
    for conversation in conversations:
        messages = conversation.messages
        if conversation.uses_tools:
            raise DataError("the model has no chat template, which tools need", hint=f"leave tools out, or {ADD_ONE}")
        if messages and tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a chat template nor an end token", hint=ADD_ONE)
        ends = {"assistant": tokenizer.eos_token}
        said = (
            (content_with_reasoning(turn) if FIELD in turn else turn["content"]) + ends.get(turn["role"], "\n")
            for turn in messages
        )
        yield "".join(said)


class _Forms:
    """How a tokenizer's template takes messages; found out once by probes, for tools only when a conversation has them.

    Args:
        tokenizer: a tokenizer with a chat template.
        among: tools given with every probe; some tokenizers have a separate template for conversations with tools.
    """

    def __init__(self, tokenizer: Any, among: Tools) -> None:
        def written(messages: Sequence[Message], tools: Tools = ()) -> str:
            try:
                return call_template(tokenizer, Conversation(messages, False, tools or among))
            except DataError:  # the template refuses the probe; each row reports its own errors
                return ""

        self._written, self._reasoning = written, ReasoningFields(written)
        self._tools: ToolForm | None = None

    def given(self, conversation: Conversation) -> Conversation:
        """Return a conversation as the template takes it.

        Raises:
            DataError: the template would leave something out.
        """
        messages, _, tools = conversation
        if conversation.uses_tools:
            self._tools = self._tools or ToolForm(self._written, self._reasoning.message)
            self._tools.check(messages, tools)
            return conversation._replace(messages=[self._tools.message(message) for message in messages])
        return conversation._replace(messages=[self._reasoning.message(message) for message in messages])


def _forms_of(tokenizer: Any, tools: Tools) -> _Forms:
    template = str(tokenizer.chat_template)
    if template not in _known_forms:
        _known_forms.clear()
        _known_forms[template] = {False: _Forms(tokenizer, ())}
        if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            _known_forms[template][True] = _Forms(tokenizer, OTHER_TOOLS)
    known = _known_forms[template]
    return known.get(bool(tools), known[False])


_known_forms: dict[str, dict[bool, _Forms]] = {}
