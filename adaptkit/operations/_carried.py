"""What an adapter that is made from others keeps of them, besides their changes, and how it is written.

Kept are the tokenizer and chat template that they were trained with, the generation config that names their end token,
and peft's copies of the base's tensors, which hold the rows of new tokens if the vocabulary grew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, write_adapter
from adaptkit.checkpoint.foreign import PICKLED_WEIGHTS, VALUE_HEADS, weights_beside
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import GENERATION_NAME, has_checkpoint, read_small
from adaptkit.checkpoint.manifest import Manifest, Target, parent_of
from adaptkit.checkpoint.side_files import side_files
from adaptkit.checkpoint.undo import as_bytes
from adaptkit.data.tokenizer_files import is_of_tokenizer
from adaptkit.errors import AdapterError, UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank

_KEPT_KEYS = ("revision", "ensure_weight_tying")
"""Optional keys of the configuration that are kept if all adapters agree."""


@dataclass(frozen=True)
class CarriedParts:
    """Files and tensors to keep.

    Attributes:
        files: maps name to content: tokenizer, chat template and generation config.
        copies: maps the name of a base tensor to the adapter that has a copy of it and the copy's key there.
    """

    files: Mapping[str, bytes]
    copies: Mapping[str, tuple[Adapter, str]]

    def identity(self) -> list[list[str]]:
        """Return (name, fingerprint) of each file; the copies are among the adapters' tensors."""
        return [[name, fingerprint(as_bytes(content))] for name, content in sorted(self.files.items())]

    def tensors(self) -> dict[str, Array]:
        """Read the copies, by name of the base's tensor."""
        return {name: adapter.files.read(key) for name, (adapter, key) in self.copies.items()}


def collect_carried(adapters: Sequence[Adapter]) -> CarriedParts:
    """Collect the files and tensors to keep from several adapters.

    Raises:
        UsageError: two adapters contain different tokenizers.
        AdapterError: two adapters contain different copies of one tensor.
    """
    files = {name: content for name, (content, _) in tokenizer_files(adapters).items()}
    copies: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for name, key in sorted(adapter.base_copies.items()):
            other, other_key = copies.setdefault(name, (adapter, key))
            if other.digests[other_key] != adapter.digests[key]:
                raise AdapterError(
                    f"{other.root} and {adapter.root} contain different copies of the base's {name}",
                    hint="merge one adapter after the other",
                )
    return CarriedParts(files, copies)


def base_names(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Return the names of the base in the adapters' configurations, each once, sorted."""
    return tuple(sorted({str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters}))


def publish_adapter(
    out: Output,
    operation: Mapping[str, Any],
    adapters: Sequence[Adapter],
    weights: Sequence[float | None],
    modules: Mapping[str, LowRank],
    carried: CarriedParts,
) -> Manifest:
    """Write an adapter that is made from others, beside what it keeps of them, and publish it.

    Args:
        out: folder being written.
        operation: name and options, for the manifest.
        adapters: that it is made from.
        weights: one per adapter, for the manifest; None where weights mean nothing.
        modules: maps a module's dotted path to its change.
        carried: see ``collect_carried``.

    Raises:
        NonFiniteError: a change is too large for float32.
    """
    names = base_names(adapters)
    agreed = {key: _agreed(adapters, key) for key in _KEPT_KEYS}
    write_adapter(
        out,
        modules,
        names[0] if len(names) == 1 else "",
        frozenset().union(*(adapter.embeddings for adapter in adapters)),
        copies=carried.tensors(),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        task_type=_agreed(adapters, "task_type"),
        **{key: value for key, value in agreed.items() if value},
    )
    for file, content in carried.files.items():
        out.write(file, content)
    manifest = Manifest(
        kind="adapter",
        operation=dict(operation),
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=tuple(
            parent_of("adapter", adapter.manifest, adapter.records, weight, root=adapter.root)
            for adapter, weight in zip(adapters, weights, strict=True)
        ),
        targets=_targets(adapters),
    )
    out.publish(manifest)
    return manifest


def _agreed(adapters: Sequence[Adapter], key: str) -> Any:
    """Return the value that all configurations have for a key; None if they differ."""
    values = [adapter.config.get(key) for adapter in adapters]
    return values[0] if all(value == values[0] for value in values) else None


def _targets(adapters: Sequence[Adapter]) -> tuple[Target, ...]:
    """Combine the adapters' targets by module; empty if an adapter has no manifest."""
    manifests = [adapter.manifest for adapter in adapters if adapter.manifest is not None]
    if len(manifests) < len(adapters):
        return ()
    found: dict[str, list[Target]] = {}
    for target in (target for manifest in manifests for target in manifest.targets):
        found.setdefault(target.module, []).append(target)
    return tuple(
        replace(
            targets[0],
            base_xxh3_128=_only(target.base_xxh3_128 for target in targets),
            quantized_root=_only(target.quantized_root for target in targets),
        )
        for targets in found.values()
    )


def _only(values: Iterable[str | None]) -> str | None:
    """Return the only known value; None if there is none, or they differ, as for two quantizations of a base."""
    known = set(values) - {None}
    return known.pop() if len(known) == 1 else None


def tokenizer_files(adapters: Sequence[Adapter]) -> dict[str, tuple[bytes, Adapter]]:
    """Map the names of tokenizer, template and generation files to (content, first adapter that has the file).

    Raises:
        UsageError: two adapters contain different versions of a file.
    """
    brought: dict[str, tuple[bytes, Adapter]] = {}
    for adapter in adapters:
        for name, content in _own_files(adapter).items():
            other = brought.setdefault(name, (content, adapter))
            if other[0] != content:
                raise UsageError(
                    f"{other[1].root} and {adapter.root} contain different versions of {name}",
                    hint=f"remove {name} from a copy of one of them; of a tokenizer, remove all files",
                )
    return brought


def left_out(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Return a note for each adapter beside which there is a value head, or a pickle that may be one."""
    notes = []
    for root in dict.fromkeys(adapter.root for adapter in adapters):
        if head := weights_beside(root, VALUE_HEADS):
            notes.append(f"{root}: {head} is left out; if this is a reward model, it needs that file")
        elif weights_beside(root, [PICKLED_WEIGHTS]) and not has_checkpoint(root):
            notes.append(f"{root}: {PICKLED_WEIGHTS} is left out; if TRL wrote it, it is a value head, for PPO only")
    return tuple(notes)


def _own_files(adapter: Adapter) -> dict[str, bytes]:
    ours = {record.path for record in adapter.manifest.files} if adapter.manifest else set()
    # A generation config that no manifest lists is only a copy of the base's, which trainers leave in the folder.
    kept = {GENERATION_NAME} & ours
    found = side_files(adapter.root, lambda name: name in kept or is_of_tokenizer(name))
    return {name: read_small(path) for name, path in found.items()}
