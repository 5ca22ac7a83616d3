"""Small files of a merged checkpoint: the base's, except those that the adapters bring or change."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.layout import CONFIG_NAME, GENERATION_NAME, INDEX_NAME, read_json, read_small
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import CODE_SUFFIX, check_side_files
from adaptkit.data.chat_template import TEMPLATE_NAME
from adaptkit.data.tokenizer_files import (
    TEMPLATES,
    TOKENIZER_CONFIG,
    is_of_tokenizer,
    is_template,
    is_vocabulary,
    template_beside,
)
from adaptkit.errors import IntegrityError
from adaptkit.operations._carried import left_out, tokenizer_files
from adaptkit.operations._merge.edits import Edits


@dataclass
class SideFiles:
    """Small files of the result.

    Attributes:
        contents: maps names to contents.
        lost: maps names to the base's contents, for files that the result does not have or has changed.
        added: names of files that the base does not have.
        notes: lines for the report.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, bytes] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_side_files(
    checkpoint: Checkpoint, manifest: Manifest | None, adapters: Sequence[Adapter], edits: Edits
) -> SideFiles:
    """Collect the small files of a merged checkpoint, except its index.

    An adapter's tokenizer replaces all of the base's tokenizer files, since the adapter was trained with it. A chat
    template without a tokenizer, and a generation config, replace the base's too.

    Raises:
        UsageError: two adapters bring different versions of a file.
        IntegrityError: a file of the base does not match its manifest.
    """
    root = checkpoint.root
    check_side_files(root)
    before = checkpoint.side_contents()
    before[CONFIG_NAME] = read_small(root / CONFIG_NAME)
    for record in manifest.files if manifest else ():
        content = before.get(record.path)
        if content is not None and hashlib.sha256(content).hexdigest() != record.sha256:
            raise IntegrityError(
                f"{root}: {record.path} does not match the manifest",
                hint=f"restore the file, or remove {MANIFEST_NAME}",
            )
    files = SideFiles(dict(before))
    if edits.config or isinstance(checkpoint, DecodedCheckpoint):
        files.contents[CONFIG_NAME] = _changed_config(checkpoint.config, edits.config)
    brought = tokenizer_files(adapters)
    generation = brought.pop(GENERATION_NAME, (None, None))[0]
    if generation is not None and generation != before.get(GENERATION_NAME):
        files.contents[GENERATION_NAME] = generation
        files.notes.append(f"{GENERATION_NAME}: taken from the adapter")
    if any(map(is_vocabulary, brought)):
        for name in [name for name in before if is_of_tokenizer(name) and name not in brought]:
            if not name.endswith(CODE_SUFFIX):  # the model's code may import it
                del files.contents[name]
        files.notes.append(f"tokenizer: taken from {min(str(adapter.root) for _, adapter in brought.values())}")
        files.contents |= {name: content for name, (content, _) in brought.items()}
    elif templates := _templates(brought):
        files.notes.append("chat template: taken from the adapter")
        for name in list(filter(is_template, files.contents)) if TEMPLATES & set(templates) else ():
            del files.contents[name]
        files.contents |= templates
    files.notes += left_out(adapters)
    files.lost = {name: content for name, content in before.items() if files.contents.get(name) != content}
    files.added = sorted(set(files.contents) - set(before))
    return files


def _templates(brought: Mapping[str, tuple[bytes, Adapter]]) -> dict[str, bytes]:
    """Return the chat templates of adapters without a tokenizer, by file name; one may be in a tokenizer config."""
    found = {name: content for name, (content, _) in brought.items() if is_template(name)}
    if not TEMPLATES & set(found) and TOKENIZER_CONFIG in brought:
        template = template_beside(brought[TOKENIZER_CONFIG][1].root)
        found |= {} if template is None else {TEMPLATE_NAME: template.encode()}
    return found


def plan_index(checkpoint: Checkpoint, files: Mapping[str, str], total_bytes: int) -> bytes | None:
    """Return the index of the result: the base's own bytes unless tensors were added or resized; None if it has none.

    Args:
        checkpoint: the base.
        files: maps the result's tensors to their files.
        total_bytes: total size of the result's tensors.
    """
    path = checkpoint.root / INDEX_NAME
    if not path.exists():
        return None
    document = read_json(path)
    if set(files) == set(checkpoint.tensors) and total_bytes == checkpoint.nbytes:
        return read_small(path)
    metadata = document.get("metadata")
    document["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total_bytes}
    document["weight_map"] = dict(sorted(files.items()))
    return _as_before(document)


def _changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """Return the configuration with new values in the same key order; ``text_config`` is changed where it has the key.

    ``tie_word_embeddings`` is written to both: transformers 5 reads it at the top level, 4 in ``text_config``, whose
    class may default to True.
    """
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    inside = {key: changes[key] for key in changes if key in nested or (nested and key == "tie_word_embeddings")}
    outside = {key: changes[key] for key in changes if key in config or key not in nested}
    return _as_before({**config, **outside} | ({"text_config": nested | inside} if inside else {}))


def _as_before(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
