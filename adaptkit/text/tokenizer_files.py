"""Which small files say how a model is asked, and the tokenizer that they make, those beside an adapter included."""

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import TEMPLATES_FOLDER, read_json, side_files
from adaptkit.errors import UsageError
from adaptkit.networks.architecture import REFUSALS, quiet_transformers
from adaptkit.text.chat_template import TEMPLATE_NAME, check_template, read_template

TOKENIZER_CONFIG, TEMPLATE_KEY = "tokenizer_config.json", "chat_template"
_WITHIN_JSON = "chat_template.json"
TEMPLATES = {TEMPLATE_NAME, _WITHIN_JSON}
"""Files that hold the chat template and nothing else; others lie in a folder of their own."""
_VOCABULARY = r"tokenizer\.json|tekken\.json|vocab.*|.*\.(model|tiktoken)"
_TOKENIZER = re.compile(
    rf"{_VOCABULARY}|tokeniz.*|special_tokens_map.*|added_tokens.*|merges\.txt|chat_template\..*|{TEMPLATES_FOLDER}/.*"
)


def is_vocabulary(name: str) -> bool:
    """Whether a small file of this name makes a tokenizer: where there is one, there is the other."""
    return re.fullmatch(_VOCABULARY, name) is not None


def is_of_tokenizer(name: str) -> bool:
    """Whether a small file is of a tokenizer or its templates, which go together from folder to folder."""
    return _TOKENIZER.fullmatch(name) is not None


def is_template(name: str) -> bool:
    """Whether a small file is a chat template and nothing else."""
    return name in TEMPLATES or name.startswith(f"{TEMPLATES_FOLDER}/")


def brings_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer; an adapter's own takes the place of the base's, all of it."""
    return any(map(is_vocabulary, side_files(folder)))


def templates_in(
    folder: Path,
    read_object: Callable[[Path], Mapping[str, Any] | None] = read_json,
    read_text: Callable[[Path], str] = read_template,
) -> dict[str, tuple[str, str]]:
    """The chat templates in a folder, by name: the file, and the text. What a later file says goes before an earlier.

    Args:
        folder: of a checkpoint, a tokenizer or an adapter.
        read_object: a JSON file; None where it cannot be read as one.
        read_text: a template's file.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in (folder / TOKENIZER_CONFIG, folder / _WITHIN_JSON):
        kept = (read_object(path) or {}).get(TEMPLATE_KEY) if path.is_file() else None
        if isinstance(kept, list) and all(isinstance(entry, dict) for entry in kept):
            found |= {str(entry.get("name")): (path.name, str(entry.get("template"))) for entry in kept}
        elif kept is not None:
            found["default"] = (path.name, kept if isinstance(kept, str) else json.dumps(kept))
    path = folder / TEMPLATE_NAME
    if path.is_file() or path.is_symlink():  # one that leads nowhere is told
        found["default"] = (TEMPLATE_NAME, read_text(path))
    for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        found[path.stem] = (f"{TEMPLATES_FOLDER}/{path.name}", read_text(path))
    return found


def template_beside(folder: Path) -> str | None:
    """The chat template that lies in an adapter's folder, which it was trained with; None if there is none.

    Raises:
        CheckpointError, DataError: one cannot be read.
    """
    found = templates_in(folder).get("default")
    return found and found[1]


def load_tokenizer(root: Path) -> Any:
    """Load a checkpoint's tokenizer; never runs code from the folder.

    Raises:
        UsageError: there is none, or one without a vocabulary, which transformers makes where that file is missing.
    """
    from huggingface_hub.errors import StrictDataclassError

    hint = "add the model's tokenizer.json and tokenizer_config.json"
    with quiet_transformers() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(root), trust_remote_code=False, local_files_only=True
            )
        except (*REFUSALS, OSError, StrictDataclassError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            pieces = sorted(path.name for path in root.glob("*.model"))
            if pieces and not (root / "tokenizer.json").exists():  # transformers asks for tiktoken, whatever it is
                hint = f"pip install sentencepiece protobuf if {pieces[0]} is SentencePiece's, or {hint}"
            raise UsageError(f"{root}: no tokenizer that transformers can load ({reason})", hint=hint) from error
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()  # mistral-common's has no such list
    if len(tokenizer) - len(added) <= 1 and not _are_words(tokenizer, root):  # some begin with "▁" of their own
        raise UsageError(f"{root}: its tokenizer has no vocabulary, only special tokens", hint=hint)
    return tokenizer


def _are_words(tokenizer: Any, root: Path) -> bool:
    """Whether added tokens are all the vocabulary, as letters or amino acids may be, and not <think> and the like."""
    added = tokenizer.added_tokens_decoder.values() if (root / "tokenizer.json").exists() else ()
    return any(not token.special for token in added)


def load_tokenizer_of(base: Path, adapter: Path | None) -> Any:
    """A base's tokenizer, or that of an adapter that brings one, with the chat templates that an adapter brings.

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
    found = {name: check_template(text, str(adapter)) for name, (_, text) in templates_in(adapter).items()}
    if "default" in found:
        tokenizer.chat_template = found if len(found) > 1 else found["default"]
    return tokenizer


def first_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: mostly one token, or none."""
    text = "a"
    marked, plain = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if not plain:  # some know no Latin letters, and make nothing of them
        return [int(token) for token in marked if token != tokenizer.eos_token_id]
    return [int(token) for token in marked[: marked.index(plain[0])]]
