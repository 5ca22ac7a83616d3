"""The model card of an artifact: what it is, what it was made from, what was measured, and how to check it.

Only facts from the artifact's own files and from the card of its base, in a fixed order: the same artifact gives the
same card. The front matter's ``base_model`` and ``base_model_relation`` are what the Hub draws its model tree from.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from adaptkit.checkpoint.manifest import Manifest
from adaptkit.checkpoint.progress import counted
from adaptkit.hub._remote import REPO_ID

_TITLES = {"adapter": "LoRA adapter", "merged": "Merged model", "quantized": "Quantized model"}
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the manifest does.

    Attributes:
        config: ``adapter_config.json`` of an adapter, ``config.json`` of a model.
        base: name of the base on the Hub, if known.
        licence: front matter of the base's card that is about its licence.
        figures: label and value of what training measured.
        picture: file that shows its course.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    licence: Mapping[str, str | list[str]] = field(default_factory=dict)
    figures: Sequence[tuple[str, str]] = ()
    picture: str | None = None


def make_card(manifest: Manifest, facts: CardFacts) -> str:
    """Write the card.

    Args:
        manifest: of the artifact, without the card.
        facts: the rest.

    Returns:
        Markdown, with YAML front matter.
    """
    front = yaml.safe_dump(_front_matter(manifest, facts), sort_keys=True, allow_unicode=True)
    sections = [
        f"# {_TITLES.get(manifest.kind, 'Model')}",
        _facts(manifest, facts),
        _parents(manifest),
        _training(facts),
        _operation(manifest),
        _CHECK,
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def base_model(config: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub, if the configuration holds one; a path on somebody's disk is none."""
    for key in ("base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and REPO_ID.fullmatch(name):
            return name
    return None


def relation(manifest: Manifest) -> str | None:
    """How an artifact relates to its base, in the Hub's words; None where it has no word for it."""
    if manifest.kind == "checkpoint":
        return "finetune" if manifest.operation.get("name") == "train" else None
    return {"adapter": "adapter", "merged": "merge", "quantized": "quantized"}.get(manifest.kind)


def read_licence(card: str) -> dict[str, str | list[str]]:
    """The front matter of somebody's card that is about the licence; empty if there is none that can be read."""
    found = re.match(r"\ufeff?\s*---\r?\n(.{0,65536}?)\r?\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    values: dict[str, Any] = {key: front.get(key) for key in _LICENCE_KEYS} if isinstance(front, dict) else {}
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.isprintable() and 0 < len(item) < 300 for item in items)


def _front_matter(manifest: Manifest, facts: CardFacts) -> dict[str, Any]:
    is_adapter = manifest.kind == "adapter"
    tags = {"adaptkit"} | ({"lora"} if is_adapter else set())
    quantization = facts.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str):
        tags.add(method)
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": sorted(tags)}
    if facts.base is not None:
        front["base_model"] = facts.base
        found = relation(manifest)
        if found is not None:
            front["base_model_relation"] = found
    return front | dict(facts.licence)


def _facts(manifest: Manifest, facts: CardFacts) -> str:
    elements = sum(math.prod(tensor.shape) for tensor in manifest.tensors)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in manifest.tensors}))
    rows = [
        ("Made by", f"{manifest.tool['name']} {manifest.tool['version']}, `{manifest.operation['name']}`"),
        ("Tensors", f"{len(manifest.tensors)} ({dtypes}), {elements:,} elements"),
        ("Size", f"{sum(record.size for record in manifest.files):,} bytes in {counted(len(manifest.files), 'file')}"),
        ("Tensors root", f"`{manifest.tensors_root}`"),
    ]
    if manifest.kind == "adapter":
        rows.insert(1, ("Rank, alpha", f"{facts.config.get('r')}, {facts.config.get('lora_alpha')}"))
        rows.insert(2, ("Modules", str(sum(tensor.name.endswith(".lora_A.weight") for tensor in manifest.tensors))))
    return _table(("", ""), rows)


def _parents(manifest: Manifest) -> str:
    if not manifest.parents:
        return ""
    rows = [
        (parent.role, parent.kind, "" if parent.weight is None else f"{parent.weight:g}", f"`{parent.tensors_root}`")
        for parent in manifest.parents
    ]
    return "## Made from\n\n" + _table(("Role", "Kind", "Weight", "Tensors root"), rows)


def _training(facts: CardFacts) -> str:
    if not facts.figures:
        return ""
    picture = [f"![Loss and learning rate by step]({facts.picture})"] if facts.picture else []
    return "\n\n".join(["## Training", _table(("", ""), facts.figures), *picture])


def _operation(manifest: Manifest) -> str:
    options = manifest.operation.get("options") or {}
    if not options:
        return ""
    # Indented, not fenced: no value can end such a block, since JSON puts no line break into a string.
    lines = [f"    {json.dumps(key)}: {json.dumps(options[key], sort_keys=True)}" for key in sorted(options)]
    return "## Options\n\n" + "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


_CHECK = """## Verify it

`adaptkit-manifest.json` lists the sha256 of every file and a fingerprint of every tensor:

    adaptkit pull ORG/NAME@COMMIT -o FOLDER      downloads, and checks every file before FOLDER appears
    adaptkit verify FOLDER                       checks FOLDER again

The sha256 of the manifest identifies the artifact. Get it from the publisher and pass it to either command as
`--manifest-sha256 HASH`."""
