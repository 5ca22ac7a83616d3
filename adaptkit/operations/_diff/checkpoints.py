"""Compare two checkpoints: tensors by fingerprint, differing tensors by value, then the side files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from adaptkit.checkpoint.integrity import differing_header
from adaptkit.checkpoint.layout import CONFIG_NAME, resolve_inside
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, read_manifest, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._diff.files import FilesDifference, ValueDifference, differ_in_files_beside, differ_in_values
from adaptkit.operations._diff.modules import relative
from adaptkit.operations._diff.tensors import DIRECTIONS, StoredTensor, TensorDifference, differ_in_files
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


def diff_checkpoints(
    first: Path, second: Path, *, recompute: bool, threads: int, progress: Progress
) -> CheckpointDiffReport:
    """Compare two checkpoints; see ``CheckpointDiffReport``.

    Raises:
        CheckpointError: one of them is not a checkpoint.
        IntegrityError: a file cannot be read, or a manifest is malformed.
    """
    one, two = checkpoints = Checkpoint(first), Checkpoint(second)
    manifests = [read_manifest(root) for root in (first, second)]
    problems = ["" if recompute else _why_not_by_manifest(*side) for side in zip(checkpoints, manifests, strict=True)]
    computed = [manifest is None or recompute or bool(why) for manifest, why in zip(manifests, problems, strict=True)]
    unread = sum(side.nbytes for side, is_computed in zip(checkpoints, computed, strict=True) if is_computed)
    done, records = 0, []
    for side, manifest, is_computed in zip(checkpoints, manifests, computed, strict=True):
        if manifest is None or is_computed:
            report_read = partial(lambda before, read, _: progress(before + read, unread), done)
            digests = fingerprints(side, threads, report_read)
            done += side.nbytes
        else:
            digests = {record.name: record.xxh3_128 for record in manifest.tensors}
        records.append({name: TensorRecord.of(at.spec, digests[name], at.file) for name, at in side.tensors.items()})
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
        fingerprints=(COMPUTED if computed[0] else BY_MANIFEST, COMPUTED if computed[1] else BY_MANIFEST),
        tensors_roots=(tensors_root(records[0].values()), tensors_root(records[1].values())),
        manifests=(manifests[0].sha256 if manifests[0] else None, manifests[1].sha256 if manifests[1] else None),
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
        remarks=tuple(
            f"{root}: its manifest is ignored, since {why}; run adaptkit verify {root}"
            for root, why in zip((first, second), problems, strict=True)
            if why
        ),
    )


def _why_not_by_manifest(checkpoint: Checkpoint, manifest: Manifest | None) -> str:
    """Return how a manifest contradicts the sizes and headers of the files; empty if it does not, or there is none."""
    if manifest is None:
        return ""
    sizes = {record.path: record.size for record in manifest.files}
    for file in checkpoint.headers:
        if sizes.get(file) != resolve_inside(checkpoint.root, file).stat().st_size:
            return f"{file} has a different size"
    differing = differing_header(checkpoint, manifest)
    return f"the tensor {differing} does not match it" if differing is not None else ""


def _measure(
    first: Checkpoint, second: Checkpoint, names: Sequence[str], threads: int, progress: Progress
) -> tuple[TensorDifference, ...]:
    """Measure the tensors: first those without a norm, then largest relative difference first."""

    def measured(name: str) -> TensorDifference:
        return differ_in_files(name, StoredTensor(first, name), StoredTensor(second, name), ranks=True)

    found, done = [], 0
    total = sum(first.spec(name).nbytes for name in names)
    for name, difference in zip(names, map_in_threads(measured, names, threads), strict=True):
        found.append(difference)
        done += first.spec(name).nbytes
        progress(done, total)
    return tuple(sorted(found, key=lambda t: (t.relative is not None, -(t.relative or 0.0), t.name)))


def _energy(tensors: Sequence[TensorDifference]) -> dict[str, float]:
    changes = [(t.change, (t.difference or 0.0) ** 2) for t in tensors if t.change is not None]
    square = sum(weight for _, weight in changes)
    if not square:
        return {}
    return {str(rank): sum(c.energy[str(rank)] * weight for c, weight in changes) / square for rank in DIRECTIONS}
