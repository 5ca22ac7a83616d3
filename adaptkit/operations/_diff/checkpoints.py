"""Compare two checkpoints: tensors by fingerprint, those that differ by their values, then what lies beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.layout import CONFIG_NAME, resolve_inside
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, read_manifest
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._diff.files import FilesDifference, ValueDifference, differ_in_files_beside, differ_in_values
from adaptkit.operations._diff.groups import relative
from adaptkit.operations._diff.tensors import DIRECTIONS, Source, TensorDifference, differ_in_files
from adaptkit.operations._threads import each, fingerprints

BY_MANIFEST, COMPUTED = "manifest", "computed"


@dataclass(frozen=True)
class CheckpointDiffReport:
    """How two checkpoints compare.

    Attributes:
        kind: ``checkpoint``.
        first: folder.
        second: folder.
        same: whether all tensors, the configuration, and the files beside them are the same.
        fingerprints: of both: ``manifest`` where they are those that the manifest records, whose files have the right
            sizes and headers but were not read; ``computed`` where every byte was read.
        tensors_roots: of both, from these fingerprints.
        manifests: sha256 of both; None where there is none.
        quantizations: how each is quantized; such tensors are compared as they are stored, codes as whole numbers.
        equal: tensors of the same type, shape and fingerprint.
        equal_bytes: of these tensors.
        tensors: those that are in both and not the same, by how much they differ.
        only_in_first: tensors of the first alone.
        only_in_second: tensors of the second alone.
        norms: of all tensors in ``tensors`` that have norms, as one vector, of both.
        difference: norm of the difference of these vectors.
        relative: ``difference`` over the larger norm; 0 where both are zero, None where some tensor has no norm.
        energy: share of the squares of the changes of all matrices in the 8, 16, 32 and 64 largest singular values of
            each: what adapters of that rank could hold, at least; empty if no matrix changed.
        config: keys of ``config.json`` with two values.
        beside: tokenizer, chat template, generation configuration and other files beside the weights.
        remarks: what else a reader has to know.
    """

    kind: str
    first: str
    second: str
    same: bool
    fingerprints: tuple[str, str]
    tensors_roots: tuple[str, str]
    manifests: tuple[str | None, str | None]
    quantizations: tuple[str | None, str | None]
    equal: int
    equal_bytes: int
    tensors: tuple[TensorDifference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    norms: tuple[float, float]
    difference: float
    relative: float | None
    energy: dict[str, float]
    config: tuple[ValueDifference, ...]
    beside: FilesDifference
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """One of the two: its tensors, and how their fingerprints are known."""

    checkpoint: Checkpoint
    manifest: Manifest | None
    recorded: dict[str, str] | None
    remark: str


def diff_checkpoints(
    first: Path, second: Path, *, recompute: bool, threads: int, progress: Progress
) -> CheckpointDiffReport:
    """Compare two checkpoints; see ``CheckpointDiffReport``.

    Raises:
        CheckpointError: one of them is not a checkpoint.
        IntegrityError: a file cannot be read, or a manifest is malformed.
    """
    sides = [_open(root, recompute) for root in (first, second)]
    one, two = (side.checkpoint for side in sides)
    records = _records(sides, threads, progress)
    shared = sorted(one.tensors.keys() & two.tensors.keys())
    unlike = [name for name in shared if records[0][name].content != records[1][name].content]
    tensors = _measure(one, two, unlike, threads, progress)
    config = tuple(differ_in_values(CONFIG_NAME, one.config, two.config))
    beside = differ_in_files_beside(first, second)
    lonely = [tuple(sorted(a.tensors.keys() - b.tensors.keys())) for a, b in ((one, two), (two, one))]
    measured = [t.norms for t in tensors if t.norms is not None]
    norms = (math.hypot(*(norm for norm, _ in measured)), math.hypot(*(norm for _, norm in measured)))
    difference = math.hypot(*(t.difference for t in tensors if t.difference is not None))
    equal = set(shared) - set(unlike)
    return CheckpointDiffReport(
        kind="checkpoint",
        first=str(first),
        second=str(second),
        same=not (unlike or lonely[0] or lonely[1] or config) and beside.same,
        fingerprints=(_basis(sides[0]), _basis(sides[1])),
        tensors_roots=(tensors_root(records[0].values()), tensors_root(records[1].values())),
        manifests=(_sha256(sides[0]), _sha256(sides[1])),
        quantizations=(quantization_found(one), quantization_found(two)),
        equal=len(equal),
        equal_bytes=sum(one.spec(name).nbytes for name in equal),
        tensors=tensors,
        only_in_first=lonely[0],
        only_in_second=lonely[1],
        norms=norms,
        difference=difference,
        relative=relative(difference, norms) if len(measured) == len(tensors) else None,
        energy=_energy(tensors),
        config=config,
        beside=beside,
        remarks=tuple(side.remark for side in sides if side.remark),
    )


def _open(root: Path, recompute: bool) -> _Side:
    """Read the headers, and decide whether the manifest's fingerprints may stand for the tensors."""
    checkpoint, manifest = Checkpoint(root), read_manifest(root)
    if manifest is None or recompute:
        return _Side(checkpoint, manifest, None, "")
    problem = _contradiction(checkpoint, manifest)
    if problem:
        remark = f"{root}: its manifest is ignored, since {problem}; run adaptkit verify {root}"
        return _Side(checkpoint, manifest, None, remark)
    return _Side(checkpoint, manifest, {record.name: record.xxh3_128 for record in manifest.tensors}, "")


def _contradiction(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """In what files and headers are not those of the manifest, as far as can be seen without reading tensors."""
    sizes = {record.path: record.size for record in manifest.files}
    for file in checkpoint.headers:
        if sizes.get(file) != resolve_inside(checkpoint.root, file).stat().st_size:
            return f"{file} has a different size"
    listed = {(t.name, t.file, t.dtype, t.shape) for t in manifest.tensors}
    found = {(n, t.file, t.spec.dtype, t.spec.shape) for n, t in checkpoint.tensors.items()}
    return f"the tensor {min(listed ^ found)[0]} does not match it" if listed != found else ""


def _records(sides: Sequence[_Side], threads: int, progress: Progress) -> list[dict[str, TensorRecord]]:
    """Fingerprints of both, read from the files where no manifest knows them."""
    total = sum(t.spec.nbytes for side in sides if side.recorded is None for t in side.checkpoint.tensors.values())
    before, found = 0, []
    for side in sides:
        tensors, digests = side.checkpoint.tensors, side.recorded
        if digests is None:
            told = partial(lambda before, done, _: progress(before + done, total), before)
            digests = fingerprints(side.checkpoint, threads, told)
            before += sum(at.spec.nbytes for at in tensors.values())
        found.append({name: TensorRecord.of(at.spec, digests[name], at.file) for name, at in tensors.items()})
    return found


def _measure(
    first: Checkpoint, second: Checkpoint, names: Sequence[str], threads: int, progress: Progress
) -> tuple[TensorDifference, ...]:
    """By how much tensors differ, those that differ most first; what cannot be measured comes before them."""
    found, done = [], 0
    total = sum(first.spec(name).nbytes for name in names)
    for name, difference in zip(names, each(partial(_differ, first, second), names, threads), strict=True):
        found.append(difference)
        done += first.spec(name).nbytes
        progress(done, total)
    return tuple(sorted(found, key=lambda t: (t.relative is not None, -(t.relative or 0.0), t.name)))


def _differ(first: Checkpoint, second: Checkpoint, name: str) -> TensorDifference:
    return differ_in_files(name, Source(first, name), Source(second, name), ranks=True)


def _energy(tensors: Sequence[TensorDifference]) -> dict[str, float]:
    changes = [(t.change, (t.difference or 0.0) ** 2) for t in tensors if t.change is not None]
    square = sum(weight for _, weight in changes)
    if not square:
        return {}
    return {str(rank): sum(c.energy[str(rank)] * weight for c, weight in changes) / square for rank in DIRECTIONS}


def _basis(side: _Side) -> str:
    return COMPUTED if side.recorded is None else BY_MANIFEST


def _sha256(side: _Side) -> str | None:
    return side.manifest.sha256 if side.manifest else None
