"""Read and write PEFT's adapter folders.

    adapter_config.json          peft_type, r, lora_alpha, patterns, target_modules, ...
    adapter_model.safetensors    the tensors; see ``_adapter_parts`` for their names

Every tensor is used exactly once; anything unknown or left over is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from adaptkit.checkpoint._adapter_lacking import no_configuration_error, no_weights_error
from adaptkit.checkpoint._adapter_parts import Changes, Parts, TokenRows
from adaptkit.checkpoint._adapter_writing import write_adapter
from adaptkit.checkpoint.adapter_config import check_config, is_saved, names_tied, writes_transposed_experts
from adaptkit.checkpoint.compensation import read_compensation
from adaptkit.checkpoint.hashing import bytes_of, fingerprint
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    COMPENSATION_NAME,
    is_adapter,
    read_json,
    require_folder,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorRecord, read_manifest
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.vocabulary import is_embedding_name, is_head
from adaptkit.errors import AdapterError, IntegrityError
from adaptkit.numerics import lora
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.spec import FLOATS

__all__ = ["Adapter", "TokenRows", "adapter_identity", "read_adapter", "require_plain", "write_adapter"]

_PIECE_ELEMENTS = 1 << 20
_CHECKED_FILES = {ADAPTER_CONFIG_NAME, COMPENSATION_NAME}
_NEUTRAL_KEYS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Keys of ``adapter_config.json`` that do not affect an adapter's changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter(Changes):
    """A LoRA adapter as stored in files.

    Attributes:
        root: the adapter's folder.
        config: ``adapter_config.json``.
        files: the adapter's tensors; tensors that replace a whole base tensor are read from here when needed.
        fan_in_fan_out: whether linear layers of the base store their weights transposed (GPT-2's Conv1D).
        compensation: maps a module to the initial change that compensates the quantization error of its base; empty
            for most adapters.
        manifest: None if another tool made the adapter.
        records: the tensors with their fingerprints.
        state: of the tensors' file when it was read; see ``TensorFiles.require_state``.
    """

    root: Path
    config: Mapping[str, Any]
    files: TensorFiles
    fan_in_fan_out: bool
    compensation: Mapping[str, LowRank]
    manifest: Manifest | None
    records: tuple[TensorRecord, ...]
    state: list[list[Any]]

    @cached_property
    def digests(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Maps a tensor's name to its ``TensorRecord.content``."""
        return {record.name: record.content for record in self.records}

    @property
    def ties_weights(self) -> bool:
        """Whether ``ensure_weight_tying`` made peft change embedding and head together.

        peft does so if ``modules_to_save`` or ``target_modules`` names ``embed_tokens`` or ``lm_head``; otherwise it
        warns and ties nothing. Trained tokens follow their own rules.
        """
        return bool(self.config.get("ensure_weight_tying")) and names_tied(self.root, self.config)

    def experts_for(self, parameter: str, matrix: tuple[int, ...], is_transposed: bool) -> tuple[LowRank, ...]:
        """Return the changes of a stack's matrices in the running model's orientation, transposing them if needed.

        Args:
            parameter: the stacked parameter's path.
            matrix: (out, in) of the running model's matrices; changes that fit neither way are returned unchanged.
            is_transposed: ``is_transposed`` of the model's experts module; decides the orientation of square matrices.
        """
        stack = self.experts[parameter]
        shape = stack[0].shape
        if shape[::-1] == matrix and (shape != matrix or writes_transposed_experts(self.config, is_transposed)):
            return tuple(lora.transposed(term) for term in stack)
        return stack

    @property
    def only_compensates(self) -> bool:
        """Whether the adapter still equals its initial compensation, so that it does not change the 16-bit base."""
        others = self.magnitudes or self.biases or self.replaced or self.tokens or self.experts
        return (
            bool(self.compensation)
            and not others
            and set(self.compensation) == set(self.modules)
            and all(is_equal(begun, self.modules[name]) for name, begun in self.compensation.items())
        )

    def manifest_mismatch(self) -> str:
        """Return what differs from the manifest in the configuration or compensation file; empty if nothing does."""
        listed = [record for record in (self.manifest.files if self.manifest else ()) if record.path in _CHECKED_FILES]
        return next(filter(None, (file_problem(self.root, record) for record in listed)), "")

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters.

        Base tensors that were merely saved along do not count; a tensor shared by embedding and tied head counts once.
        """
        terms = [*self.modules.values(), *(term for stack in self.experts.values() for term in stack)]
        whole: dict[Any, int] = {fingerprint(chosen.rows): chosen.rows.size for chosen in self.tokens.values()}
        for name, key in self.replaced.items():
            module, _, kind = name.rpartition(".")
            if is_saved(self.config, module) or (kind == "bias" and self.config.get("bias", "none") != "none"):
                in_vocabulary = is_embedding_name(module) or is_head(module)
                whole[self.digests[key] if in_vocabulary else name] = self.files.spec(key).count
        arrays = [
            *(half for term in terms for half in (term.a, term.b)),
            *self.magnitudes.values(),
            *self.biases.values(),
        ]
        return sum(array.size for array in arrays) + sum(whole.values())


def read_adapter(root: Path, *, changed: bool = False) -> Adapter:
    """Read an adapter.

    Args:
        root: the adapter's folder.
        changed: accept an adapter whose configuration differs from its manifest. Only for inspection: an artifact made
            from it would name the wrong parent.

    Raises:
        UsageError: not a folder.
        AdapterError: not a LoRA adapter, something unsupported, or tensors that do not fit together.
        CheckpointError: a malformed file.
        IntegrityError: the adapter changed while it was read, or its configuration or compensation file differs from
            its manifest.
    """
    if not is_adapter(require_folder(root)):
        raise no_configuration_error(root)
    config = read_json(root / ADAPTER_CONFIG_NAME)
    check_config(root, config)
    if not (root / ADAPTER_WEIGHTS_NAME).exists():
        raise no_weights_error(root)
    files = TensorFiles(root, [ADAPTER_WEIGHTS_NAME])
    if not files.tensors:
        raise AdapterError(
            f"{root}: the adapter contains no tensors", hint="download or copy it again, or train it again"
        )
    state = files.state()
    parts = Parts(config, files)  # before anything is read, since it refuses unknown names
    read: dict[str, Array] = {}
    records = tuple(_record(files, key, read) for key in files.tensors)
    changes = parts.take_all(records, read)
    files.require_state(state)  # otherwise fingerprints and changes could come from different tensors
    manifest = read_manifest(root)
    adapter = Adapter(
        root=root,
        config=config,
        files=files,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        compensation=read_compensation(root, changes.modules, manifest),
        manifest=manifest,
        records=records,
        state=state,
        **vars(changes),
    )
    if not changed and (problem := adapter.manifest_mismatch()):
        raise IntegrityError(
            f"{root}: {problem}",
            hint=f"restore it; or, to use it as it is now, copy the folder without {MANIFEST_NAME}",
        )
    return adapter


def adapter_identity(adapter: Adapter) -> str:
    """Return a sha256 over what determines an adapter's changes besides its tensors: configuration and compensation."""
    config = {key: value for key, value in adapter.config.items() if key not in _NEUTRAL_KEYS}
    begun = {
        name: [fingerprint(term.a), fingerprint(term.b), term.scaling] for name, term in adapter.compensation.items()
    }
    is_square = any(len(set(stack[0].shape)) == 1 for stack in adapter.experts.values())
    rule = ["turned"] if is_square and writes_transposed_experts(adapter.config, False) else []
    return hashlib.sha256(json.dumps([config, begun, *rule], sort_keys=True).encode()).hexdigest()


def require_plain(adapter: Adapter, doing: str) -> None:
    """Reject an adapter that does anything but add low-rank changes to whole weights.

    Args:
        adapter: the adapter to check.
        doing: verb for the message: "cannot <doing> ...".

    Raises:
        AdapterError: names what else the adapter changes.
    """
    others: dict[str, Mapping[str, object]] = {
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
    """Fingerprint a tensor, reading it piece by piece; a tensor that fits in one piece is added to ``read``, flat.

    Raises:
        AdapterError: the tensor has an unsupported type, or contains NaN or infinity.
    """
    spec = files.spec(key)
    if spec.dtype not in FLOATS:
        raise AdapterError(
            f"{files.root}: the tensor {key!r} ({spec.dtype}, {list(spec.shape)}) has an unsupported type",
            hint=f"the weights of an adapter must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}",
        )
    digest = xxhash.xxh3_128()
    for start in range(0, spec.count, _PIECE_ELEMENTS):
        piece = files.read_flat(key, start, min(_PIECE_ELEMENTS, spec.count - start))
        if not all_finite(piece):
            raise AdapterError(
                f"{files.root}: {key} holds NaN or infinity",
                hint="download or copy the adapter again, or train it again",
            )
        digest.update(bytes_of(piece))
        if piece.size == spec.count:
            read[key] = piece
    return TensorRecord.of(spec, digest.hexdigest(), ADAPTER_WEIGHTS_NAME)
