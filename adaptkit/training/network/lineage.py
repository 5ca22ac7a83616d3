"""What was made from what, by manifests and fingerprints: whether an adapter belongs to a base, and which it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.hashing import fingerprint_in_pieces, tensors_root
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, UsageError

_COMPARED = 3
"""How many weights that no manifest speaks of are compared, the smallest first: enough to tell models apart."""


def check_base(adapter: Adapter, base: Path) -> None:
    """Compare what an adapter says it was trained on with a base, as far as both say anything.

    An adapter that was trained on a quantized base also belongs to the 16-bit base of the same weights, unless it makes
    up for that quantization.

    Raises:
        BaseMismatchError: a weight differs, or is not there; names it.
    """
    manifest = read_manifest(base)
    known = manifest.known_weights() if manifest else {}
    checkpoint = Checkpoint(base)
    for expected in _comparable(adapter, checkpoint, known):
        found = known.get(expected.module)
        if found is None:
            differs = expected.base_xxh3_128 != fingerprint_in_pieces(checkpoint, f"{expected.module}.weight")
            differs |= bool(adapter.compensation)  # for a quantization that is not here
        else:
            differs = None not in (found.base_xxh3_128, expected.base_xxh3_128) and (
                found.base_xxh3_128 != expected.base_xxh3_128
            )
            differs |= bool(adapter.compensation) and found.quantized_root != expected.quantized_root
        if differs:
            raise BaseMismatchError(
                f"{adapter.root}: belongs to another base than {base}: {expected.module} differs",
                hint="give the base that it was trained on",
            )


def base_of(adapter: Adapter, bases: Sequence[Path]) -> Path:
    """Which of several bases an adapter was trained on.

    Raises:
        BaseMismatchError: on none of them.
        UsageError: it has no manifest that would say.
    """
    if len(bases) == 1:
        check_base(adapter, bases[0])
        return bases[0]
    if adapter.manifest is None:
        raise UsageError(
            f"{adapter.root}: has no manifest that says which of the {len(bases)} bases it belongs to",
            hint="measure it with its base alone",
        )
    named = parent_among(adapter.manifest, bases)
    if named is not None:
        return named
    fitting = []
    for base in bases:
        try:
            check_base(adapter, base)
        except BaseMismatchError:
            continue
        fitting.append(base)
    if not fitting:
        raise BaseMismatchError(
            f"{adapter.root}: belongs to none of {', '.join(map(str, bases))}", hint="give its base too: --base"
        )
    return fitting[0]


def parent_among(manifest: Manifest | None, bases: Sequence[Path]) -> Path | None:
    """The base that a manifest names as what its artifact was made from, if it is among these."""
    parents = [parent for parent in (manifest.parents if manifest else ()) if parent.role == "base"]
    for base in bases if parents else ():
        own = read_manifest(base)
        root = own.tensors_root if own else None
        for parent in parents:
            if own is None and parent.manifest_sha256 is None:
                root = root or _root_of(base)
            if (own is not None and parent.manifest_sha256 == own.sha256) or parent.tensors_root == root:
                return base
    return None


def trained_parameters(base: Path, adapter: Adapter | None, total: int) -> int | None:
    """How many parameters were trained: an adapter's, or all of a checkpoint that adaptkit trained; None if unknown."""
    if adapter is not None:
        return sum(adapter.files.spec(name).count for name in adapter.files.tensors)
    trained = _training_options(read_manifest(base))
    return total if trained is not None and trained.get("method") == "full" else None


def template_kwargs(base: Path, adapter: Adapter | None) -> dict[str, Any] | None:
    """The ``chat_template_kwargs`` that an adapter or a checkpoint was trained with; None if adaptkit did not."""
    trained = _training_options(adapter.manifest if adapter is not None else read_manifest(base))
    if trained is None:
        return None
    given = trained.get("chat_template_kwargs")
    return dict(given) if isinstance(given, Mapping) else {}


def _training_options(manifest: Manifest | None) -> Mapping[str, Any] | None:
    """Of the run that made an artifact; None if none did."""
    if manifest is None or manifest.operation.get("name") != "train":
        return None
    options: Mapping[str, Any] = manifest.operation.get("options", {})
    return options


def _comparable(adapter: Adapter, checkpoint: Checkpoint, known: Mapping[str, Target]) -> list[Target]:
    """What an adapter was trained on that can be compared: all that the base's manifest knows, and small weights."""
    targets = adapter.manifest.targets if adapter.manifest else ()
    sizes = {}
    for target in targets:
        name = f"{target.module}.weight"
        readable = target.module not in known and target.base_xxh3_128 is not None and name in checkpoint.tensors
        if readable and checkpoint.spec(name).shape == target.shape:  # a packed weight has another shape
            sizes[target.module] = checkpoint.spec(name).nbytes
    smallest = sorted(sizes, key=lambda module: (sizes[module], module))[:_COMPARED]
    return [target for target in targets if target.module in known or target.module in smallest]


def _root_of(base: Path) -> str:
    checkpoint = Checkpoint(base)
    records = [
        TensorRecord(name, "", located.spec.dtype, located.spec.shape, fingerprint_in_pieces(checkpoint, name))
        for name, located in checkpoint.tensors.items()
    ]
    return tensors_root(records)
