"""The base of a merge: a 16- or 32-bit checkpoint, the 16-bit parent of a quantized one, or its decoded values."""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.integrity import file_problem, read_input_manifest, size_problem
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    Parent,
    Target,
    TensorRecord,
    parent_of,
    read_manifest,
    tensors_root,
)
from adaptkit.checkpoint.quantization import is_released, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, IntegrityError, UsageError
from adaptkit.models.addressing import Slice
from adaptkit.models.base_weights import Weights, check_base
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.original import by_tensor, find_original, parent_root, recorded, was_quantized
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._terms import expected_fingerprints
from adaptkit.operations.options import MergeOptions

_EARLY = 3
"""Number of smallest weights that are compared first, so that a wrong base is an error before hours of work."""
_RIGHT = "give the right base, or add --allow-base-mismatch"
_ORIGINAL = "merge into the original 16-bit checkpoint, or add --allow-base-mismatch"


@dataclass(frozen=True)
class Base:
    """The checkpoint that adapters are merged into.

    Attributes:
        checkpoint: the 16- or 32-bit checkpoint; a ``DecodedCheckpoint`` if it is a quantized one's own values.
        manifest: its manifest; None if there is none.
        expected: maps tensor names to (fingerprint, folder whose manifest records it).
        quantized: the quantized base whose parent ``checkpoint`` is; None if ``checkpoint`` itself was given.
        root: required ``tensors_root``, from its own manifest or the quantized base's; None if neither records it.
        given_root: ``tensors_root`` of the quantized base; None if ``checkpoint`` itself was given.
        is_trained_on: whether it has the values of a quantized checkpoint: those with which adapters were trained, so
            that their compensation stays in.
        is_compared: whether all weights that the adapters' manifests name were compared when it was opened.
        other: of the original and the quantized base's own values, the one that is not merged into, if it was found.
    """

    checkpoint: Checkpoint
    manifest: Manifest | None
    expected: Mapping[str, tuple[str, str]]
    quantized: Path | None = None
    root: str | None = None
    given_root: str | None = None
    is_trained_on: bool = False
    is_compared: bool = False
    other: Checkpoint | None = None

    @property
    def decoded(self) -> DecodedCheckpoint | None:
        """The checkpoint if it is decoded while it is read."""
        return self.checkpoint if isinstance(self.checkpoint, DecodedCheckpoint) else None

    @property
    def onto(self) -> str:
        """What is merged into, as ``MergeOptions.onto`` calls it; empty if a base that is not quantized was given."""
        return "trained" if self.decoded else "original" if self.quantized else ""


def open_base(path: Path, adapters: Sequence[Adapter], options: MergeOptions) -> Base:
    """Open the base of a merge, and compare its smallest weights with those that the adapters were trained on.

    For a quantized base, unless ``options.onto`` is ``trained``, search the sibling folders for its 16-bit parent by
    the fingerprints of its tensors; one that was released so has none.

    Raises:
        BaseMismatchError: an adapter was trained on other weights; or the base was quantized and dequantized, and no
            manifest shows that the adapter was trained on the result.
        CheckpointError: malformed, or quantized and the parent was not found.
        IntegrityError: config.json does not match the base's manifest.
        UsageError: the options do not fit a base that is not quantized.
    """
    checkpoint = Checkpoint(path)
    expected = {} if options.allow_base_mismatch else expected_fingerprints(adapters)
    manifest = read_input_manifest(path)
    method = quantization_found(checkpoint)
    if method is None:
        base = _open_plain(checkpoint, manifest, expected, adapters, options)
    elif options.onto == "trained" or (options.onto is None and not was_quantized(manifest) and is_released(method)):
        base = _open_decoded(checkpoint, manifest, expected, adapters, options)
    else:
        parent, named = find_original(checkpoint, manifest)
        wanted = named | by_tensor(parent, expected)
        given_root = manifest.tensors_root if manifest else None
        own = DecodedCheckpoint(checkpoint)
        base = Base(parent, read_manifest(parent.root), wanted, path, parent_root(manifest), given_root, other=own)
    known = [name for name in base.expected if name in base.checkpoint.tensors]
    for name in sorted(known, key=lambda name: (base.checkpoint.spec(name).nbytes, name))[:_EARLY]:
        check_fingerprint(base, name, fingerprint_in_pieces(base.checkpoint, name))
    return base


def _open_plain(
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    expected: Mapping[str, tuple[str, str]],
    adapters: Sequence[Adapter],
    options: MergeOptions,
) -> Base:
    """Open a base that is not quantized: perhaps the dequantized form of the one that adapters were trained on."""
    if options.onto is not None:
        raise UsageError(f"onto: {checkpoint.root} is not quantized, so there is one answer", hint="leave out --onto")
    root, before = manifest.tensors_root if manifest else None, parent_root(manifest)
    base = Base(checkpoint, manifest, by_tensor(checkpoint, expected), root=root)
    if _is_decoded(manifest) and is_their_base(replace(base, given_root=before), "", adapters):
        return replace(base, expected={}, given_root=before, is_trained_on=True)
    if not _was_dequantized(manifest) or options.allow_base_mismatch:
        return base
    if not all(recorded(a.manifest, a.root) or is_their_base(base, root or "", [a]) for a in adapters):
        raise BaseMismatchError(
            f"{checkpoint.root}: was quantized and dequantized; nothing says that the adapter was trained on these "
            "weights",
            hint=_ORIGINAL,
        )
    return base


def _open_decoded(
    stored: Checkpoint,
    manifest: Manifest | None,
    expected: Mapping[str, tuple[str, str]],
    adapters: Sequence[Adapter],
    options: MergeOptions,
) -> Base:
    """Open a quantized base to merge into its own values, and compare its parts with those that adapters know."""
    decoded = DecodedCheckpoint(stored)
    turned = [name for name, w in decoded.weights.items() if w.is_linear and stores_transposed(stored, name)]
    if turned:
        raise CheckpointError(
            f"{stored.root}: the 16-bit form of {turned[0]} is transposed",
            hint=f"run: adaptkit dequantize {shlex.quote(str(stored.root))} -o PLAIN; then merge into PLAIN",
        )
    weights = Weights(stored.root)
    fits = [] if options.allow_base_mismatch else [check_base(adapter, weights) for adapter in adapters]
    named = {name: what for name, what in by_tensor(decoded, expected).items() if name not in decoded.weights}
    original = None
    with contextlib.suppress(CheckpointError):  # it is only compared with
        original, _ = find_original(stored, manifest)
    root = manifest.tensors_root if manifest else None
    compared = bool(fits) and all(fit.is_whole for fit in fits)
    return Base(decoded, manifest, named, root=root, is_trained_on=True, other=original, is_compared=compared)


def check_listed_files(base: Base) -> None:
    """Refuse a base with files that ``unmerge`` would have to restore but that do not match its manifest.

    Shards are compared when they are read; of other safetensors files only the size is compared here.
    """
    root = base.checkpoint.root
    for record in base.manifest.files if base.manifest else ():
        compare = size_problem if record.path.endswith(".safetensors") else file_problem
        if record.path not in base.checkpoint.headers and (problem := compare(root, record)):
            raise IntegrityError(f"{root}: {problem}", hint=f"restore the file, or remove {MANIFEST_NAME}")


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


def targets_of(base: Base, edits: Edits, records: Mapping[str, TensorRecord]) -> tuple[Target, ...]:
    """Return the base's weights that a merge changed, given the records of its stored tensors by name."""
    targets = []
    for name, edit in edits.of.items():
        if base.decoded is not None and name in base.decoded.weights:
            digest, root = None, tensors_root(records[part] for part in base.decoded.parts(name))
        elif name in records:
            digest, root = records[name].xxh3_128, None
        else:  # an added tensor
            continue
        targets.append(Target(name.removesuffix(".weight"), edit.base_shape, digest, root))
    return tuple(targets)


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
    if base.is_compared:
        return True
    changes = [edit for edit in edits.of.values() if not edit.replaces]
    for number, adapter in enumerate(adapters):
        sources = {e.source for e in changes if any(step.adapter == number for step in e.steps)}
        named = by_tensor(base.checkpoint, recorded(adapter.manifest, adapter.root))
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
    if manifest is None or not _is_decoded(manifest):
        return False
    return not is_released(manifest.operation.get("options", {}).get("method"))


def _is_decoded(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.operation.get("name") == "dequantize"


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
