"""Rendering of conversations with a model's chat template, in separate processes.

A template is a program that comes with a model. The sandbox in which transformers runs it protects files, but does not
stop it from looping for hours or from multiplying a string until memory is exhausted. A separate process can be killed.
Many conversations are divided among several processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from ctypes import c_int64
from itertools import islice
from mmap import mmap
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adaptkit.child import can_fork, start_child
from adaptkit.errors import DataError
from adaptkit.machine import processor_count
from adaptkit.text.chat_template import HINT, require_jinja
from adaptkit.text.template_call import TOO_MUCH, Conversation, call_template, length_of

_SECONDS = 10
_IDLE_SECONDS = 10
_MEMORY = 1 << 28
_SIZE = Path("/proc/self/statm")
_LONGEST_MESSAGE = 1000
_REQUEST_CHARACTERS = 1 << 17
"""Characters of conversations in one request to a process: its answers then mostly fit into the connection's buffer, so
that it does not wait while those of another process are read."""
_MOST_PROCESSES = 8
"""Limit on processes: more would mostly wait for the caller, which tokenizes what they render."""
_NO_MEMORY = 12
"""Exit code of a process that runs out of memory before it can report an error."""


def apply_template(tokenizer: Any, conversations: Sequence[Conversation]) -> Iterator[str]:
    """Render conversations.

    The processes are forks that are kept for further calls and exit after some idle seconds. If forking is not safe
    (other threads, a system other than Linux) or not allowed (a daemonic process), the template runs in this process
    without limits on time and memory.

    Args:
        tokenizer: a tokenizer with a chat template.
        conversations: the conversations to render.

    Returns:
        An iterator over the texts, rendered lazily.

    Raises:
        DataError: the template refuses a conversation, takes more than 10 seconds of CPU time or 256 MiB of memory for
            it, or its output is far longer than the conversation.
        UsageError: jinja2 is not installed.
    """
    require_jinja()
    if not can_fork():
        for conversation in conversations:
            yield call_template(tokenizer, conversation)
        return
    requests = _requests(conversations)
    while some := list(islice(requests, min(_MOST_PROCESSES, processor_count()))):
        for answers in _render_in_processes(tokenizer, some):
            for answer in answers:
                if "error" in answer:
                    raise DataError(answer["error"], answer["hint"])
                yield answer["text"]


_Answer = dict[str, str]
"""The rendered text, or an error and its hint."""


def _render_in_processes(tokenizer: Any, requests: Sequence[Sequence[Conversation]]) -> list[list[_Answer]]:
    """Return the answers to requests that different processes render at the same time; each ends with its first error.

    All answers are read before any is returned: one left unread would be taken for an answer to the next request.
    """
    try:
        asked = [(_process_of(tokenizer, number), request) for number, request in enumerate(requests)]
        for process, request in asked:
            process.send(request)
        return [_answers_to(process, request, tokenizer) for process, request in asked]
    except BaseException:
        _end_processes()
        raise


def _answers_to(process: _Process, request: Sequence[Conversation], tokenizer: Any) -> list[_Answer]:
    """Return a process's answers to the request that it was sent."""
    answers = process.receive()
    if answers is not None:
        return answers
    failure, slow = process.failure(), process.slow()
    if failure and (len(request) == 1 or slow is not None):
        return [*(_render_in_processes(tokenizer, [request[:slow]])[0] if slow else ()), *failure]
    answers = []  # one of the conversations made it exit, or none did: ask for each alone
    for conversation in request:
        answers += _render_in_processes(tokenizer, [[conversation]])[0]
        if "error" in answers[-1]:
            break
    return answers


def _requests(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """Split conversations into requests of ``_REQUEST_CHARACTERS`` each, or of a single larger conversation."""
    begin, size = 0, 0
    for number, conversation in enumerate(conversations):
        said = length_of(conversation)
        if number > begin and size + said > _REQUEST_CHARACTERS:
            yield conversations[begin:number]
            begin, size = number, 0
        size += said
    if begin < len(conversations):
        yield conversations[begin:]


class _Process:
    """A child process that renders with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._template = tokenizer, tokenizer.chat_template
        self._owner = os.getpid()
        self._begun = c_int64.from_buffer(mmap(-1, 8))  # shared with the child
        self._process, self._connection = start_child(_serve, tokenizer, self._begun)

    @property
    def pid(self) -> int | None:
        """Its process ID."""
        return self._process.pid

    def is_of(self, tokenizer: Any) -> bool:
        """Return whether it is alive, was started by this process, and renders with this tokenizer and template."""
        same = self._tokenizer is tokenizer and self._template == tokenizer.chat_template
        return same and self._owner == os.getpid() and self._process.is_alive()

    def send(self, conversations: Sequence[Conversation]) -> None:
        """Send a request; ``receive`` must follow, and tells whether the process had exited."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(_packed([list(conversation) for conversation in conversations]))

    def receive(self) -> list[_Answer] | None:
        """Return an answer per conversation, up to the first error; None if the process has exited."""
        try:
            answers: list[_Answer] = _unpacked(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            return None
        return answers

    def failure(self) -> list[_Answer] | None:
        """Return the error of a conversation that made the process exit; None if it exited because it was idle."""
        code = self._process.exitcode
        if code == 0:
            return None
        known = {-signal.SIGPROF: f"takes longer than {_SECONDS} seconds", _NO_MEMORY: TOO_MUCH}
        reason = known.get(code or 0, f"crashed (exit code {code})")
        return [{"error": f"the chat template {reason}", "hint": HINT}]

    def slow(self) -> int | None:
        """Return the index of the conversation that took too long; None if the process exited for another reason."""
        return self._begun.value if self._process.exitcode == -signal.SIGPROF else None

    def end(self) -> None:
        """Kill the process and close the connection; a copy inherited through a fork only closes its connection."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.join()
        self._connection.close()


_processes: list[_Process] = []


def _process_of(tokenizer: Any, number: int) -> _Process:
    """Return the process of a number, started if there is none that can be used; lower numbers come first."""
    if number == len(_processes):
        _processes.append(_Process(tokenizer))
    elif not _processes[number].is_of(tokenizer):
        _processes[number].end()
        _processes[number] = _Process(tokenizer)
    return _processes[number]


def _end_processes() -> None:
    for process in _processes:
        process.end()
    _processes.clear()


def _limit_memory() -> None:
    """Limit this process's address space to ``_MEMORY`` bytes more than it has now; do nothing if not on Linux."""
    try:
        pages = int(_SIZE.read_text().split()[0])
    except FileNotFoundError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed if most < 0 else min(allowed, most), most))


def _serve(connection: Connection, tokenizer: Any, begun: c_int64) -> None:
    """Run in a child process: read requests, and answer each with one JSON document."""
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        while connection.poll(_IDLE_SECONDS):
            answers = list(_answers(tokenizer, _unpacked(connection.recv_bytes()), begun))
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(_packed(answers))
    except EOFError:  # the parent has exited
        pass
    except MemoryError:
        os._exit(_NO_MEMORY)  # a message may be half read or half sent: the connection is unusable


def _answers(tokenizer: Any, conversations: Sequence[Any], begun: c_int64) -> Iterator[_Answer]:
    try:
        for number, conversation in enumerate(conversations):
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # CPU time, since the machine may be busy or suspended
            begun.value = number
            yield {"text": call_template(tokenizer, Conversation(*conversation))}
    except DataError as error:
        yield {"error": error.message[:_LONGEST_MESSAGE], "hint": error.hint}


def _packed(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _unpacked(content: bytes) -> Any:
    return json.loads(content.decode("utf-8", "surrogatepass"))
