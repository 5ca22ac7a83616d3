"""Which token ends a turn, and whether the checkpoint's generation configuration names it.

Templates end a turn with a token of their own, such as ``<|im_end|>``. If ``generation_config.json`` does not name it,
as in many base models, transformers and tools based on it would not stop after an answer. If a template ends a question
only once it is answered, they would stop before it.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import CONFIG_NAME, GENERATION_NAME, read_config, text_config
from adaptkit.data.answers import AnswerSpan, Ending, closes_a_turn, ended_late, lines, shared
from adaptkit.data.messages import Message, content_with_reasoning
from adaptkit.data.rendering import render
from adaptkit.data.tokenizer_files import tokens_in
from adaptkit.data.tool_calls import CALLS, Tools, end_of_words
from adaptkit.errors import DataError

_OF_THE_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that transformers takes from ``config.json`` if there is no ``generation_config.json``."""


class Turns:
    """How a chat template ends turns; found out once for conversations with and without tools."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ends = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
        self._tokens_in = lru_cache(1 << 10)(partial(tokens_in, tokenizer=tokenizer))
        self._known = dict[bool, tuple[str, str | None, int]]()

    def ending(self, message: Message, text: str, tools: Tools) -> Ending:
        """Return where an answer ends in a text of which it is the last message."""
        _, after, rest = self._around(tools)
        if after is not None and text.endswith(after):
            return Ending(len(text) - len(after), 0, rest)
        if CALLS in message:  # some templates end a call unlike an answer
            said = text.removesuffix((after or "")[rest:])
            kept = len(said.rstrip())
            return Ending(kept, kept - end_of_words(message[CALLS], said), len(said) - kept)
        last = lines(content_with_reasoning(message))[-1]
        at = text.rfind(last)
        said_to = len(text) if at < 0 else at + len(last)
        return Ending(said_to, 0, len(text) - said_to)

    def check_opening(self, message: Message, tools: Tools, before: str, text: str, answer: AnswerSpan | None) -> None:
        """Refuse an answer that begins with the end of its question: at inference, the model would end its turn there.

        Args:
            message: the answer.
            tools: tools of the conversation.
            before: the prompt.
            text: text with the answer.
            answer: its place; None if it is not known.

        Raises:
            DataError: shows where the prompt ends, and how the answer begins.
        """
        opening = ""
        if CALLS in message:  # some templates, such as GigaChat's, call tools in a turn of their own
            opening = self._around(tools)[0]
        elif answer is not None and (content := content_with_reasoning(message)):
            said = text[answer.start : answer.said]
            opening = said[: max(0, said.find(lines(content)[0]))]
        if opening.strip() and (closes_a_turn(opening) or self._ends_a_turn(opening, tools)):
            raise ended_late(before, opening)

    def has_end(self, text: str) -> bool:
        """Return whether a text contains a token that may end a turn: an added one, or the tokenizer's end token."""
        return not self._ends.isdisjoint(self._tokens_in(text))

    def _ends_a_turn(self, opening: str, tools: Tools) -> bool:
        """Return whether a text contains the token that ends a turn, or the tokenizer's end token."""
        _, after, rest = self._around(tools)
        ends = {self._tokenizer.eos_token_id, *self._tokens_in((after or "")[:rest])[-1:]} & self._ends
        return not ends.isdisjoint(self._tokens_in(opening))

    def _around(self, tools: Tools) -> tuple[str, str | None, int]:
        """Return the texts that the template puts before and after a final answer's words, and the end of its turn.

        That is: the text between prompt and words; the text after them, None if unknown; and how many characters of
        that belong to the turn, since some templates end the whole text with a further token. Some templates write
        another text if there are any tools.
        """
        if bool(tools) not in self._known:
            self._known[bool(tools)] = self._found(tools)
        return self._known[bool(tools)]

    def _found(self, tools: Tools) -> tuple[str, str | None, int]:
        try:
            lead, text, always, opens = around_answer(self._tokenizer, tools)
        except DataError:  # it refuses a plain question and answer; each row's own error says why
            return "", None, 0
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
        ends = [(end, token) for token, (_, end) in pairs if token in self._ends]
        of_turns = [end for end, _ in ends if end <= len(always)]
        stops = [end for end, token in ends if end <= len(always) and token == self._tokenizer.eos_token_id]
        # some templates also write the first token of the next turn
        found = stops[:1] or of_turns[slice(1) if opens else slice(-1, None)] or [end for end, _ in ends[:1]]
        return lead, text, found[0] if found else len(text)


def around_answer(tokenizer: Any, tools: Tools = ()) -> tuple[str, str, str, bool]:
    """Return what the chat template puts around an answer's words.

    That is: the text between prompt and words; the text after a final answer; the part of it that follows every answer;
    and whether the template opens the next answer without being asked to, as Llama 3's first did.

    Raises:
        DataError: the template refuses a question and its answer.
    """
    word = "quokka"  # occurs in no template
    question = {"role": "user", "content": "question"}
    messages = [question, {"role": "assistant", "content": word}]
    asked = render([question], tokenizer, tools, opening=True)
    told, text, longer = (render(some, tokenizer, tools) for some in ([question], messages, [*messages, question]))
    before, found, after = text.rpartition(word)
    if not found:
        return "", "", "", False
    within = before[len(asked) :] if before.startswith(asked) else ""
    begun = len(before) + len(word)
    always = after[: shared(after, longer[begun:])] if longer.startswith(text[:begun]) else after
    return within, after, always, asked == told


def turn_end(tokenizer: Any) -> int | None:
    """Return the first special token that the chat template puts after an answer but not before it; None if none.

    Kimi K3 closes reasoning, answers and messages with one token, and the turn with another.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        within, after, *_ = around_answer(tokenizer)
    except DataError:  # it refuses a plain question and answer; each row's own error says why
        return None
    ends = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    begun, ended = (tokens_in(part, tokenizer) for part in (within, after))
    return next((token for token in ended if token in ends and token not in begun), None)


def ends_after_answers(tokenizer: Any) -> tuple[str, ...]:
    """Return the end tokens, as text, that an answer in the data would duplicate, since the template adds one."""
    is_put = tokenizer.chat_template is None or turn_end(tokenizer) is not None
    return _ends(tokenizer) if is_put else ()


def without_ends(answers: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Strip end tokens from answers in the data, as from generated ones, and remove duplicates."""
    ends, kept = _ends(tokenizer), dict[str, None]()
    for answer in answers:
        end = next((end for end in ends if answer.rstrip().endswith(end)), "")
        kept[answer.rstrip().removesuffix(end) if end else answer] = None
    return tuple(kept)


def _ends(tokenizer: Any) -> tuple[str, ...]:
    ends = {token for token in (turn_end(tokenizer), tokenizer.eos_token_id) if token is not None}
    return tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends))


def named_ends(root: Path) -> list[int]:
    """Return the end tokens that a checkpoint's generation configuration names."""
    named = _generation(root).get("eos_token_id")
    return [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]


def unnamed_end(root: Path, tokenizer: Any) -> int | None:
    """Return the token that ends an answer; None if the checkpoint names it.

    Args:
        root: folder of the checkpoint.
        tokenizer: tokenizer with the chat template; if that puts no token after an answer, its end token counts.
    """
    end = turn_end(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    return end if isinstance(end, int) and end not in named_ends(root) else None


def generation_naming(root: Path, end: int) -> bytes:
    """Return a checkpoint's ``generation_config.json`` with one more end token."""
    config = _generation(root) | {"eos_token_id": [*named_ends(root), end]}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(root: Path) -> dict[str, Any]:
    if (root / GENERATION_NAME).is_file():
        return read_config(root / GENERATION_NAME)
    config = read_config(root / CONFIG_NAME)
    known = {**text_config(config), **config}
    return {name: known[name] for name in _OF_THE_MODEL if known.get(name) is not None}
