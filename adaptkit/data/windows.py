"""Text as fixed-length windows of tokens, for calibration, perplexity and divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.data.chat_template import known_template_kwargs, set_template_kwargs
from adaptkit.data.conversation import read_example
from adaptkit.data.limits import check_window
from adaptkit.data.rendering import render
from adaptkit.data.rows import holds_rows, read_pieces, read_rows
from adaptkit.data.tokenizer_files import leading_special_tokens, load_tokenizer
from adaptkit.errors import DataError, UsageError

_BYTES_PER_TOKEN, _LEAST_BYTES = 16, 4096
_EXTRA_TOKENS = 16
"""Number of tokens beyond the wanted ones that must also agree with the tokens of a longer prefix."""


def read_tokens(
    files: Sequence[Path],
    root: Path,
    *,
    window: int,
    max_tokens: int | None = None,
    template_kwargs: Mapping[str, str | float | bool] | None = None,
) -> Tensor:
    """Tokenize text files with a checkpoint's tokenizer and cut them into windows.

    A file in a format of ``data.rows`` has rows with a ``text``, or with a conversation in a layout of
    ``data.conversation``, which the chat template renders; any other file is one text. The texts are concatenated with
    end tokens between them. If the tokenizer begins texts with a token, every window begins with it, as the model's
    training data did.

    Args:
        files: files to read, in order.
        root: folder of the checkpoint.
        window: tokens per window; at least 2.
        max_tokens: limit on the tokens in all windows; at least one window is made. Files are read little further than
            needed, but rows are read whole.
        template_kwargs: variables of the chat template; those that it does not use are ignored.

    Returns:
        (windows, window) int64. Tokens at the end that do not fill a window are dropped; if there are not enough for
        even one, the result is a single shorter window.

    Raises:
        DataError: a file cannot be read or is not text, a row is not JSON or lacks fields (names file and line), or
            there is no text at all.
        UsageError: the window is longer than the model allows, or there is no tokenizer.
    """
    for name, given in (("window", window), ("max_tokens", max_tokens)):
        if given is not None and given < 2:
            raise UsageError(f"{name}: must be at least 2, found {given}")
    check_window(root, window)
    window = window if max_tokens is None else min(window, max_tokens)
    wanted = None if max_tokens is None else max_tokens // window
    limit = None if wanted is None else wanted * window
    tokenizer = load_tokenizer(root)
    set_template_kwargs(tokenizer, known_template_kwargs(tokenizer, template_kwargs or {}))
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream, ended = list[int](), True
    for ids, ends_itself in _texts(files, tokenizer, limit):
        if ids:
            stream += ids if ended else [*end, *ids]
            ended = ends_itself or ids[-1:] == end  # some tokenizers append an end token to every text
        if limit is not None and len(stream) >= limit:
            break
    windows = _cut(stream, window, leading_special_tokens(tokenizer)[:1])
    if not windows or len(windows[0]) < 2:
        found, read = "a single token" if windows else "no text to read", ", ".join(map(str, files)) or "no files"
        raise DataError(f"{read}: {found}", hint="give files that contain at least two tokens")
    return torch.tensor(windows[:wanted])


def _texts(files: Sequence[Path], tokenizer: Any, limit: int | None) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of each text (of a long one at least ``limit``), and whether it has its own end token."""
    for file in files:
        if holds_rows(file):
            for where, row in read_rows(file):
                yield _row_tokens(row, where, tokenizer)
        else:
            yield _prefix_tokens(tokenizer, file, limit), False


def _prefix_tokens(tokenizer: Any, file: Path, limit: int | None) -> list[int]:
    """Return the first tokens of a text, at least ``limit`` if it has them, as if it were tokenized whole.

    The tokens of a prefix may differ from the whole text's near the cut, rarely by more than a word. So prefixes are
    cut before white space, and accepted if the first ``limit + _EXTRA_TOKENS`` tokens equal those of the previous,
    shorter prefix.
    """
    text, compared, known = "", (limit or 0) + _EXTRA_TOKENS, list[int]()
    for piece, is_whole in read_pieces(file, max(_LEAST_BYTES, _BYTES_PER_TOKEN * limit) if limit else -1):
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
        rendered = render(example.messages, tokenizer, example.tools)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error
    return _tokens(tokenizer, rendered, tokenizer.chat_template is None), True


def _tokens(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: no warning of texts longer than the model's context, since they are cut into windows
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
