"""Say what a folder is: checkpoint, quantized base, adapter or merged model; sizes, types, where it comes from."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import is_adapter, read_adapter
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.quantized import quantized_names, read_quantized
from adaptkit.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class InspectReport:
    """What a folder holds.

    Attributes:
        path: folder.
        kind: checkpoint, quantized, adapter or merged.
        tensors: number of them.
        parameters: of the model, or of the adapter.
        bytes: of tensors.
        dtypes: type -> number of tensors.
        details: facts of this kind: architecture; rank, scaling and modules; block size.
        manifest_sha256: None without a manifest.
        tensors_root: None without a manifest.
        parents: as the manifest names them.
    """

    path: str
    kind: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    details: dict[str, Any]
    manifest_sha256: str | None
    tensors_root: str | None
    parents: tuple[dict[str, Any], ...]


def inspect(path: Path) -> InspectReport:
    """Describe a folder from headers and manifest; only an adapter's weights are read.

    Raises:
        UsageError: not a folder.
        CheckpointError, AdapterError: malformed, or neither a checkpoint nor an adapter.
        IntegrityError: the manifest is malformed.
    """
    require_folder(path)
    manifest = read_manifest(path)
    if is_adapter(path):
        adapter = read_adapter(path)
        kind, dtypes = "adapter", Counter(record.dtype for record in adapter.records)
        parameters = sum(t.lora_a.numel() + t.lora_b.numel() for t in adapter.modules.values())
        size = sum(t.lora_a.nbytes + t.lora_b.nbytes for t in adapter.modules.values())
        details = {
            "modules": len(adapter.modules),
            "ranks": sorted({term.rank for term in adapter.modules.values()}),
            "scalings": sorted({term.scaling for term in adapter.modules.values()}),
            "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        }
    else:
        checkpoint = Checkpoint(path)
        specs = [located.spec for located in checkpoint.tensors.values()]
        names = quantized_names(checkpoint)
        weights = {name: read_quantized(checkpoint, name) for name in names[:1]}
        parameters = sum(spec.count for spec in specs)
        if names:
            codes = set(names)
            parameters = sum(
                2 * spec.count if spec.name in codes else spec.count
                for spec in specs
                if spec.name in codes or not any(spec.name.startswith(f"{name}.") for name in names)
            )
        kind = "quantized" if names or checkpoint.quantization_method else "checkpoint"
        dtypes, size = Counter(spec.dtype for spec in specs), sum(spec.nbytes for spec in specs)
        details = {
            "architecture": checkpoint.config.get("architectures"),
            "files": len(checkpoint.headers),
            "quantization": checkpoint.quantization_method,
            "quantized_matrices": len(names),
            "block_size": next((weight.block_size for weight in weights.values()), None),
        }
    return InspectReport(
        path=str(path),
        kind=manifest.kind if manifest else kind,
        tensors=sum(dtypes.values()),
        parameters=parameters,
        bytes=size,
        dtypes=dict(sorted(dtypes.items())),
        details=details,
        manifest_sha256=manifest.sha256 if manifest else None,
        tensors_root=manifest.tensors_root if manifest else None,
        parents=tuple(
            {k: v for k, v in asdict(parent).items() if v is not None} for parent in manifest.parents
        ) if manifest else (),
    )  # fmt: skip
