"""Text as windows of tokens, for what measures a model on text: calibration, perplexity, divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.layout import CONFIG_NAME, read_config, require_folder, text_config
from adaptkit.checkpoint.progress import counted
from adaptkit.errors import DataError, UsageError
from adaptkit.lazy import torch
from adaptkit.text.chat_template import known_template_kwargs, set_template_kwargs
from adaptkit.text.conversation import Conversation, read_example, render
from adaptkit.text.rows import holds_rows, read_pieces, read_rows, read_text
from adaptkit.text.tokenizer_files import first_tokens, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""The names that configurations have for the longest sequence."""
_BYTES_PER_TOKEN, _LEAST_BYTES = 16, 4096
_BEHIND = 16
"""Tokens behind those that are wanted which have to be the same, too, in a longer beginning of a text."""


def read_tokens(
    files: Sequence[Path],
    root: Path,
    *,
    window: int,
    max_tokens: int | None = None,
    template_kwargs: Mapping[str, str | float | bool] | None = None,
) -> Tensor:
    """Tokenize text files with a checkpoint's tokenizer and cut them into windows.

    The rows of a file of ``text.rows`` hold ``text``, or a conversation in a layout of ``text.conversation``, which
    goes through the chat template; every other file is one text. The texts follow each other, an end token between
    them.
    If the tokenizer begins texts with a token, every window begins with it, as whatever the model was trained on did.

    Args:
        files: one after the other.
        root: folder of the checkpoint.
        window: tokens in a window; at least 2.
        max_tokens: make no more windows than this many tokens fill, one at least. Files are read little further than
            these need; a row is read whole.
        template_kwargs: variables of chat templates; those that this one asks for count.

    Returns:
        (windows, window) int64. What is left over at the end and fills no window is dropped, unless it is all there
        is: then there is one window, shorter.

    Raises:
        DataError: a file that cannot be read or is no text, a row that is no JSON or lacks its fields (with file and
            line), or nothing to read.
        UsageError: the window is longer than the model allows, or there is no tokenizer.
    """
    for name, given in (("window", window), ("max_tokens", max_tokens)):
        if given is not None and given < 2:
            raise UsageError(f"{name}: must be at least 2, found {given}")
    check_window(root, window)
    if max_tokens is not None:
        window = min(window, max_tokens)
    wanted = None if max_tokens is None else max_tokens // window
    tokenizer = load_tokenizer(root)
    set_template_kwargs(tokenizer, known_template_kwargs(tokenizer, template_kwargs or {}))
    stream: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ended = True
    limit = None if wanted is None else wanted * window
    for ids, ends_itself in _texts(files, tokenizer, limit):
        if ids:
            stream += ids if ended else [*end, *ids]
            ended = ends_itself or ids[-1:] == end  # some tokenizers end every text
        if limit is not None and len(stream) >= limit:
            break
    windows = _cut(stream, window, first_tokens(tokenizer)[:1])
    if not windows or len(windows[0]) < 2:
        raise DataError(
            f"{', '.join(map(str, files)) or 'no files'}: no text to read", hint="give files that contain text"
        )
    return torch.tensor(windows[:wanted])


def check_window(root: Path, window: int) -> None:
    """Refuse windows that a checkpoint's model cannot read.

    Raises:
        UsageError: they are longer than it allows, or there is no such folder.
    """
    longest = longest_sequence(require_folder(root))
    if longest is not None and window > longest:
        raise UsageError(
            f"{root}: windows of {window} tokens are longer than the model's context of {longest}",
            hint=f"use --window {longest}",
        )


def check_prompt(root: Path, prompt: str, length: int, new_tokens: int) -> None:
    """Refuse a prompt after which a checkpoint's model has no room for an answer.

    Args:
        root: the checkpoint.
        prompt: as it was given.
        length: of it, in tokens.
        new_tokens: of the answer.

    Raises:
        UsageError: both together are longer than the model allows.
    """
    longest = longest_sequence(root)
    if longest is not None and length + new_tokens > longest:
        raise UsageError(
            f"{root}: the prompt {prompt[:40]!r} and {counted(new_tokens, 'new token')} are longer than the model's "
            f"context of {longest}",
            hint="shorten the prompt, or ask for fewer new tokens",
        )


def longest_sequence(root: Path) -> int | None:
    """The most tokens that a checkpoint's model reads at once, or None if its configuration does not say."""
    config = read_config(root / CONFIG_NAME)
    for values in (config, text_config(config)):
        for name in _LENGTHS:
            if isinstance(values.get(name), int) and values[name] > 0:
                return int(values[name])
    return None


def known_tokens(root: Path) -> int | None:
    """How many tokens a checkpoint's model knows, or None if its configuration does not say."""
    config = read_config(root / CONFIG_NAME)
    for values in (text_config(config), config):
        if isinstance(values.get("vocab_size"), int) and values["vocab_size"] > 0:
            return int(values["vocab_size"])
    return None


def pad_id(tokenizer: Any, base: Path) -> int:
    """The token to pad with; masks tell what is padding, so any does where there is none, or the model has no row."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    known = known_tokens(base)
    return 0 if pad is None or (known is not None and pad >= known) else int(pad)


def check_known(ids: Sequence[int], known: int | None, where: str) -> None:
    """Refuse tokens that a model does not know.

    Args:
        ids: of tokens.
        known: see ``known_tokens``; None is no limit.
        where: they came from.

    Raises:
        UsageError: the tokenizer has more tokens than the model's embedding has rows.
    """
    if known is not None and max(ids, default=0) >= known:
        raise UsageError(
            f"{where}: the tokenizer produces token {max(ids)}, but the model's vocabulary has {known}",
            hint="use the tokenizer that the model was trained with, or enlarge the model's embedding",
        )


def _texts(files: Sequence[Path], tokenizer: Any, limit: int | None) -> Iterator[tuple[list[int], bool]]:
    """The tokens of every text, of a long one so many at least, and whether it ends with an end token of its own."""
    for file in files:
        if holds_rows(file):
            for where, row in read_rows(file):
                yield _row_tokens(row, where, tokenizer)
        elif limit is None:
            yield _tokens(tokenizer, read_text(file), True), False
        else:
            yield _beginning_of(tokenizer, file, limit), False


def _beginning_of(tokenizer: Any, file: Path, limit: int) -> list[int]:
    """The first tokens of a long text, all of a short one, as if it were tokenized whole.

    A text's beginning has other tokens than the text has where it was cut, and before that only as far back as tokens
    hang together, which is rarely further than a word. So it is cut before white space, and its tokens count if those
    of a longer beginning are the same, and some behind them.
    """
    text, compared = "", limit + _BEHIND
    known: list[int] = []
    for piece, is_whole in read_pieces(file, max(_LEAST_BYTES, _BYTES_PER_TOKEN * limit)):
        text += piece
        beginning = text if is_whole else "".join(text.rsplit(None, 1)[:-1])
        ids = _tokens(tokenizer, beginning, True)
        if is_whole or (len(known) >= compared and ids[:compared] == known[:compared]):
            return ids
        known = ids
    return known


def _row_tokens(row: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[list[int], bool]:
    layout = "text" if row.get("text") is not None and row.get("messages") is None else None
    example = read_example(row, where, layout)
    if example.text is not None:
        return _tokens(tokenizer, example.text, True), False
    try:
        (rendered,) = render([Conversation(example.messages, False, example.tools)], tokenizer)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error
    return _tokens(tokenizer, rendered, tokenizer.chat_template is None), True


def _tokens(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: transformers would warn of texts longer than the model, which are about to be cut
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if text.strip() else []
    return [int(token) for token in ids]


def _cut(stream: Sequence[int], window: int, begin: list[int]) -> list[list[int]]:
    windows: list[list[int]] = []
    position = 0
    while position < len(stream):
        lead = [] if stream[position] in begin else begin
        piece = [*lead, *stream[position : position + window - len(lead)]]
        position += window - len(lead)
        if len(piece) == window or not windows:
            windows.append(piece)
    return windows
