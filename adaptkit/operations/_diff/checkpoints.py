"""Compare two checkpoints: tensors by fingerprint, differing tensors by value, then the side files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from adaptkit.operations._threads import fingerprints, map_in_threads

BY_MANIFEST, COMPUTED = "manifest", "computed"


@dataclass(frozen=True)
class CheckpointDiffReport:
    """Comparison of two checkpoints.

    Attributes:
        kind: always ``checkpoint``.
        first: folder of the first checkpoint.
        second: folder of the second checkpoint.
        same: whether all tensors, the configuration and the side files are the same.
        fingerprints: where the fingerprints of each come from: ``manifest`` if the manifest records them and its files
            have the right sizes and headers, without reading the tensors; ``computed`` if every byte was read.
        tensors_roots: ``tensors_root`` of each, from these fingerprints.
        manifests: sha256 of each manifest; None if there is no manifest.
        quantizations: quantization method of each; None if it is not quantized. Quantized tensors are compared as
            stored, their codes as integers.
        equal: number of tensors with the same dtype, shape and fingerprint.
        equal_bytes: total size of these tensors.
        tensors: tensors of both that differ: first those that cannot be measured, then largest relative difference
            first.
        only_in_first: tensors that only the first checkpoint has.
        only_in_second: tensors that only the second checkpoint has.
        norms: norm of each side, over all tensors in ``tensors`` that have norms, concatenated into one vector.
        difference: norm of the difference of these vectors.
        relative: ``difference`` / the larger norm; 0 if both are zero, None if some tensor has no norm.
        energy: maps the ranks 8, 16, 32 and 64 to the share of Σ‖W₁ − W₂‖² over all changed matrices that the largest
            singular values hold: a lower bound of what adapters of that rank could hold. Empty if no matrix changed.
        config: keys of ``config.json`` with different values.
        beside: differences in the tokenizer, chat templates, generation configuration and other side files.
        remarks: warnings and further notes for the reader.
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
    tensors: tuple[TensorDifference, ...] = field(repr=False)
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
    """One of the two checkpoints.

    Attributes:
        checkpoint: its tensors.
        manifest: its manifest; None if there is none.
        recorded: fingerprints from the manifest by tensor name; None if they must be computed.
        remark: why the manifest is ignored; empty if it is not.
    """

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
    unmatched = [tuple(sorted(a.tensors.keys() - b.tensors.keys())) for a, b in ((one, two), (two, one))]
    measured = [t.norms for t in tensors if t.norms is not None]
    norms = (math.hypot(*(norm for norm, _ in measured)), math.hypot(*(norm for _, norm in measured)))
    difference = math.hypot(*(t.difference for t in tensors if t.difference is not None))
    equal = set(shared) - set(unlike)
    return CheckpointDiffReport(
        kind="checkpoint",
        first=str(first),
        second=str(second),
        same=not (unlike or unmatched[0] or unmatched[1] or config) and beside.same,
        fingerprints=(_basis(sides[0]), _basis(sides[1])),
        tensors_roots=(tensors_root(records[0].values()), tensors_root(records[1].values())),
        manifests=(_sha256(sides[0]), _sha256(sides[1])),
        quantizations=(quantization_found(one), quantization_found(two)),
        equal=len(equal),
        equal_bytes=sum(one.spec(name).nbytes for name in equal),
        tensors=tensors,
        only_in_first=unmatched[0],
        only_in_second=unmatched[1],
        norms=norms,
        difference=difference,
        relative=relative(difference, norms) if len(measured) == len(tensors) else None,
        energy=_energy(tensors),
        config=config,
        beside=beside,
        remarks=tuple(side.remark for side in sides if side.remark),
    )


def _open(root: Path, recompute: bool) -> _Side:
    """Read the headers, and decide whether the manifest's fingerprints can be used instead of reading the tensors."""
    checkpoint, manifest = Checkpoint(root), read_manifest(root)
    if manifest is None or recompute:
        return _Side(checkpoint, manifest, None, "")
    problem = _contradiction(checkpoint, manifest)
    if problem:
        remark = f"{root}: its manifest is ignored, since {problem}; run adaptkit verify {root}"
        return _Side(checkpoint, manifest, None, remark)
    return _Side(checkpoint, manifest, {record.name: record.xxh3_128 for record in manifest.tensors}, "")


def _contradiction(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """Return the first mismatch between the manifest and the file sizes and headers; empty if there is none."""
    sizes = {record.path: record.size for record in manifest.files}
    for file in checkpoint.headers:
        if sizes.get(file) != resolve_inside(checkpoint.root, file).stat().st_size:
            return f"{file} has a different size"
    listed = {(t.name, t.file, t.dtype, t.shape) for t in manifest.tensors}
    found = {(n, t.file, t.spec.dtype, t.spec.shape) for n, t in checkpoint.tensors.items()}
    return f"the tensor {min(listed ^ found)[0]} does not match it" if listed != found else ""


def _records(sides: Sequence[_Side], threads: int, progress: Progress) -> list[dict[str, TensorRecord]]:
    """Return the tensor records of each side; fingerprints that no manifest records are computed."""
    total = sum(side.checkpoint.nbytes for side in sides if side.recorded is None)
    before, found = 0, []
    for side in sides:
        tensors, digests = side.checkpoint.tensors, side.recorded
        if digests is None:
            report_read = partial(lambda before, done, _: progress(before + done, total), before)
            digests = fingerprints(side.checkpoint, threads, report_read)
            before += side.checkpoint.nbytes
        found.append({name: TensorRecord.of(at.spec, digests[name], at.file) for name, at in tensors.items()})
    return found


def _measure(
    first: Checkpoint, second: Checkpoint, names: Sequence[str], threads: int, progress: Progress
) -> tuple[TensorDifference, ...]:
    """Measure the tensors: first those without a norm, then largest relative difference first."""
    found, done = [], 0
    total = sum(first.spec(name).nbytes for name in names)
    for name, difference in zip(names, map_in_threads(partial(_differ, first, second), names, threads), strict=True):
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
