"""The small files of a merged checkpoint: the base's, but for what the adapters bring or change."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.layout import (
    CODE_SUFFIX,
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    check_side_files,
    read_json,
    read_small,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import IntegrityError
from adaptkit.operations._carried import tokenizer_files
from adaptkit.operations._merge.edits import Edits
from adaptkit.text.chat_template import TEMPLATE_NAME
from adaptkit.text.tokenizer_files import (
    TEMPLATES,
    TOKENIZER_CONFIG,
    is_of_tokenizer,
    is_template,
    is_vocabulary,
    template_beside,
)


@dataclass
class SideFiles:
    """Small files of the result.

    Attributes:
        contents: by name.
        lost: by name, what the base had and the result has not, or has changed.
        added: names that the base does not have.
        told: for people.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, bytes] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def plan_side_files(
    checkpoint: Checkpoint, manifest: Manifest | None, adapters: Sequence[Adapter], edits: Edits
) -> SideFiles:
    """Collect the small files of a merged checkpoint, but for its index.

    A tokenizer that comes with an adapter takes the place of the base's, all of it, since the adapter was trained with
    it; so does a chat template alone, and a configuration of generation.

    Args:
        checkpoint: the base.
        manifest: of it, if it is an artifact.
        adapters: in order.
        edits: what they change.

    Raises:
        UsageError: two adapters bring different ones.
        IntegrityError: a file of the base is not the one of its manifest.
    """
    root = checkpoint.root
    check_side_files(root)
    before = checkpoint.side_contents()
    before[CONFIG_NAME] = read_small(root / CONFIG_NAME)
    _check_unchanged(root, manifest, before)
    files = SideFiles(dict(before))
    if edits.config:
        files.contents[CONFIG_NAME] = _changed_config(checkpoint.config, edits.config)
    brought = tokenizer_files(adapters)
    generation = brought.pop(GENERATION_NAME, (None, None))[0]
    if generation is not None and generation != before.get(GENERATION_NAME):
        files.contents[GENERATION_NAME] = generation
        files.told.append(f"{GENERATION_NAME}: taken from the adapter")
    if any(map(is_vocabulary, brought)):
        for name in [name for name in before if is_of_tokenizer(name) and name not in brought]:
            if not name.endswith(CODE_SUFFIX):  # which the model's own may import
                del files.contents[name]
        files.told.append(f"tokenizer: taken from {min(str(adapter.root) for _, adapter in brought.values())}")
        files.contents |= {name: content for name, (content, _) in brought.items()}
    elif templates := _templates(brought):
        files.told.append("chat template: taken from the adapter")
        for name in list(filter(is_template, files.contents)) if TEMPLATES & set(templates) else ():
            del files.contents[name]
        files.contents |= templates
    files.lost = {name: content for name, content in before.items() if files.contents.get(name) != content}
    files.added = sorted(set(files.contents) - set(before))
    return files


def _templates(brought: Mapping[str, tuple[bytes, Adapter]]) -> dict[str, bytes]:
    """The chat templates of adapters that bring no tokenizer, by name of the file; some have it in a configuration."""
    found = {name: content for name, (content, _) in brought.items() if is_template(name)}
    if not TEMPLATES & set(found) and TOKENIZER_CONFIG in brought:
        template = template_beside(brought[TOKENIZER_CONFIG][1].root)
        found |= {} if template is None else {TEMPLATE_NAME: template.encode()}
    return found


def plan_index(checkpoint: Checkpoint, files: Mapping[str, str], total_bytes: int) -> bytes | None:
    """The index of the result: the base's own bytes unless tensors were added or resized.

    Args:
        checkpoint: the base.
        files: by name, the file of every tensor of the result.
        total_bytes: of its tensors.

    Returns:
        None if the base has none.
    """
    path = checkpoint.root / INDEX_NAME
    if not path.exists():
        return None
    document = read_json(path)
    held = sum(located.spec.nbytes for located in checkpoint.tensors.values())
    if set(files) == set(checkpoint.tensors) and total_bytes == held:
        return read_small(path)
    metadata = document.get("metadata")
    document["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total_bytes}
    document["weight_map"] = dict(sorted(files.items()))
    return _as_before(document)


def _check_unchanged(root: Path, manifest: Manifest | None, contents: Mapping[str, bytes]) -> None:
    for record in manifest.files if manifest else ():
        content = contents.get(record.path)
        if content is not None and hashlib.sha256(content).hexdigest() != record.sha256:
            raise IntegrityError(
                f"{root}: {record.path} does not match the manifest",
                hint=f"restore the file, or remove {MANIFEST_NAME}",
            )


def _changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """The configuration with other values, in the order that it had; where a model's text part has them, there too.

    That a head is tied transformers 5 reads from the whole, and 4 from the part, whose class may say it unasked.
    """
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    inside = {
        key: value for key, value in changes.items() if key in nested or (nested and key == "tie_word_embeddings")
    }
    outside = {key: value for key, value in changes.items() if key in config or key not in nested}
    return _as_before({**config, **outside} | ({"text_config": nested | inside} if inside else {}))


def _as_before(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
