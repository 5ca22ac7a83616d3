"""The model card of an artifact: its kind, its inputs, options, and how to verify it.

It holds only facts from the artifact's own files and from its base on the Hub, in a fixed order, so the same artifact
gives the same card. The Hub builds its model tree from ``base_model`` and ``base_model_relation`` in the front matter.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from adaptkit.checkpoint.manifest import Manifest
from adaptkit.checkpoint.vocabulary import is_usual_embedding, is_usual_head
from adaptkit.hub.names import REPO_ID
from adaptkit.wording import counted

_TITLES = {"adapter": "LoRA adapter", "merged": "Merged model", "quantized": "Quantized model"}
_WRAPPERS = re.compile(r"(\.token_adapter|\.modules_to_save|\.default|\.base_layer)*\.weight$")
"""The end of the name of a whole tensor in an adapter, after its module."""


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card that are not in the manifest.

    Attributes:
        config: ``adapter_config.json`` of an adapter, ``config.json`` of a model.
        base: name of the base on the Hub, if known.
        base_config: what the Hub shows of ``config.json`` of an adapter's base; empty if it is unknown.
        licence: licence fields in the front matter of the base's card.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    base_config: Mapping[str, Any] = field(default_factory=dict)
    licence: Mapping[str, str | list[str]] = field(default_factory=dict)


def make_card(manifest: Manifest, facts: CardFacts) -> str:
    """Return the text of a card.

    Args:
        manifest: manifest of the artifact, without the card.
        facts: facts that are not in the manifest.

    Returns:
        Markdown, with YAML front matter.
    """
    front = yaml.safe_dump(_front_matter(manifest, facts), sort_keys=True, allow_unicode=True)
    sections = [
        f"# {_TITLES.get(manifest.kind, 'Model')}",
        _facts(manifest, facts),
        _parents(manifest),
        _use(manifest, facts),
        _operation(manifest),
        _CHECK,
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the base's name in a configuration if it has the form of a Hub name rather than a path; else None."""
    for key in ("base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and REPO_ID.fullmatch(name):
            return name
    return None


def relation(manifest: Manifest) -> str | None:
    """Return the Hub's ``base_model_relation`` of an artifact; None if the Hub has no term for it."""
    if manifest.kind == "checkpoint":
        return "finetune" if manifest.operation.get("name") == "train" else None
    return {"adapter": "adapter", "merged": "merge", "quantized": "quantized"}.get(manifest.kind)


def _front_matter(manifest: Manifest, facts: CardFacts) -> dict[str, Any]:
    is_adapter = manifest.kind == "adapter"
    tags = {"adaptkit"} | ({"lora"} if is_adapter else set())
    quantization = facts.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str):
        tags.add(method)
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": sorted(tags)}
    if _generates_text(manifest, facts):
        front["pipeline_tag"] = "text-generation"
    if facts.base is not None:
        front["base_model"] = facts.base
        if (role := relation(manifest)) is not None:
            front["base_model_relation"] = role
    return front | dict(facts.licence)


def _facts(manifest: Manifest, facts: CardFacts) -> str:
    elements = sum(math.prod(tensor.shape) for tensor in manifest.tensors)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in manifest.tensors}))
    rows = [
        (
            "Adopted by" if manifest.operation["name"] == "adopt" else "Made by",
            f"{manifest.tool['name']} {manifest.tool['version']}, `{manifest.operation['name']}`",
        ),
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


def _use(manifest: Manifest, facts: CardFacts) -> str:
    """Return the code that loads the artifact; empty where transformers and peft alone may not load it."""
    is_adapter, names = manifest.kind == "adapter", {record.path for record in manifest.files}
    quantization = facts.config.get("quantization_config", {"quant_method": "bitsandbytes"})
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    model = facts.base if is_adapter else _REPOSITORY
    if method != "bitsandbytes" or not _generates_text(manifest, facts) or model is None:
        return ""
    tokenizer = _REPOSITORY if "tokenizer_config.json" in names else facts.base
    lines = ["from peft import PeftModel"] if is_adapter else []
    lines.append("from transformers import AutoModelForCausalLM, AutoTokenizer")
    if tokenizer is not None:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)})")
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({json.dumps(model)})")
    if is_adapter:
        entries = _entries(manifest)
        lines += [f"model.resize_token_embeddings({entries})"] if entries else []
        lines.append(f"model = PeftModel.from_pretrained(model, {json.dumps(_REPOSITORY)})")
    return "## Use it\n\n" + "\n".join(f"    {line}" for line in lines)


def _entries(manifest: Manifest) -> int | None:
    """Return the entries of the embedding or head that an adapter contains; peft fails on a model with another number.

    They are usually those of its base, of whose tensors nothing is known here.
    """
    for tensor in manifest.tensors:
        module = _WRAPPERS.sub("", tensor.name)
        if (is_usual_embedding(module) or is_usual_head(module)) and tensor.shape:
            return tensor.shape[0]
    return None


def _generates_text(manifest: Manifest, facts: CardFacts) -> bool:
    """Whether the configuration says that this is a decoder of text whose code is part of transformers.

    Of an adapter, so does its base's, unless that is unknown.
    """
    if manifest.kind == "adapter":
        is_known = "architectures" in facts.base_config
        return facts.config.get("task_type") == "CAUSAL_LM" and (not is_known or _is_decoder(facts.base_config))
    return _is_decoder(facts.config)


def _is_decoder(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return "auto_map" not in config and any(str(name).endswith("ForCausalLM") for name in names)


def _operation(manifest: Manifest) -> str:
    options = manifest.operation.get("options") or {}
    if not options:
        return ""
    # Indented, not fenced: no value can end such a block, since JSON escapes line breaks in strings.
    lines = [f"    {json.dumps(key)}: {json.dumps(options[key], sort_keys=True)}" for key in sorted(options)]
    return "## Options\n\n" + "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Escape text so that it stays in its table cell and is not interpreted as markup: it may be of any origin."""
    printable = "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in text)
    return " ".join(printable.split()).replace("|", "/").replace("<", "&lt;").replace("[", "&#91;")


_REPOSITORY = "ORG/NAME"
_CHECK = """## Verify it

`adaptkit-manifest.json` lists the sha256 of every file and a fingerprint of every tensor:

    adaptkit pull ORG/NAME@COMMIT -o FOLDER      downloads, and checks every file before FOLDER appears
    adaptkit verify FOLDER                       checks FOLDER again

The sha256 of the manifest identifies the artifact. Get it from the publisher and pass it to either command as
`--manifest-sha256 HASH`."""
