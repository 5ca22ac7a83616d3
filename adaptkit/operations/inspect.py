"""Describe a folder: checkpoint, quantized base, adapter or merged model; its sizes, dtypes and origin."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, as_paths
from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.foreign import pickled_weights
from adaptkit.checkpoint.integrity import size_problem
from adaptkit.checkpoint.layout import has_checkpoint, is_adapter, require_folder
from adaptkit.checkpoint.manifest import FileRecord, Manifest, read_manifest, require_manifest, tensors_root
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.quantization import is_released, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.formats._blockwise import BlockwiseWeight
from adaptkit.formats._find import stored_weights
from adaptkit.formats._stored import StoredWeight
from adaptkit.operations._lineage.tree import Ancestor, Lineage
from adaptkit.operations._roles import expert_count
from adaptkit.operations._threads import thread_count
from adaptkit.wording import counted, first_few


@dataclass(frozen=True)
class InspectReport:
    """What a folder holds.

    Attributes:
        path: folder.
        kind: checkpoint, quantized, adapter or merged.
        tensors: number of tensors.
        parameters: number of the model's or adapter's parameters; None if another tool's format does not show it.
        bytes: size of all tensors.
        dtypes: dtype -> number of tensors.
        details: facts that depend on the kind: architecture, formats and block sizes of a checkpoint; ranks, scalings
            and other changes of an adapter; what ``unmerge`` needs for a merged model; what was not read; what
            of an adapter is not as its manifest says.
        manifest_sha256: None without a manifest.
        tensors_root: None without a manifest.
        parents: as the manifest names them.
        lineage: parents and their ancestors, as far as they were found; empty unless asked for.
    """

    path: str
    kind: str
    tensors: int
    parameters: int | None
    bytes: int
    dtypes: dict[str, int]
    details: dict[str, Any]
    manifest_sha256: str | None
    tensors_root: str | None
    parents: tuple[dict[str, Any], ...]
    lineage: tuple[Ancestor, ...] = ()


def inspect(path: AnyPath) -> InspectReport:
    """Describe a folder from headers, quantization states and manifest; weights are read only from an adapter.

    Raises:
        UsageError: not a folder.
        CheckpointError, AdapterError: malformed, or neither a checkpoint nor an adapter.
        IntegrityError: the manifest is malformed.
    """
    path = as_path(path, "path")
    require_folder(path)
    manifest = read_manifest(path)
    found = _adapter(path) if is_adapter(path) else _checkpoint(Checkpoint(path))
    merged = _describe_merged(path, manifest) if manifest and manifest.operation.get("name") == "merge" else {}
    return InspectReport(
        path=str(path),
        kind=manifest.kind if manifest else found.kind,
        tensors=sum(found.dtypes.values()),
        parameters=found.parameters,
        bytes=found.nbytes,
        dtypes=dict(sorted(found.dtypes.items())),
        details=found.details | merged,
        manifest_sha256=manifest.sha256 if manifest else None,
        tensors_root=manifest.tensors_root if manifest else None,
        parents=tuple(
            {k: v for k, v in asdict(parent).items() if v is not None}
            for parent in (manifest.parents if manifest else ())
        ),
    )


def trace(
    path: AnyPath, parents: AnyPath | Sequence[AnyPath], progress: Progress = no_progress
) -> tuple[Ancestor, ...]:
    """Find the ancestors of an artifact by their hashes.

    Weights are read only from folders without a manifest, and from adapters that their hashes do not tell apart.

    Args:
        path: folder.
        parents: folders to search, each an artifact or a folder of several.
        progress: called with bytes read.

    Raises:
        UsageError: a folder holds no artifacts.
        IntegrityError: the artifact has no manifest, or a malformed one.
    """
    path = as_path(path, "path")
    parents = as_paths(parents, "parents")
    manifest = require_manifest(require_folder(path))
    return Lineage(parents, check=False, threads=thread_count(None), progress=progress).ancestors(path, manifest)


@dataclass(frozen=True)
class _Found:
    kind: str
    dtypes: Counter[str]
    parameters: int | None
    nbytes: int
    details: dict[str, Any]


def _adapter(path: Path) -> _Found:
    adapter = read_adapter(path, changed=True)
    return _Found(
        kind="adapter",
        dtypes=Counter(record.dtype for record in adapter.records),
        parameters=adapter.trained_parameters,
        nbytes=adapter.files.nbytes,
        details=_describe_adapter(adapter)
        | _not_read(path, *(["the checkpoint in the same folder"] if has_checkpoint(path) else []))
        | {"unlike_manifest": _unlike_manifest(adapter)},
    )


def _unlike_manifest(adapter: Adapter) -> str | None:
    """Return what of an adapter is not as its manifest says; None if nothing is, or if there is no manifest."""
    if adapter.manifest is not None and adapter.manifest.tensors_root != tensors_root(adapter.records):
        return "its tensors"
    return adapter.manifest_mismatch() or None


def _checkpoint(checkpoint: Checkpoint) -> _Found:
    specs = {name: located.spec for name, located in checkpoint.tensors.items()}
    method = quantization_found(checkpoint)
    config = checkpoint.config
    details: dict[str, Any] = {
        "architecture": config.get("architectures"),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "vocabulary": config.get("vocab_size"),
        "tied_head": config.get("tie_word_embeddings"),
        "experts": expert_count(config),
        "files": len(checkpoint.headers),
        "quantization": method,
    }
    weights = _stored_weights(checkpoint, method)
    parts = {part for weight in weights for part in weight.parts}
    inside = sum(math.prod(weight.shape) for weight in weights)
    parameters = inside + sum(spec.count for name, spec in specs.items() if name not in parts)
    if weights:
        needed = parts - {part for weight in weights for part in weight.input_scales}
        details |= {
            "quantized_matrices": len(weights),
            "quantized_stacks": sum(len(weight.shape) == 3 for weight in weights) or None,
            "quantized_parameters": inside,
            "bits_per_quantized_parameter": round(8 * sum(specs[part].nbytes for part in needed) / max(1, inside), 3),
        }
    if encodings := [weight.encoding for weight in weights if isinstance(weight, BlockwiseWeight)]:
        details |= {
            "formats": _counts(encoding.format for encoding in encodings),
            "block_sizes": _counts(encoding.block_size for encoding in encodings),
            "constants": _counts("nested" if encoding.double_quant else "float32" for encoding in encodings),
        }
    return _Found(
        kind="quantized" if method else "checkpoint",
        dtypes=Counter(spec.dtype for spec in specs.values()),
        parameters=None if method and not weights else parameters,
        nbytes=sum(spec.nbytes for spec in specs.values()),
        details=details | _not_read(checkpoint.root),
    )


def _stored_weights(checkpoint: Checkpoint, method: str | None) -> list[StoredWeight]:
    """Return the quantized weights; none of a malformed release, since what is wrong is for ``dequantize`` to say."""
    try:
        return stored_weights(checkpoint, method) if method else []
    except CheckpointError:
        if is_released(method):
            return []
        raise


def _not_read(path: Path, *others: str) -> dict[str, str | None]:
    """Return which weights in the folder the report does not cover, although another program may load them instead."""
    return {"not_read": first_few([*others, *pickled_weights(path)]) or None}


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return facts about an adapter in display order; None for what it does not have."""
    terms = [*adapter.modules.values(), *(term for stack in adapter.experts.values() for term in stack)]
    config = adapter.config
    return {
        "modules": len(adapter.modules),
        "ranks": _counts(term.rank for term in terms),
        "scalings": _counts(str(term.scaling) for term in terms),
        "rslora": bool(config.get("use_rslora")),
        "targets": _counts(module.rpartition(".")[2] for module in (*adapter.modules, *adapter.experts)),
        "embeddings": len(adapter.embeddings) or None,
        "dora_magnitudes": len(adapter.magnitudes) or None,
        "added_biases": len(adapter.biases) or None,
        "replaced_tensors": _counts(".".join(name.split(".")[-2:]) for name in adapter.replaced) or None,  # norm.weight
        "replaced_rows": {module: len(rows.indices) for module, rows in sorted(adapter.tokens.items())} or None,
        "expert_stacks": _counts(len(stack) for stack in adapter.experts.values()) or None,
        "own_copies_of_the_base": len(adapter.base_copies) or None,
        "compensated_modules": len(adapter.compensation) or None,
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "peft_version": config.get("peft_version"),
    }


def _counts(values: Iterable[str | int]) -> dict[str, int]:
    """Count each value, sorted; keys become strings, as JSON requires."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _describe_merged(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Return facts about the result of a merge; nothing is hashed, since ``verify`` does that.

    Raises:
        UnsafeInputError: the manifest names a file outside the folder.
    """
    adapters = sum(parent.role == "adapter" for parent in manifest.parents)
    if manifest.kind != "merged":
        return {"merged_adapters": adapters, "unmerge": f"no: the result of the merge is {manifest.kind}"}
    record = [file for file in manifest.files if file.path.startswith(f"{undo.FOLDER}/")]
    copies = [file for file in manifest.files if file.path.startswith(undo.ADAPTERS_PREFIX)]
    is_recoded = manifest.operation.get("options", {}).get("values") == "recoded"
    return {
        "merged_adapters": adapters,
        "changed_tensors": len(manifest.targets),
        "undo_record_bytes": sum(file.size for file in record) or None,
        "adapter_copies": len({file.path.split("/")[1] for file in copies}) or None,
        "unmerge": _can_be_unmerged(root, 0 if copies or is_recoded else adapters, record, copies),
    }


def _can_be_unmerged(root: Path, adapters: int, record: Sequence[FileRecord], copies: Sequence[FileRecord]) -> str:
    missing = [file.path for file in (*record, *copies) if size_problem(root, file)]
    if missing:
        return f"no: {min(missing)} is missing or has the wrong size"
    if not record:
        return "no: there is no undo record"
    return f"exactly; needs {counted(adapters, 'merged adapter') if adapters else 'nothing else'}"
