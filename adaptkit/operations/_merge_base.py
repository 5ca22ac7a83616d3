"""The base of a merge: what may be merged onto, and the 16-bit parent of what may not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError, BaseMismatchError, CheckpointError
from adaptkit.operations._terms import expected_fingerprints

_EARLY = 3
"""How many of the smallest weights are compared before anything is written."""


@dataclass(frozen=True)
class Base:
    """What is merged onto.

    Attributes:
        checkpoint: 16- or 32-bit.
        manifest: of it.
        expected: by tensor name, (fingerprint, who says so).
        found_for: the quantized base that was given instead; None if this one was given.
    """

    checkpoint: Checkpoint
    manifest: Manifest | None
    expected: Mapping[str, tuple[str, str]]
    found_for: Path | None = None


def open_base(path: Path, adapters: Sequence[Adapter], allow_mismatch: bool) -> Base:
    """Open the base of a merge, and compare a little of it.

    Of a quantized base the 16-bit parent is looked for in the folders beside it, by its tensors' fingerprints.

    Raises:
        BaseMismatchError: an adapter was trained on other weights; or on one that was quantized in between.
        CheckpointError: malformed, or quantized and the parent is not there.
    """
    checkpoint = Checkpoint(path)
    expected = {} if allow_mismatch else expected_fingerprints(adapters)
    manifest = read_manifest(path)
    if quantization_found(checkpoint) is not None:
        parent, named = _find_parent(checkpoint, manifest)
        base = Base(parent, read_manifest(parent.root), named | _by_tensor(parent, expected), path)
    else:
        base = Base(checkpoint, manifest, _by_tensor(checkpoint, expected))
        operation = manifest.operation.get("name") if manifest else None
        if operation == "dequantize" and not allow_mismatch:
            raise BaseMismatchError(
                f"{path}: was quantized and turned back; its weights stand on so few values that what an adapter adds "
                "is not what it was trained to add",
                hint="merge onto the 16-bit checkpoint that was quantized, or say --allow-base-mismatch",
            )
    check_early(base)
    return base


def check_early(base: Base) -> None:
    """Compare the smallest weights, so that a wrong base is an error before hours of work.

    Raises:
        BaseMismatchError: names the tensor.
    """
    known = [name for name in base.expected if name in base.checkpoint.tensors]
    for name in sorted(known, key=lambda name: (base.checkpoint.spec(name).nbytes, name))[:_EARLY]:
        check_fingerprint(base, name, fingerprint_in_pieces(base.checkpoint, name))


def check_fingerprint(base: Base, name: str, found: str) -> None:
    """Compare one weight with what the adapters were trained on.

    Raises:
        BaseMismatchError: names the tensor.
    """
    if name in base.expected and base.expected[name][0] != found:
        raise BaseMismatchError(
            f"{name} in {base.checkpoint.root} is not the tensor that {base.expected[name][1]} was trained on",
            hint="give the right base, or say --allow-base-mismatch",
        )


def merge_parents(
    base: Base, adapters: Sequence[Adapter], weights: Sequence[float], records: Sequence[TensorRecord]
) -> tuple[Parent, ...]:
    """What a merged model names as its parents; ``records`` are the base's tensors."""
    given = zip(adapters, weights, strict=True)
    return (
        parent_of("base", base.manifest, records),
        *(parent_of("adapter", adapter.manifest, adapter.records, weight) for adapter, weight in given),
    )


def _by_tensor(checkpoint: Checkpoint, expected: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    named = {}
    for module, found in expected.items():
        weight = f"{module}.weight"
        named[module if weight not in checkpoint.tensors and module in checkpoint.tensors else weight] = found
    return named


def _find_parent(quantized: Checkpoint, manifest: Manifest | None) -> tuple[Checkpoint, dict[str, tuple[str, str]]]:
    """The checkpoint that a quantized one was made from, and what its weights must be."""
    root = quantized.root
    why = f"{root}: quantized with {quantization_found(quantized)}; rounding to 4 bits would erase most of the adapter"
    if manifest is None:
        raise CheckpointError(why, hint="merge onto the 16-bit checkpoint that it was made from")
    wanted = {target.module: target for target in manifest.targets if target.base_xxh3_128 is not None}
    for folder in sorted(root.resolve().parent.iterdir()):
        if folder != root.resolve() and (folder / CONFIG_NAME).is_file():
            try:
                candidate = Checkpoint(folder)
            except AdaptkitError:  # some other folder, not ours to judge
                continue
            named = _by_tensor(candidate, {m: (str(t.base_xxh3_128), str(root)) for m, t in wanted.items()})
            there = [name for name in named if name in candidate.tensors]
            if not wanted or len(there) != len(named) or quantization_found(candidate) is not None:
                continue
            smallest = min(there, key=lambda name: (candidate.spec(name).nbytes, name))
            if fingerprint_in_pieces(candidate, smallest) == named[smallest][0]:
                return candidate, named
    raise CheckpointError(
        f"{why}, and the 16-bit checkpoint that it was made from is not beside it",
        hint=f"merge onto that one: its tensors root is {_parent_root(manifest)}",
    )


def _parent_root(manifest: Manifest) -> str:
    return next((parent.tensors_root for parent in manifest.parents if parent.role == "base"), "not known")
