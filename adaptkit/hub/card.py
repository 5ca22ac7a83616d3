"""The model card of an artifact: what it is and what it was made from, by hashes.

Only facts from the manifest and the configuration, in a fixed order: the same artifact gives the same card.
The front matter's ``base_model`` and ``base_model_relation`` are what the Hub draws its model tree from.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from adaptkit.checkpoint.manifest import Manifest

CARD_NAME = "README.md"
_RELATIONS = {"adapter": "adapter", "merged": "merge", "quantized": "quantized"}
_TITLES = {"adapter": "LoRA adapter", "merged": "Merged model", "quantized": "Quantized model"}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def make_card(manifest: Manifest, config: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        manifest: of the artifact, without the card.
        config: ``adapter_config.json`` of an adapter, ``config.json`` of a model.

    Returns:
        Markdown, with YAML front matter.
    """
    front = yaml.safe_dump(_front_matter(manifest, config), sort_keys=True, allow_unicode=True)
    title = _TITLES.get(manifest.kind, "Model")
    sections = [f"# {title}", _facts(manifest, config), _parents(manifest), _operation(manifest), _CHECK]
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def base_model(config: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub, if the configuration holds one; a path on somebody's disk is none."""
    for key in ("base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and _REPO_ID.fullmatch(name):
            return name
    return None


def _front_matter(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, Any]:
    is_adapter = manifest.kind == "adapter"
    tags = {"adaptkit"} | ({"lora"} if is_adapter else set())
    method = (config.get("quantization_config") or {}).get("quant_method")
    if isinstance(method, str):
        tags.add(method)
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": sorted(tags)}
    base = base_model(config)
    if base is not None:
        front["base_model"] = base
        if manifest.kind in _RELATIONS:
            front["base_model_relation"] = _RELATIONS[manifest.kind]
    return front


def _facts(manifest: Manifest, config: Mapping[str, Any]) -> str:
    elements = sum(math.prod(tensor.shape) for tensor in manifest.tensors)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in manifest.tensors}))
    rows = [
        ("Made by", f"{manifest.tool['name']} {manifest.tool['version']}, `{manifest.operation['name']}`"),
        ("Tensors", f"{len(manifest.tensors)} ({dtypes}), {elements:,} elements"),
        ("Tensors root", f"`{manifest.tensors_root}`"),
    ]
    if manifest.kind == "adapter":
        rows.insert(1, ("Rank, alpha", f"{config.get('r')}, {config.get('lora_alpha')}"))
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


_CHECK = """## Check it

`adaptkit-manifest.json` lists every file with its sha256 and every tensor with its fingerprint.
`adaptkit pull` compares all of them before the folder appears; `adaptkit verify FOLDER` does so again."""
