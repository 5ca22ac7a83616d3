"""Which small files say how a model is asked, and the tokenizer that they make, those beside an adapter included."""

import json
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.checkpoint.chat_template import TEMPLATE_NAME, check_template, read_template
from adaptkit.checkpoint.layout import read_json, side_files

TEMPLATES = {TEMPLATE_NAME, "chat_template.json"}
"""Files that hold a chat template and nothing else."""
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}
TOKENIZER = {
    *VOCABULARIES,
    *TEMPLATES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
}


def brings_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder has a tokenizer of its own, which takes the place of the base's, all of it."""
    return not VOCABULARIES.isdisjoint(path.name for path in side_files(folder))


def template_beside(folder: Path) -> str | None:
    """The chat template that lies in an adapter's folder, which it was trained with; None if there is none.

    Raises:
        CheckpointError, DataError: one cannot be read.
    """
    path = folder / TEMPLATE_NAME
    if path.is_file() or path.is_symlink():
        return read_template(path)
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        kept = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(kept, list):  # by name
            kept = next((entry.get("template") for entry in kept if entry.get("name") == "default"), None)
        if kept is not None:
            return check_template(kept if isinstance(kept, str) else json.dumps(kept), path)
    return None


def load_tokenizer_of(base: Path, adapter: Path | None) -> Any:
    """A base's tokenizer, or that of an adapter that brings one, with the chat template that an adapter brings.

    Args:
        base: folder of a checkpoint.
        adapter: folder of what was trained on it, if there is such.

    Raises:
        UsageError: transformers cannot load it.
        CheckpointError, DataError: a chat template cannot be read.
    """
    if adapter is None:
        return load_tokenizer(base)
    tokenizer = load_tokenizer(adapter if brings_tokenizer(adapter) else base)
    template = template_beside(adapter)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
