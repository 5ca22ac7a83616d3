"""Rows of jsonl files, the conversations in them, and the text that a model's chat template makes of one.

A row is one of
    {"instruction", "context" or "input" (optional), "output" or "response"}
    {"prompt", "completion"}
    {"messages": [{"role", "content"}, ...]}
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.errors import DataError

Message = dict[str, str]

_HALF = re.compile("[\ud800-\udfff]")


def read_text(file: Path) -> str:
    """Read a UTF-8 file, without the mark that Windows editors begin files with.

    Raises:
        DataError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})", hint="check the path") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: cannot be read ({error.reason})", hint="save it as UTF-8") from error


def rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a jsonl file.

    Yields:
        Where a row is (file and line), and the row.

    Raises:
        DataError: not a readable ``.jsonl`` file, or a line that is no JSON object.
    """
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: expected a .jsonl file", hint="one JSON object on each line")
    lines = read_text(file).split("\n")  # splitlines would cut at characters that JSON strings may hold as they are
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})", hint="one JSON object on each line") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: expected an object, found {type(row).__name__}", hint="one JSON object on each line"
            )
        yield where, row


def messages_of(row: Mapping[str, Any], where: str) -> list[Message]:
    """The conversation in a row.

    Raises:
        DataError: the row has none of the layouts.
    """
    if "messages" in row:
        messages = row["messages"]
        roles = {"system", "user", "assistant"}
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and is_text(m.get("role")) and m["role"] in roles and is_text(m.get("content"))
            for m in messages
        ):
            raise DataError(f"{where}: messages must be a list of {{role, content}}", hint=f"roles: {sorted(roles)}")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no message is the assistant's")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    question = _field(row, ("instruction", "prompt"), where)
    answer = _field(row, ("output", "response", "completion"), where)
    context = next((row[name] for name in ("context", "input") if row.get(name)), "")
    if not is_text(context):
        raise DataError(f"{where}: the context is no text", hint="context and input are strings, or left out")
    if context:
        question = f"{question}\n\n{context}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def render(messages: Sequence[Message], tokenizer: Any, opening: bool = False) -> str:
    """What the model reads of a conversation; without a template its messages follow each other on lines of their own.

    Args:
        messages: of the conversation.
        tokenizer: with a chat template or an end token.
        opening: add the opening of the assistant's next turn.

    Raises:
        DataError: the template refuses the conversation, or there is neither template nor end token.
    """
    if not messages:
        return ""
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a chat template nor an end token")
        ends = {"assistant": tokenizer.eos_token}
        return "".join(message["content"] + ends.get(message["role"], "\n") for message in messages)
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation ({error})") from error


def is_text(value: Any) -> bool:
    """Whether this is a string that tokenizers take: JSON's escapes can write half a character."""
    return isinstance(value, str) and _HALF.search(value) is None


def _field(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if is_text(row.get(name)):
            return str(row[name])
    raise DataError(f"{where}: has no {' or '.join(names)}", hint=f"found: {', '.join(map(str, row)) or 'nothing'}")
