"""The final answer in a model's output, without reasoning and the marks that the chat template puts around it.

The marks are read from the template itself: between reasoning and answer, gpt-oss's puts
``<|channel|>final<|message|>``, others ``</think>``. Special tokens do not suffice to find them, since marks also
contain ordinary words.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptkit.data.ending import around_answer
from adaptkit.data.messages import REASONING, TAGS
from adaptkit.data.rendering import render
from adaptkit.data.tokenizer_files import tokens_in
from adaptkit.errors import DataError


@dataclass(frozen=True)
class Marks:
    """Marks around an answer's words.

    Attributes:
        opening: text between the prompt and an answer without reasoning; may be empty.
        end: text that ends reasoning; empty if the template has none.
        closing: added token right after the words, if there is one; it need not end the turn.
    """

    opening: str = ""
    end: str = ""
    closing: int | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        """Return the marks of a tokenizer's chat template."""
        if tokenizer.chat_template is None:
            return cls()
        default_end = TAGS[1] if any(mark in str(tokenizer.chat_template) for mark in TAGS) else ""
        words, reasoning = "quokka", "lemur"  # occur in no template
        answer = {"role": "assistant", "content": words, REASONING: reasoning}
        try:
            opening, after, *_ = around_answer(tokenizer)
            text = render([{"role": "user", "content": "question"}, answer], tokenizer)
        except DataError:  # it refuses a plain question and answer; each row's own error says why
            return cls(end=default_end)
        _, found, end = text.rpartition(words)[0].rpartition(reasoning)
        end = end if found and end.strip() not in ("", TAGS[1]) else default_end  # may be part of the content
        end = opening if opening.strip() and end.endswith(opening) else end
        closing = next(iter(tokens_in(after, tokenizer)), None)
        return cls(
            _as_decoded(opening, tokenizer).lstrip(),
            _as_decoded(end, tokenizer).strip(),
            closing if closing in tokenizer.added_tokens_decoder else None,
        )

    def answer_in(self, tokens: Sequence[int], tokenizer: Any) -> str:
        """Return the answer's text in a model's tokens, without special tokens; all text if reasoning has no end."""
        begun, rest, is_open = "", list(tokens), False
        if self.opening and str(tokenizer.decode(rest)).lstrip().startswith(self.opening):
            begun, rest, is_open = *_after(self.opening, rest, tokenizer), True
        text = str(tokenizer.decode(rest))
        end = self.end or (TAGS[1] if text.lstrip().startswith(TAGS[0]) else "")
        if end and not (is_open and end in self.opening) and end in text:  # else it is part of the answer
            begun, rest, is_open = *_after(end, rest, tokenizer), True
        if is_open and self.closing in rest:
            rest = rest[: rest.index(self.closing)]
        return (begun + str(tokenizer.decode(rest, skip_special_tokens=True))).strip()


def _after(mark: str, tokens: list[int], tokenizer: Any) -> tuple[str, list[int]]:
    """Return what follows a mark: the rest of the token that it ends in, and the tokens after that."""
    cut = bisect_left(range(len(tokens)), True, key=lambda count: mark in tokenizer.decode(tokens[:count]))
    return str(tokenizer.decode(tokens[:cut])).partition(mark)[2], tokens[cut:]


def _as_decoded(mark: str, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens_in(mark, tokenizer)))
