"""Find the 16-bit checkpoint that a quantized one was made from, among the folders beside it, by fingerprints."""

from collections.abc import Mapping
from pathlib import Path

from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, read_manifest
from adaptkit.checkpoint.place import is_unfinished
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError, CheckpointError
from adaptkit.operations._lineage.parents import Candidate

_ON_TRAINED = "add --onto trained --format plain, to merge into its decoded values and keep 16 bits"


def was_quantized(manifest: Manifest | None) -> bool:
    """Whether adaptkit made a quantized checkpoint, which then had an original."""
    return manifest is not None and manifest.kind == "quantized"


def recorded(manifest: Manifest | None, root: Path) -> dict[str, tuple[str, str]]:
    """Map modules to (fingerprint of the original weight in the manifest, folder of the manifest)."""
    known = manifest.base_fingerprints() if manifest else {}
    return {module: (digest, str(root)) for module, digest in known.items()}


def by_tensor(checkpoint: Checkpoint, expected: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return what is expected of modules by the names of their weights in a checkpoint."""
    named = {}
    for module, found in expected.items():
        weight = f"{module}.weight"
        named[module if weight not in checkpoint.tensors and module in checkpoint.tensors else weight] = found
    return named


def find_original(quantized: Checkpoint, manifest: Manifest | None) -> tuple[Checkpoint, dict[str, tuple[str, str]]]:
    """Find the checkpoint that a quantized one was made from, and the fingerprints that its weights must have."""
    root = quantized.root
    method = quantization_found(quantized)
    why = f"{root}: quantized with {method}; merging into so few bits would erase most of the adapter"
    if manifest is None or not was_quantized(manifest):
        raise CheckpointError(f"{why}, and no manifest names its original", hint=_ON_TRAINED)
    parent, wanted = parent_root(manifest), recorded(manifest, root)
    folders = [path for path in sorted(root.resolve().parent.iterdir()) if path != root.resolve()]
    fitting = [found for path in folders if wanted and (found := _possible_parent(path, wanted, parent)) is not None]
    if parent is None:  # a partial pull, whose manifest names no base: also compare the tensors left unquantized
        kept = {tensor.name: (tensor.xxh3_128, str(root)) for tensor in manifest.tensors}
        fitting = [(c, {name: kept[name] for name in c.tensors if name in kept} | named) for c, named in fitting]
    if len(fitting) > 1:  # e.g. a model and its fine-tune, which can share tensors: compare all tensors
        fitting = [(c, named) for c, named in fitting if _is_parent(c, named, parent)]
    if fitting:
        return fitting[0]
    hint = "merge into that checkpoint" + (f", whose tensors_root is {parent}" if parent else "")
    if any(other.role == "release" for other in manifest.parents):
        hint = f"run: adaptkit dequantize RELEASE -o PLAIN, with what {root} was made from; then merge into PLAIN"
    raise CheckpointError(
        f"{why}, and the 16-bit checkpoint that it was quantized from was not found beside it",
        hint=f"{hint}; or {_ON_TRAINED}",
    )


def _possible_parent(
    folder: Path, wanted: Mapping[str, tuple[str, str]], root: str | None
) -> tuple[Checkpoint, dict[str, tuple[str, str]]] | None:
    """Return the checkpoint in a folder and its expected fingerprints; None if it cannot be the parent.

    Only the smallest expected weight is compared, and ``tensors_root`` if the folder has a manifest.
    """
    try:
        if is_unfinished(folder) or not (folder / CONFIG_NAME).is_file():
            return None
        candidate, manifest = Checkpoint(folder), read_manifest(folder)
        if quantization_found(candidate) is not None:
            return None
        named = by_tensor(candidate, wanted)
        if not set(named) <= set(candidate.tensors) or (manifest and root not in (None, manifest.tensors_root)):
            return None
        smallest = min(named, key=lambda name: (candidate.spec(name).nbytes, name))
        return (candidate, named) if fingerprint_in_pieces(candidate, smallest) == named[smallest][0] else None
    except (AdaptkitError, OSError):  # an unrelated folder, perhaps malformed or unreadable
        return None


def _is_parent(checkpoint: Checkpoint, named: Mapping[str, tuple[str, str]], root: str | None) -> bool:
    """Return whether all tensors match the parent's root; if that is unknown, all tensors with a known fingerprint."""
    if root is not None:
        return Candidate(checkpoint.root, read_manifest(checkpoint.root), is_adapter=False).root == root
    return all(fingerprint_in_pieces(checkpoint, name) == digest for name, (digest, _) in named.items())


def parent_root(manifest: Manifest | None) -> str | None:
    """Return the ``tensors_root`` of what was quantized; after merging and quantizing in one run, the merged model."""
    parents = manifest.parents if manifest else ()
    roots = {parent.role: parent.tensors_root for parent in parents}
    return roots.get("merged", roots.get("base"))
