"""Fold adapters into a 16- or 32-bit checkpoint, shard by shard, keeping what is needed to take them out again.

The merged shards keep the headers of the base's, byte for byte, so that ``unmerge`` gives back the very same files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.hashing import fingerprint, tensors_root
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.layout import CONFIG_NAME, INDEX_NAME, side_files
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import BaseMismatchError, CheckpointError, NonFiniteError
from adaptkit.numerics import exact
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._pipeline import in_order, thread_count
from adaptkit.operations._terms import check_weights, expected_fingerprints, knows_base, plan_terms


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        weights: one per adapter; empty means 1 for each.
        undo: write the records that make ``unmerge`` exact.
        allow_base_mismatch: merge onto a base that the adapter was not trained on; recorded in the manifest.
        threads: number of tensors merged at a time; one per processor if None. Not part of the result.
    """

    weights: tuple[float, ...] = ()
    undo: bool = True
    allow_base_mismatch: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class MergeReport:
    """What was done, or would be.

    Attributes:
        output: folder.
        merged: number of weights changed.
        tensors: in the checkpoint.
        base_verified: whether all weights were compared with those that every adapter was trained on.
        moved: fraction of the changed matrices' elements whose value moved.
        relative_delta: ‖Δ‖ / ‖W‖ over all changed matrices.
        effect: ⟨effect, Δ⟩ / ⟨Δ, Δ⟩ over all of them; what rounding left of the change.
        undo_bits: size of the undo records, in bits per parameter of the changed matrices.
        tensors_root: binds the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
    """

    output: str
    merged: int
    tensors: int
    base_verified: bool
    moved: float = 0.0
    relative_delta: float = 0.0
    effect: float = 1.0
    undo_bits: float = 0.0
    tensors_root: str | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output, and what was learnt from making it."""

    spec: TensorSpec
    tensor: Tensor
    base_fingerprint: str
    figures: Mapping[str, float]
    undo: Tensor | None = None


def merge(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> MergeReport:
    """Write base + Σ weight · Δ, every sum exact and rounded once.

    Args:
        base: folder of a plain checkpoint.
        adapters: folders of LoRA adapters, in the order in which they are summed.
        output: folder to make.
        options: how.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: told of bytes written.

    Raises:
        BaseMismatchError: an adapter was trained on other tensors, or does not fit the base.
        CheckpointError, AdapterError: malformed input, or a quantized base.
        NonFiniteError: the base is not finite, or the result would not be; names the tensor.
        OutputExistsError: the output exists.
    """
    options = options or MergeOptions()
    read = [read_adapter(path) for path in adapters]
    weights = options.weights or (1.0,) * len(read)
    check_weights(read, weights)
    checkpoint = Checkpoint(base)
    _check_base(checkpoint)
    terms = plan_terms(checkpoint, read, weights)
    expected = {} if options.allow_base_mismatch else expected_fingerprints(read)
    check_output(output, force, [base, *adapters])
    verified = bool(expected) and all(knows_base(adapter) for adapter in read)
    report = MergeReport(str(output), len(terms), len(checkpoint.tensors), verified)
    if dry_run:
        return report
    recorded = {"undo": options.undo, "allow_base_mismatch": options.allow_base_mismatch, "weights": list(weights)}
    roots = [tensors_root(adapter.records) for adapter in read]
    configs = [[dict(adapter.config), _begun(adapter)] for adapter in read]
    with Output(output, [str(base.resolve()), checkpoint.state(), roots, configs, recorded], force) as out:
        for number, file in enumerate(sorted(checkpoint.headers), 1):
            record_name = undo.undo_name(number, len(checkpoint.headers))
            _write_shard(out, checkpoint, file, record_name, terms, expected, options, progress)
        for name in (CONFIG_NAME, INDEX_NAME):
            if (base / name).exists():
                out.write(name, (base / name).read_bytes())
        for path in side_files(base):
            out.write(path.name, path.read_bytes())
        manifest = _manifest(out, checkpoint, read, weights, terms, recorded)
        out.publish(manifest)
    return _finished(report, out, checkpoint, terms, manifest)


def _begun(adapter: Adapter) -> dict[str, list[str]]:
    return {name: [fingerprint(t.lora_a), fingerprint(t.lora_b)] for name, t in adapter.compensation.items()}


def _check_base(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization_method is not None:
        raise CheckpointError(
            f"{checkpoint.root}: quantized with {checkpoint.quantization_method}; rounding to 4 bits would erase most "
            "of the adapter",
            hint="merge onto the 16-bit checkpoint that it was made from",
        )


def _write_shard(
    out: Output,
    checkpoint: Checkpoint,
    file: str,
    record_name: str,
    terms: Mapping[str, list[LowRank]],
    expected: Mapping[str, tuple[str, str]],
    options: MergeOptions,
    progress: Progress,
) -> None:
    header = checkpoint.headers[file]
    changed = [spec for spec, _ in header.tensors if spec.name in terms]
    with_undo = options.undo and bool(changed)
    if out.finished(file, record_name) if with_undo else out.finished(file):
        return
    packed: dict[str, Tensor] = {}
    notes: dict[str, object] = {}
    with TensorWriter(out.folder, file, [spec for spec, _ in header.tensors], header.raw) as writer:
        done = sum(record.size for record in out.files)
        total = sum(located.spec.nbytes for located in checkpoint.tensors.values())
        for piece in _pieces(checkpoint, file, terms, expected, options):
            writer.write(piece.spec.name, piece.tensor)
            done += piece.spec.nbytes
            progress(done, total)
            notes[piece.spec.name] = {"base": piece.base_fingerprint, **piece.figures}
            if piece.undo is not None:
                packed[piece.spec.name] = piece.undo
    if with_undo:
        specs = [TensorSpec(spec.name, "U8", (packed[spec.name].numel(),)) for spec in changed]
        with TensorWriter(out.folder, record_name, specs) as record:
            for spec in specs:
                record.write(spec.name, packed[spec.name])
        out.add(record.record, [])
    out.add(writer.record, writer.tensors, notes)


def _pieces(
    checkpoint: Checkpoint,
    file: str,
    terms: Mapping[str, list[LowRank]],
    expected: Mapping[str, tuple[str, str]],
    options: MergeOptions,
) -> Iterator[_Piece]:
    def make(spec: TensorSpec) -> _Piece:
        weight = checkpoint.read(spec.name)
        digest = fingerprint(weight)
        if spec.name in expected and digest != expected[spec.name][0]:
            raise BaseMismatchError(
                f"{spec.name} in {checkpoint.root} is not the tensor that {expected[spec.name][1]} was trained on",
                hint="give the right base, or say --allow-base-mismatch",
            )
        if spec.name not in terms:
            return _Piece(spec, weight, digest, {})
        try:
            merged = exact.merge(weight, terms[spec.name], options.undo)
        except NonFiniteError as error:
            raise NonFiniteError(f"{spec.name}: {error.message}", error.hint) from error
        record = undo.pack(merged.residual) if options.undo else None
        return _Piece(spec, merged.weight, digest, _figures(merged), record)

    specs = [spec for spec, _ in checkpoint.headers[file].tensors]
    return in_order(make, specs, thread_count(options.threads))


def _figures(merged: exact.Merged) -> dict[str, float]:
    return {
        "moved": merged.moved,
        "delta_norm": merged.delta_norm,
        "weight_norm": merged.weight_norm,
        "effect": merged.effect,
    }


def _manifest(
    out: Output,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    terms: Mapping[str, list[LowRank]],
    recorded: dict[str, object],
) -> Manifest:
    base = [
        TensorRecord(name, "", located.spec.dtype, located.spec.shape, out.notes[name]["base"])
        for name, located in checkpoint.tensors.items()
    ]
    parents: list[Parent] = [parent_of("base", read_manifest(checkpoint.root), base)]
    parents += [
        parent_of("adapter", adapter.manifest, adapter.records, weight)
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    targets = [
        Target(name.removesuffix(".weight"), checkpoint.spec(name).shape, out.notes[name]["base"]) for name in terms
    ]
    return Manifest(
        kind="merged",
        operation={"name": "merge", "options": recorded},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=tuple(parents),
        targets=tuple(targets),
    )


def _finished(
    report: MergeReport, out: Output, checkpoint: Checkpoint, terms: Mapping[str, list[LowRank]], manifest: Manifest
) -> MergeReport:
    notes = [out.notes[name] for name in terms]
    parameters = sum(checkpoint.spec(name).count for name in terms)
    squared_delta = sum(note["delta_norm"] ** 2 for note in notes)
    squared_weight = sum(note["weight_norm"] ** 2 for note in notes)
    overlap = sum(note["effect"] * note["delta_norm"] ** 2 for note in notes)
    records = sum(record.size for record in out.files if record.path.startswith("adaptkit-undo-"))
    return MergeReport(
        output=report.output,
        merged=report.merged,
        tensors=report.tensors,
        base_verified=report.base_verified,
        moved=sum(note["moved"] for note in notes) / parameters,
        relative_delta=(squared_delta / squared_weight) ** 0.5 if squared_weight else 0.0,
        effect=overlap / squared_delta if squared_delta else 1.0,
        undo_bits=8 * records / parameters,
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )
