"""Tokenizer files and chat templates of a checkpoint or adapter, and loading the tokenizer from them."""

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import read_json
from adaptkit.checkpoint.side_files import TEMPLATES_FOLDER, find_side_files
from adaptkit.data.chat_template import TEMPLATE_NAME, check_template, read_template
from adaptkit.data.messages import TAGS
from adaptkit.errors import UsageError
from adaptkit.models.architecture import BUILD_ERRORS, quiet_transformers

TOKENIZER_CONFIG, TEMPLATE_KEY = "tokenizer_config.json", "chat_template"
_WITHIN_JSON = "chat_template.json"
TEMPLATES = {TEMPLATE_NAME, _WITHIN_JSON}
"""Files that hold only the default chat template; further templates are in ``TEMPLATES_FOLDER``."""
_VOCABULARY = r"tokenizer\.json|tekken\.json|vocab.*|.*\.(model|tiktoken)"
_TOKENIZER = re.compile(
    rf"{_VOCABULARY}|tokeniz.*|special_tokens_map.*|added_tokens.*|merges\.txt|chat_template\..*|{TEMPLATES_FOLDER}/.*"
)


def is_vocabulary(name: str) -> bool:
    """Return whether a file of this name holds a vocabulary; a folder has a tokenizer if and only if it has one."""
    return re.fullmatch(_VOCABULARY, name) is not None


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file belongs to a tokenizer or its chat templates; these files are copied together."""
    return _TOKENIZER.fullmatch(name) is not None


def is_template(name: str) -> bool:
    """Return whether a file holds chat templates and nothing else."""
    return name in TEMPLATES or name.startswith(f"{TEMPLATES_FOLDER}/")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer; an adapter's own replaces the base's entirely."""
    return any(map(is_vocabulary, find_side_files(folder)))


def templates_in(
    folder: Path,
    read_object: Callable[[Path], Mapping[str, Any] | None] = read_json,
    read_text: Callable[[Path], str] = read_template,
) -> dict[str, tuple[str, str]]:
    """Return the chat templates in a folder, as name to (file, text).

    Files are read in order of increasing precedence: tokenizer_config.json, chat_template.json, chat_template.jinja,
    then the folder of further templates.

    Args:
        folder: folder of a checkpoint, a tokenizer or an adapter.
        read_object: reads a JSON file; returns None if it is not a JSON object.
        read_text: reads a template file.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in (folder / TOKENIZER_CONFIG, folder / _WITHIN_JSON):
        kept = (read_object(path) or {}).get(TEMPLATE_KEY) if path.is_file() else None
        if isinstance(kept, list) and all(isinstance(entry, dict) for entry in kept):
            found |= {str(entry.get("name")): (path.name, str(entry.get("template"))) for entry in kept}
        elif kept is not None:
            found["default"] = (path.name, kept if isinstance(kept, str) else json.dumps(kept))
    path = folder / TEMPLATE_NAME
    if path.is_file() or path.is_symlink():  # a dangling link is an error, not skipped
        found["default"] = (TEMPLATE_NAME, read_text(path))
    for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        found[path.stem] = (f"{TEMPLATES_FOLDER}/{path.name}", read_text(path))
    return found


def template_beside(folder: Path) -> str | None:
    """Return the chat template in an adapter's folder, with which it was trained; None if there is none."""
    found = templates_in(folder).get("default")
    return found and found[1]


def load_tokenizer(root: Path) -> Any:
    """Load a checkpoint's tokenizer without running code from the folder.

    Raises:
        UsageError: there is no tokenizer, or it has no vocabulary, as transformers makes it if the vocabulary file is
            missing.
    """
    from huggingface_hub.errors import StrictDataclassError

    hint = "add the model's tokenizer.json and tokenizer_config.json"
    with quiet_transformers() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(root), trust_remote_code=False, local_files_only=True
            )
        except (*BUILD_ERRORS, OSError, StrictDataclassError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            pieces = sorted(path.name for path in root.glob("*.model"))
            if pieces and not (root / "tokenizer.json").exists():  # transformers always suggests tiktoken
                hint = f"pip install sentencepiece protobuf if {pieces[0]} is SentencePiece's, or {hint}"
            if isinstance(error, UnicodeEncodeError):
                hint = "move the folder to a path that is valid UTF-8"
            raise UsageError(f"{root}: no tokenizer that transformers can load ({reason})", hint=hint) from error
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()  # absent in mistral-common's
    if len(tokenizer) - len(added) <= 1 and not _are_words(tokenizer, root):  # some tokenizers always have "▁"
        raise UsageError(f"{root}: its tokenizer has no vocabulary, only special tokens", hint=hint)
    return tokenizer


def _are_words(tokenizer: Any, root: Path) -> bool:
    """Return whether the added tokens are the vocabulary (letters, amino acids) rather than markers such as <think>."""
    added = tokenizer.added_tokens_decoder.values() if (root / "tokenizer.json").exists() else ()
    return any(not token.special for token in added)


def load_tokenizer_of(base: Path, adapter: Path | None) -> Any:
    """Load the adapter's tokenizer if it has one, else the base's, with the adapter's chat templates if it has any.

    Raises:
        UsageError: transformers cannot load the tokenizer.
        CheckpointError, DataError: a chat template cannot be read.
    """
    if adapter is None:
        return load_tokenizer(base)
    tokenizer = load_tokenizer(adapter if has_tokenizer(adapter) else base)
    found = {name: check_template(text, str(adapter)) for name, (_, text) in templates_in(adapter).items()}
    if "default" in found:
        tokenizer.chat_template = found if len(found) > 1 else found["default"]
    return tokenizer


def tokens_in(text: str, tokenizer: Any) -> list[int]:
    """Return a text's tokens, without those that a tokenizer puts around texts and its warning of long ones."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def leading_special_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text: usually none or one."""
    text = "a"
    marked, plain = tokenizer(text)["input_ids"], tokens_in(text, tokenizer)
    if not plain:  # no Latin letters in the vocabulary, and no unknown token
        return [int(token) for token in marked if token != tokenizer.eos_token_id]
    return [int(token) for token in marked[: marked.index(plain[0])]]


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the special tokens that a tokenizer finds in a text, except for the tags of reasoning."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}.difference(TAGS)
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")
