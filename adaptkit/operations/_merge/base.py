"""The base of a merge: a 16- or 32-bit checkpoint, or the 16-bit parent of a quantized one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.integrity import read_input_manifest
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, TensorRecord, parent_of, read_manifest, tensors_root
from adaptkit.checkpoint.place import is_unfinished
from adaptkit.checkpoint.quantization import hint_for_plain, is_released, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError, BaseMismatchError, CheckpointError, IntegrityError
from adaptkit.models.addressing import Slice
from adaptkit.operations._lineage.parents import Candidate
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._terms import expected_fingerprints

_EARLY = 3
"""Number of smallest weights that are compared first, so that a wrong base is an error before hours of work."""
_RIGHT = "give the right base, or add --allow-base-mismatch"
_ORIGINAL = "merge into the original 16-bit checkpoint, or add --allow-base-mismatch"


@dataclass(frozen=True)
class Base:
    """The checkpoint that adapters are merged into.

    Attributes:
        checkpoint: the 16- or 32-bit checkpoint.
        manifest: its manifest; None if there is none.
        expected: maps tensor names to (fingerprint, folder whose manifest records it).
        quantized: the quantized base whose parent ``checkpoint`` is; None if ``checkpoint`` itself was given.
        root: required ``tensors_root``, from its own manifest or the quantized base's; None if neither records it.
        given_root: ``tensors_root`` of the quantized base; None if ``checkpoint`` itself was given.
    """

    checkpoint: Checkpoint
    manifest: Manifest | None
    expected: Mapping[str, tuple[str, str]]
    quantized: Path | None = None
    root: str | None = None
    given_root: str | None = None


def open_base(path: Path, adapters: Sequence[Adapter], allow_mismatch: bool) -> Base:
    """Open the base of a merge, and compare its smallest weights with those that the adapters were trained on.

    For a quantized base, search the sibling folders for its 16-bit parent by the fingerprints of its tensors.

    Raises:
        BaseMismatchError: an adapter was trained on other weights; or the base was quantized and dequantized, and no
            manifest shows that the adapter was trained on the result.
        CheckpointError: malformed, or quantized and the parent was not found.
        IntegrityError: config.json does not match the base's manifest.
    """
    checkpoint = Checkpoint(path)
    expected = {} if allow_mismatch else expected_fingerprints(adapters)
    manifest = read_input_manifest(path)
    root = manifest.tensors_root if manifest else None
    if quantization_found(checkpoint) is not None:
        parent, named = _find_parent(checkpoint, manifest)
        wanted = named | _by_tensor(parent, expected)
        base = Base(parent, read_manifest(parent.root), wanted, path, _parent_root(manifest), root)
    else:
        base = Base(checkpoint, manifest, _by_tensor(checkpoint, expected), root=root)
        is_recorded = all(_recorded(a.manifest, a.root) or is_their_base(base, root or "", [a]) for a in adapters)
        if _was_dequantized(manifest) and not is_recorded and not allow_mismatch:
            raise BaseMismatchError(
                f"{path}: was quantized and dequantized; nothing says that the adapter was trained on these weights",
                hint=_ORIGINAL,
            )
    known = [name for name in base.expected if name in base.checkpoint.tensors]
    for name in sorted(known, key=lambda name: (base.checkpoint.spec(name).nbytes, name))[:_EARLY]:
        check_fingerprint(base, name, fingerprint_in_pieces(base.checkpoint, name))
    return base


def check_fingerprint(base: Base, name: str, found: str) -> None:
    """Refuse a tensor whose fingerprint is not the expected one, if there is one."""
    if name in base.expected and base.expected[name][0] != found:
        source = base.expected[name][1]
        came, hint = "trained on", _ORIGINAL if _was_dequantized(base.manifest) else _RIGHT
        if base.quantized is not None and source == str(base.quantized):
            came, hint = "quantized from", _parent_hint(base)  # --allow-base-mismatch does not skip this
        raise BaseMismatchError(f"{base.checkpoint.root}: {name} is not the tensor that {source} was {came}", hint=hint)


def merge_parents(
    base: Base, adapters: Sequence[Adapter], weights: Sequence[float], records: Sequence[TensorRecord]
) -> tuple[Parent, ...]:
    """Return the parents of a merged model; refuse a base whose tensors, ``records``, are not those of a manifest."""
    if base.root is not None and tensors_root(records) != base.root:
        if base.quantized is not None:
            raise BaseMismatchError(
                f"{base.checkpoint.root}: not all of its tensors are those that {base.quantized} was quantized from",
                hint=_parent_hint(base),
            )
        raise IntegrityError(
            f"{base.checkpoint.root}: its tensors do not match its manifest",
            hint=f"run adaptkit verify {base.checkpoint.root}",
        )
    given = zip(adapters, weights, strict=True)
    return (
        parent_of("base", base.manifest, records),
        *(parent_of("adapter", found.manifest, found.records, weight, root=found.root) for found, weight in given),
    )


def with_addresses(base: Base, edits: Edits) -> Base:
    """Return the base with the names in ``expected`` translated to those of its files.

    Raises:
        BaseMismatchError: an adapter was trained on a weight that the base does not have.
    """
    expected, missing = _in_files(base, base.expected, edits.addresses)
    if missing:
        raise BaseMismatchError(
            f"{base.checkpoint.root}: lacks {missing[0]}, which {base.expected[missing[0]][1]} was trained on",
            hint=_RIGHT,
        )
    return replace(base, expected=expected)


def changed_are_known(base: Base, edits: Edits, adapters: Sequence[Adapter]) -> bool:
    """Return whether each adapter's manifest records fingerprints of all weights it changes, and all are compared.

    Weights that it replaces are not counted: the result is the same with any base.
    """
    changes = [edit for edit in edits.of.values() if not edit.replaces]
    for number, adapter in enumerate(adapters):
        sources = {e.source for e in changes if any(step.adapter == number for step in e.steps)}
        named = _by_tensor(base.checkpoint, _recorded(adapter.manifest, adapter.root))
        own, _ = _in_files(base, named, [edits.addresses[number]])
        compared = {name for name in own if own[name][0] == base.expected.get(name, ("",))[0]}
        if not sources or not sources <= compared:
            return False
    return True


def is_their_base(base: Base, root: str, adapters: Sequence[Adapter]) -> bool:
    """Return whether every adapter's manifest names this base (its ``tensors_root``), or the quantized one given."""
    named = [adapter.manifest.parents if adapter.manifest else () for adapter in adapters]
    roots = [{parent.tensors_root for parent in parents if parent.role == "base"} for parents in named]
    return all(found & {root, base.given_root} for found in roots)


def _parent_hint(base: Base) -> str:
    which = f", whose tensors_root is {base.root}" if base.root else ""
    return f"give the 16-bit checkpoint that it was quantized from{which}"


def _was_dequantized(manifest: Manifest | None) -> bool:
    """Whether a checkpoint was made from a quantized one that had, unlike released ones, a 16-bit original."""
    if manifest is None or manifest.operation.get("name") != "dequantize":
        return False
    return not is_released(manifest.operation.get("options", {}).get("method"))


def _recorded(manifest: Manifest | None, root: Path) -> dict[str, tuple[str, str]]:
    """Map modules to (fingerprint of the original weight in the manifest, folder of the manifest)."""
    known = manifest.base_fingerprints() if manifest else {}
    return {module: (digest, str(root)) for module, digest in known.items()}


def _by_tensor(checkpoint: Checkpoint, expected: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    named = {}
    for module, found in expected.items():
        weight = f"{module}.weight"
        named[module if weight not in checkpoint.tensors and module in checkpoint.tensors else weight] = found
    return named


def _in_files(
    base: Base, named: Mapping[str, tuple[str, str]], addresses: Sequence[Mapping[str, tuple[Slice, ...]]]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Translate names of expected tensors to those of the base's files.

    Returns:
        The expected fingerprints, without those of parameters that are not exactly one tensor; and the names not found.
    """
    expected, missing = dict(named), []
    for name in [name for name in named if name not in base.checkpoint.tensors]:
        digest = expected.pop(name)
        places = [found.get(name) or found.get(name.removesuffix(".weight")) for found in addresses]
        whole = next((slices[0] for slices in places if slices and slices[0].expert is None), None)
        if whole is not None:
            expected[whole.name] = digest
        elif not any(places):
            missing.append(name)
    return expected, missing


def _find_parent(quantized: Checkpoint, manifest: Manifest | None) -> tuple[Checkpoint, dict[str, tuple[str, str]]]:
    """Find the checkpoint that a quantized one was made from, and the fingerprints that its weights must have."""
    root = quantized.root
    method = quantization_found(quantized)
    why = f"{root}: quantized with {method}; merging into so few bits would erase most of the adapter"
    if manifest is None or is_released(method):
        raise CheckpointError(why, hint=hint_for_plain(str(method), root, "merge into"))
    parent, wanted = _parent_root(manifest), _recorded(manifest, root)
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
        f"{why}, and the 16-bit checkpoint that it was quantized from was not found beside it", hint=hint
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
        named = _by_tensor(candidate, wanted)
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


def _parent_root(manifest: Manifest | None) -> str | None:
    """Return the ``tensors_root`` of what was quantized; after merging and quantizing in one run, the merged model."""
    parents = manifest.parents if manifest else ()
    roots = {parent.role: parent.tensors_root for parent in parents}
    return roots.get("merged", roots.get("base"))
