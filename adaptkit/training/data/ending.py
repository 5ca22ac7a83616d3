"""Which token ends an answer, and whether the checkpoint's generation configuration names it.

Templates end a turn with a token of their own, such as ``<|im_end|>``. If ``generation_config.json`` does not name it,
as in many base models, transformers and tools based on it would not stop after an answer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import CONFIG_NAME, GENERATION_NAME, read_config, text_config
from adaptkit.errors import DataError
from adaptkit.training.data.encoding import around_answer

_OF_THE_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that transformers takes from ``config.json`` if there is no ``generation_config.json``."""


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
    begun, ended = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (within, after))
    return next((int(token) for token in ended if token in ends and token not in begun), None)


def ends_after_answers(tokenizer: Any) -> tuple[str, ...]:
    """Return the end tokens, as text, that an answer in the data would duplicate, since the template adds one."""
    is_put = tokenizer.chat_template is None or turn_end(tokenizer) is not None
    return _ends(tokenizer) if is_put else ()


def without_ends(answers: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Strip end tokens from answers in the data, as from generated ones, and remove duplicates."""
    ends = _ends(tokenizer)
    found = [next((end for end in ends if answer.rstrip().endswith(end)), "") for answer in answers]
    pairs = zip(answers, found, strict=True)
    return tuple(dict.fromkeys(answer.rstrip().removesuffix(end) if end else answer for answer, end in pairs))


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
