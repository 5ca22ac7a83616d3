"""PEFT's adapter folder, read completely or refused, and written.

    adapter_config.json          peft_type, r, lora_alpha, patterns, target_modules, ...
    adapter_model.safetensors    the tensors; ``_adapter_keys`` says what their names mean

Every key of the file is used exactly once or named in an error. What this module does not know is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from adaptkit.checkpoint._adapter_keys import name_parts
from adaptkit.checkpoint._adapter_lacking import require_configured, require_weights
from adaptkit.checkpoint._adapter_parts import Parts, TokenRows
from adaptkit.checkpoint._adapter_writing import write_adapter
from adaptkit.checkpoint.adapter_config import (
    Scalings,
    age_of_patterns,
    check_config,
    is_saved,
    names_tied,
    turns_stacks,
)
from adaptkit.checkpoint.compensation import read_compensation
from adaptkit.checkpoint.hashing import bytes_of, fingerprint
from adaptkit.checkpoint.header import FLOATS
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    COMPENSATION_NAME,
    read_json,
    require_folder,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorRecord, read_manifest
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.vocabulary import is_head, is_table
from adaptkit.errors import AdapterError, IntegrityError
from adaptkit.numerics import lora
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank, is_equal

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.numerics.arrays import Array

__all__ = ["Adapter", "TokenRows", "adapter_identity", "read_adapter", "require_plain", "write_adapter"]

_PIECE_ELEMENTS = 1 << 20
_DECISIVE = {ADAPTER_CONFIG_NAME, COMPENSATION_NAME}
_SAYS_NOTHING = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Keys of ``adapter_config.json`` that do not matter to what an adapter does to a weight."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as files hold it. Modules, and the names of tensors, are those of the running model.

    Attributes:
        root: its folder.
        config: ``adapter_config.json``.
        files: its tensors; what replaces a whole tensor of the base stays there until it is needed.
        modules: by dotted path of the module, the change of its weight: (out, in), or (entries, dim) of an embedding.
        embeddings: which of the modules are embeddings.
        magnitudes: by module, DoRA's (out,) lengths of the rows of W + Δ.
        biases: by module, what is added to its bias: (out,) float64, scaling included.
        replaced: by name of the base's tensor, the key in ``files`` of what takes its place.
        begins: by name of the base's tensor, the key of what its change is added to; usually the same as the base's.
        tokens: by module, the rows of its weight that are replaced.
        experts: by path of a stacked parameter, the change of each expert's matrix as the files have it; for a model's
            see ``experts_for``.
        fan_in_fan_out: whether linear layers of the base keep their weights transposed (GPT-2's Conv1D).
        compensation: by module, what it began with to make up for what quantizing its base lost; mostly empty.
        manifest: None if another tool made the adapter.
        records: its tensors with fingerprints.
        state: of its file when it was read; see ``TensorFiles.require_state``.
    """

    root: Path
    config: Mapping[str, Any]
    files: TensorFiles
    modules: Mapping[str, LowRank]
    embeddings: frozenset[str]
    magnitudes: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    replaced: Mapping[str, str]
    begins: Mapping[str, str]
    tokens: Mapping[str, TokenRows]
    experts: Mapping[str, tuple[LowRank, ...]]
    fan_in_fan_out: bool
    compensation: Mapping[str, LowRank]
    manifest: Manifest | None
    records: tuple[TensorRecord, ...]
    state: list[list[Any]]

    @cached_property
    def digests(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """By name of a tensor, its ``TensorRecord.content``."""
        return {record.name: record.content for record in self.records}

    @property
    def ties_weights(self) -> bool:
        """Whether ``ensure_weight_tying`` made peft change embedding and head together.

        It does so where the configuration names one of them, in ``modules_to_save`` or ``target_modules``, and by one
        of two names; otherwise it warns, and ties nothing. Trained tokens follow rules of their own.
        """
        return bool(self.config.get("ensure_weight_tying")) and names_tied(self.root, self.config)

    def experts_for(self, parameter: str, matrix: tuple[int, ...], is_transposed: bool) -> tuple[LowRank, ...]:
        """The changes of a stack's matrices as the running model has them, whichever way peft wrote them.

        Args:
            parameter: the stack's path.
            matrix: (out, in) of the running model's matrices; changes that fit neither way stay as they are.
            is_transposed: what its module of experts says of itself, which decides where they are square.
        """
        stack = self.experts[parameter]
        shape = stack[0].shape
        if shape[::-1] == matrix and (shape != matrix or turns_stacks(self.config, is_transposed)):
            return tuple(lora.transposed(term) for term in stack)
        return stack

    @property
    def only_compensates(self) -> bool:
        """Whether it is still what it began with, so that it says nothing about the 16-bit base."""
        others = self.magnitudes or self.biases or self.replaced or self.tokens or self.experts
        return (
            bool(self.compensation)
            and not others
            and set(self.compensation) == set(self.modules)
            and all(is_equal(begun, self.modules[name]) for name, begun in self.compensation.items())
        )

    def changed_beside(self) -> str:
        """What decides about the changes beside the tensors and is not as the manifest lists it; empty if all is."""
        listed = [record for record in (self.manifest.files if self.manifest else ()) if record.path in _DECISIVE]
        return next(filter(None, (file_problem(self.root, record) for record in listed)), "")

    @property
    def trained_parameters(self) -> int:
        """How many numbers were trained.

        Tensors of the base that were saved too do not count, and what the embedding and a tied head share counts once.
        """
        terms = [*self.modules.values(), *(term for stack in self.experts.values() for term in stack)]
        others = [*self.magnitudes.values(), *self.biases.values()]
        whole: dict[Any, int] = {fingerprint(chosen.rows): chosen.rows.numel() for chosen in self.tokens.values()}
        for name, key in self.replaced.items():
            module, _, kind = name.rpartition(".")
            if is_saved(self.config, module) or (kind == "bias" and self.config.get("bias", "none") != "none"):
                whole[self.digests[key] if is_table(module) or is_head(module) else name] = self.files.spec(key).count
        return (
            sum(math.prod(term.a.shape) + math.prod(term.b.shape) for term in terms)
            + sum(math.prod(other.shape) for other in others)
            + sum(whole.values())
        )


def read_adapter(root: Path, *, changed: bool = False) -> Adapter:
    """Read an adapter.

    Args:
        root: its folder.
        changed: take it even if its configuration is not what its manifest says, to look at it; what is made of it
            would name another as its parent.

    Raises:
        UsageError: not a folder.
        AdapterError: not a LoRA adapter, something unsupported, or tensors that do not fit together.
        CheckpointError: a malformed file.
        IntegrityError: it changed while it was read, or what lies beside its tensors is not what its manifest says.
    """
    require_configured(require_folder(root))
    config = read_json(root / ADAPTER_CONFIG_NAME)
    check_config(root, config)
    require_weights(root)
    files = TensorFiles(root, [ADAPTER_WEIGHTS_NAME])
    if not files.tensors:
        raise AdapterError(
            f"{root}: the adapter contains no tensors", hint="download or copy it again, or train it again"
        )
    state = files.state()
    parts = name_parts(root, files.tensors)
    read: dict[str, Array] = {}
    records = tuple(_record(files, key, read) for key in files.tensors)
    found = Parts(root, config, files, parts, records, read)
    found.take_all()
    files.require_state(state)  # or the fingerprints would be of other tensors than the changes
    manifest = read_manifest(root)
    compensation = read_compensation(root, found.modules, manifest)
    adapter = Adapter(
        root=root,
        config=config,
        files=files,
        modules=dict(sorted(found.modules.items())),
        embeddings=frozenset(found.embeddings),
        magnitudes=found.magnitudes,
        biases=found.biases,
        replaced=found.replaced,
        begins=found.begins,
        tokens=found.tokens,
        experts=found.experts,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        compensation=compensation,
        manifest=manifest,
        records=records,
        state=state,
    )
    if not changed and (problem := adapter.changed_beside()):
        raise IntegrityError(
            f"{root}: {problem}",
            hint=f"restore it; or, to use it as it is now, copy the folder without {MANIFEST_NAME}",
        )
    return adapter


def adapter_identity(adapter: Adapter) -> str:
    """sha256 over what decides an adapter's changes beside its tensors: configuration, and what it began with."""
    config = {key: value for key, value in adapter.config.items() if key not in _SAYS_NOTHING}
    begun = {
        name: [fingerprint(term.lora_a), fingerprint(term.lora_b), term.scaling]
        for name, term in adapter.compensation.items()
    }
    return hashlib.sha256(json.dumps([config, begun, *_meant_otherwise(adapter)], sort_keys=True).encode()).hexdigest()


def _meant_otherwise(adapter: Adapter) -> list[str]:
    """What the release of peft that wrote an adapter took otherwise than today's, where that makes another change."""
    config, names = adapter.config, (*adapter.experts, *adapter.modules)
    is_square = any(len(set(stack[0].shape)) == 1 for stack in adapter.experts.values())
    found = ["turned"] if is_square and turns_stacks(config, False) else []
    then, now = (Scalings(adapter.root, config, age) for age in (None, ""))
    try:
        is_same = all(then.of(name) == now.of(name) for name in names)
    except AdapterError:  # today's rule meets a pattern or a number that is none
        is_same = False
    return found if is_same else [*found, age_of_patterns(config)]


def require_plain(adapter: Adapter, doing: str) -> None:
    """Refuse an adapter that does anything but add low-rank changes.

    Args:
        adapter: which.
        doing: a verb for the message.

    Raises:
        AdapterError: names what else it does.
    """
    others = {
        "a DoRA magnitude": adapter.magnitudes,
        "a trained bias": adapter.biases,
        "a tensor that replaces the base's": adapter.replaced,
        "trained token rows": adapter.tokens,
        "changes to stacked experts": adapter.experts,
    }
    for what, found in others.items():
        if found:
            raise AdapterError(
                f"{adapter.root}: cannot {doing} {what} ({min(found)}), only low-rank changes to whole weights",
                hint="merge it into its base instead",
            )


def _record(files: TensorFiles, key: str, read: dict[str, Array]) -> TensorRecord:
    """Read a tensor piece by piece; one that is a single piece stays in ``read``.

    Raises:
        AdapterError: of a type that no adapter has, or NaN or infinite.
    """
    spec = files.spec(key)
    if spec.dtype not in FLOATS:
        raise AdapterError(
            f"{files.root}: the tensor {key!r} ({spec.dtype}, {list(spec.shape)}) has an unsupported type",
            hint=f"the weights of an adapter must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}",
        )
    digest = xxhash.xxh3_128()
    for start in range(0, spec.count, _PIECE_ELEMENTS):
        piece = files.read_flat_array(key, start, min(_PIECE_ELEMENTS, spec.count - start))
        if not all_finite(piece):
            raise AdapterError(
                f"{files.root}: {key} holds NaN or infinity",
                hint="download or copy the adapter again, or train it again",
            )
        digest.update(bytes_of(piece))
        if piece.size == spec.count:
            read[key] = piece
    return TensorRecord.of(spec, digest.hexdigest(), ADAPTER_WEIGHTS_NAME)
