"""A model's context length and vocabulary size, from its configuration, and checks of texts against them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import CONFIG_NAME, read_config, require_folder, text_config
from adaptkit.errors import UsageError
from adaptkit.wording import counted

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Configuration keys for the maximum sequence length."""


def check_window(root: Path, window: int) -> None:
    """Raise UsageError if windows are longer than a checkpoint's model allows, or if there is no such folder."""
    longest = context_length(require_folder(root))
    if longest is not None and window > longest:
        raise UsageError(
            f"{root}: windows of {window} tokens are longer than the model's context of {longest}",
            hint=f"use --window {longest}",
        )


def check_prompt(root: Path, prompt: str, length: int, new_tokens: int) -> None:
    """Raise UsageError if a prompt of ``length`` tokens and an answer of ``new_tokens`` exceed the model's context."""
    longest = context_length(root)
    if longest is not None and length + new_tokens > longest:
        raise UsageError(
            f"{root}: the prompt {prompt[:40]!r} and {counted(new_tokens, 'new token')} are longer than the model's "
            f"context of {longest}",
            hint="shorten the prompt, or ask for fewer new tokens",
        )


def context_length(root: Path) -> int | None:
    """Return the context length of a checkpoint's model; None if its configuration does not say."""
    config = read_config(root / CONFIG_NAME)
    for values in (config, text_config(config)):
        for name in _LENGTHS:
            if isinstance(values.get(name), int) and values[name] > 0:
                return int(values[name])
    return None


def vocabulary_size(root: Path) -> int | None:
    """Return the vocabulary size of a checkpoint's model; None if its configuration does not say."""
    config = read_config(root / CONFIG_NAME)
    for values in (text_config(config), config):
        if isinstance(values.get("vocab_size"), int) and values["vocab_size"] > 0:
            return int(values["vocab_size"])
    return None


def pad_id(tokenizer: Any, base: Path) -> int:
    """Return the pad token, else the end token; 0 if there is neither or the model lacks it. Masks hide it anyway."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    known = vocabulary_size(base)
    return 0 if pad is None or (known is not None and pad >= known) else int(pad)


def check_vocabulary(ids: Sequence[int], known: int | None, where: str) -> None:
    """Raise UsageError if tokens from ``where`` exceed the vocabulary size ``known``; None is no limit."""
    if known is not None and max(ids, default=0) >= known:
        raise UsageError(
            f"{where}: the tokenizer produces token {max(ids)}, but the model's vocabulary has {known}",
            hint="use the tokenizer that the model was trained with, or enlarge the model's embedding",
        )
