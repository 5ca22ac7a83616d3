"""What a model's chat template makes of a conversation, in a process of its own.

A template is a program that came with a model. The sandbox that transformers runs it in keeps it from files, but not
from looping for hours or from multiplying a string until no memory is left. Apart, it can be stopped.
"""

import contextlib
import json
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from adaptkit.child import can_fork, start_child
from adaptkit.errors import DataError
from adaptkit.text.chat_template import HINT, template_of
from adaptkit.text.thoughts import Message
from adaptkit.text.tool_calls import Tools


class Conversation(NamedTuple):
    """What a template is given.

    Attributes:
        messages: ``role`` and ``content`` of each, and what else the template knows of.
        opening: whether the opening of the assistant's next turn follows them.
        tools: that the assistant may call; see ``tool_calls``.
    """

    messages: Sequence[Message]
    opening: bool
    tools: Tools = ()


DAY = datetime(2024, 7, 26)
"""What templates are told that ask for the date; it is what Llama 3's say if nobody tells them.

With today's, samples would be others every day: a killed run could not go on after midnight.
"""

_DIRECTIVES = (*"aAbBcCdDefFgGhHIjklmMnpPrRStTuUVwWxXyYzZ", *(f"-{letter}" for letter in "deHIjmMSy"))

_SECONDS = 10
_IDLE_SECONDS = 10
_MEMORY = 1 << 28
_SIZE = Path("/proc/self/statm")
_LONGEST_MESSAGE = 1000
_LONGEST_FRAME, _LONGEST_GROWTH = 1 << 20, 8
"""Characters that a template may add to a conversation, and what it may multiply it by: JSON's escapes are 6 to 1."""
_PORTION = 1 << 20
"""Characters of conversations in one question."""
_TOO_MUCH, _NO_MEMORY = "takes too much memory", 12
"""What is said of a template, and the code that the process ends with where it can't say so itself."""


def apply_template(tokenizer: Any, conversations: Sequence[Conversation]) -> Iterator[str]:
    """Render conversations.

    The process is a fork that stays for the next conversations, and ends when none came for a while. There is none
    where a fork is not safe (other threads, other systems than Linux) or not allowed (a daemonic process): then the
    template is not bounded in time, nor in memory.

    Args:
        tokenizer: with a chat template.
        conversations: what it makes texts of.

    Returns:
        The text of each, as it is needed.

    Raises:
        DataError: the template refuses a conversation, takes more than 10 seconds of a processor or 256 MiB for it, or
            writes far more than is in it.
    """
    if not can_fork():
        for conversation in conversations:
            yield _render(tokenizer, conversation)
        return
    for some in _portions(conversations):
        for answer in _ask(tokenizer, some):
            if "error" in answer:
                raise DataError(answer["error"], answer["hint"])
            yield answer["text"]


def _length(conversation: Conversation) -> int:
    """Characters of what is said in a conversation."""
    said = [value for message in conversation.messages for key, value in message.items() if key != "role"]
    return sum(
        len(value) if isinstance(value, str) else len(json.dumps(value)) for value in (*said, *conversation.tools)
    )


def asks_for_the_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template does; it is told ``DAY``."""
    return "strftime_now" in str(tokenizer.chat_template)


def _of_a_day(template: str) -> str:
    """A chat template that is told ``DAY``: data that transformers hands to a template may not be functions.

    It begins a line, as it did without what is put before it: transformers trims the line break behind a block.
    """
    words = "".join(f"|replace('%{letter}','{DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    told = f"format|replace('%%','\\0'){words}|replace('\\0','%')"
    return f"{{% macro strftime_now(format) %}}{{{{ {told} }}}}{{% endmacro %}}\n{template}"


def _ask(tokenizer: Any, conversations: Sequence[Conversation]) -> list[dict[str, str]]:
    """The answers to a question, all of them: one that nobody took would be another question's."""
    try:
        answers = None
        while answers is None:
            answers = _process_of(tokenizer).ask(conversations)
    except BaseException:
        _end_process()
        raise
    return answers


def _portions(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """Divide conversations, so that a question is of a few megabytes, or of one conversation."""
    begin, size = 0, 0
    for number, conversation in enumerate(conversations):
        said = _length(conversation)
        if number > begin and size + said > _PORTION:
            yield conversations[begin:number]
            begin, size = number, 0
        size += said
    if begin < len(conversations):
        yield conversations[begin:]


class _Process:
    """Renders with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._template = tokenizer, tokenizer.chat_template
        self._asker = os.getpid()
        self._process, self._connection = start_child(_serve, tokenizer)

    def is_of(self, tokenizer: Any) -> bool:
        """Whether it renders with this tokenizer, and is there."""
        same = self._tokenizer is tokenizer and self._template == tokenizer.chat_template
        return same and self._asker == os.getpid() and self._process.is_alive()

    def ask(self, conversations: Sequence[Conversation]) -> list[dict[str, str]] | None:
        """A text for each conversation, or an error for the first that has none; None if the process had left."""
        answers: list[dict[str, str]] = []
        try:
            self._connection.send_bytes(_packed([list(conversation) for conversation in conversations]))
            for _ in conversations:
                answers.append(_unpacked(self._connection.recv_bytes()))
                if "error" in answers[-1]:
                    break
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            if code == 0 and not answers:
                return None
            known = {-signal.SIGPROF: f"takes longer than {_SECONDS} seconds", _NO_MEMORY: _TOO_MUCH}
            reason = known.get(code or 0, f"crashed (exit code {code})")
            answers.append({"error": f"the chat template {reason}", "hint": HINT})
        return answers

    def end(self) -> None:
        """Whatever it is doing; but one that a fork inherited is its parent's."""
        if self._asker == os.getpid():
            self._process.kill()
            self._process.join()
        self._connection.close()


_process: _Process | None = None


def _process_of(tokenizer: Any) -> _Process:
    global _process
    if _process is None or not _process.is_of(tokenizer):
        _end_process()
        _process = _Process(tokenizer)
    return _process


def _end_process() -> None:
    global _process
    if _process is not None:
        _process.end()
    _process = None


def _limit_memory() -> None:
    """Allow this process so much more than it has; where the system can be told so, as Linux can."""
    try:
        pages = int(_SIZE.read_text().split()[0])
    except FileNotFoundError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed if most < 0 else min(allowed, most), most))


def _serve(connection: Connection, tokenizer: Any) -> None:
    """In the process: one JSON document for each that is read."""
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(EOFError):  # whoever asks is gone
        while connection.poll(_IDLE_SECONDS):
            for answer in _answers(tokenizer, connection):
                connection.send_bytes(_packed(answer))
            signal.setitimer(signal.ITIMER_PROF, 0)


def _answers(tokenizer: Any, connection: Connection) -> Iterator[dict[str, str]]:
    try:
        for conversation in _unpacked(connection.recv_bytes()):
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of its own time: a machine may be busy, or stopped
            yield {"text": _render(tokenizer, Conversation(*conversation))}
    except DataError as error:
        yield {"error": error.message[:_LONGEST_MESSAGE], "hint": error.hint}
    except MemoryError:
        os._exit(_NO_MEMORY)  # part of the question may lie unread


def _packed(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _unpacked(content: bytes) -> Any:
    return json.loads(content.decode("utf-8", "surrogatepass"))


def _render(tokenizer: Any, conversation: Conversation) -> str:
    """A text that is not far longer than the conversation in it: somebody has to tokenize it."""
    from jinja2 import TemplateError

    try:
        tools = list(conversation.tools) or None
        template = _of_a_day(template_of(tokenizer, tools)) if asks_for_the_date(tokenizer) else None
        text = str(
            tokenizer.apply_chat_template(
                list(conversation.messages),
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=conversation.opening,
            )
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"the chat template refuses the conversation ({error})", hint=f"leave such conversations out, or {HINT}"
        ) from error
    except MemoryError as error:
        raise DataError(f"the chat template {_TOO_MUCH}", hint=HINT) from error
    said = _length(conversation)
    if len(text) > _LONGEST_FRAME + _LONGEST_GROWTH * said:
        raise DataError(f"the chat template turns {said:,} characters into {len(text):,}", hint=HINT)
    return text
