"""Turn a quantized checkpoint back into a plain one, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NoReturn

import numpy as np

from adaptkit.arguments import AnyPath, as_path, check_flags, checked_options
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.integrity import read_input_manifest
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.quantization import is_released, quantization_found, without_quantization
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import check_side_files
from adaptkit.errors import CheckpointError, NonFiniteError
from adaptkit.formats._find import stored_weights
from adaptkit.formats._stored import StoredWeight
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array, dtype_name
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._shards import (
    Piece,
    TensorGroup,
    cut_pieces,
    plan_shards,
    read_jobs,
    unfinished_shards,
    write_index,
)
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import DequantizeOptions


@dataclass(frozen=True)
class DequantizeReport:
    """What was done, or would be in a dry run.

    Attributes:
        output: folder.
        dequantized: number of matrices.
        input_scales: number of tensors left out: scales of the inputs of products in 8 bits.
        bytes_after: size of all tensors.
        tensors_root: hash of the result's tensors; None for a dry run.
        manifest_sha256: of the result's manifest; None for a dry run.
    """

    output: str
    dequantized: int
    input_scales: int
    bytes_after: int
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def dequantize(
    source: AnyPath,
    output: AnyPath,
    options: DequantizeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> DequantizeReport:
    """Write a plain checkpoint with every quantized weight in its original dtype, or in another.

    Tensors that are not quantized keep their dtype, whatever ``options.dtype`` is.

    Args:
        source: folder of a checkpoint quantized by adaptkit, or to 4 bits by bitsandbytes, or released in FP8 (with
            scales for blocks, as DeepSeek-V3), MXFP4 (gpt-oss), AWQ, GPTQ, or integers packed by compressed-tensors.
        output: folder to make.
        options: see ``DequantizeOptions``.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: called with bytes written.

    Raises:
        CheckpointError: the source is malformed, or in another format.
        IntegrityError: config.json does not match the source's manifest.
        NonFiniteError: a weight is NaN, or too large for its dtype; names the tensor.
        OutputExistsError: the output exists.
    """
    check_flags(force=force, dry_run=dry_run)
    source, output = as_path(source, "source"), as_path(output, "output")
    options = checked_options(options, DequantizeOptions)
    checkpoint = Checkpoint(source)
    read_input_manifest(source)
    method = quantization_found(checkpoint)
    packed = {weight.parts[0]: weight for weight in _weights(checkpoint, method)}
    plain = {name: _plain(checkpoint, weight, options) for name, weight in packed.items()}
    check_output(output, force, [source])
    check_side_files(source)
    inside = {part for weight in packed.values() for part in weight.parts} - set(packed)
    groups = [
        TensorGroup(name, (plain.get(name, located.spec),))
        for name, located in checkpoint.tensors.items()
        if name not in inside
    ]
    shards = plan_shards(groups, options.max_shard_bytes)
    left_out = sum(len(weight.input_scales) for weight in packed.values())
    planned = DequantizeReport(str(output), len(packed), left_out, sum(group.nbytes for group in groups))
    if dry_run:
        return planned

    def jobs(group: TensorGroup) -> Sequence[Callable[[], Array]]:
        if group.source not in packed:
            return read_jobs(checkpoint, group.specs[0])
        return _decoding(checkpoint, packed[group.source], group.specs[0])

    recorded = {name: value for name, value in asdict(options).items() if name != "threads"}
    if is_released(method):
        recorded["method"] = method  # so merge knows that no 16-bit checkpoint came before
    with Output(output, [checkpoint.outline(), recorded], force, inputs=[checkpoint]) as out:
        out.require_space(planned.bytes_after)
        unfinished = unfinished_shards(out, shards, jobs, thread_count(options.threads), progress)
        with closing(unfinished):
            for shard in unfinished:
                for group, results in shard.work:
                    for values in results:
                        shard.writer.write(group.specs[0].name, values)
                    if group.source in packed:  # its parts are read again now, while their pages are cached
                        parts = packed[group.source].parts
                        shard.notes[group.source] = {part: fingerprint_in_pieces(checkpoint, part) for part in parts}
                    else:
                        shard.notes[group.source] = {group.source: shard.writer.tensors[-1].xxh3_128}
        out.require_inputs()
        write_index(out, shards)
        out.write_json(CONFIG_NAME, without_quantization(checkpoint.config))
        for name, content in checkpoint.side_contents().items():
            out.write(name, content)
        manifest = _manifest(out, checkpoint, recorded)
        out.publish(manifest)
    return replace(planned, tensors_root=manifest.tensors_root, manifest_sha256=manifest.sha256)


def _weights(checkpoint: Checkpoint, method: str | None) -> list[StoredWeight]:
    """Return the weights to decode; finds inconsistent parts before writing.

    Raises:
        CheckpointError: there are none, or a weight is malformed, or in another format.
    """
    found = stored_weights(checkpoint, method)
    if not found:
        problem = f"quantized with {method}, which is not supported" if method else "holds no quantized weights"
        raise CheckpointError(
            f"{checkpoint.root}: {problem}",
            hint="give a checkpoint that adaptkit or bitsandbytes (4-bit) quantized, or one released in FP8 or MXFP4",
        )
    return found


def _plain(checkpoint: Checkpoint, weight: StoredWeight, options: DequantizeOptions) -> TensorSpec:
    """Return what a weight is decoded to."""
    dtype = dtype_name(options.dtype) if options.dtype else weight.dtype or "BF16"
    shape = weight.shape[::-1] if _is_transposed(checkpoint, weight) else weight.shape
    return TensorSpec(weight.name, dtype, shape)


def _is_transposed(checkpoint: Checkpoint, weight: StoredWeight) -> bool:
    """Whether the plain checkpoint stores a weight as (in, out), unlike the quantized one."""
    return weight.is_linear and stores_transposed(checkpoint, weight.name)


def _decoding(checkpoint: Checkpoint, weight: StoredWeight, spec: TensorSpec) -> list[Callable[[], Array]]:
    """Return jobs that decode a weight, piece by piece."""

    def decoded(piece: Piece) -> Array:
        values = weight.decode(checkpoint, piece.start, piece.count, ARRAY_DTYPES[spec.dtype])
        if not all_finite(values):
            _refuse(spec, weight.too_large(checkpoint, piece.start, piece.count, values))
        return values

    def decoded_whole() -> Array:
        return np.ascontiguousarray(decoded(Piece(0, spec.count)).reshape(weight.shape).T)

    if _is_transposed(checkpoint, weight):  # these matrices are small
        return [decoded_whole]
    return [partial(decoded, piece) for piece in cut_pieces(spec, weight.unit)]


def _refuse(spec: TensorSpec, too_large: str) -> NoReturn:
    """Raise the error for weights that are not finite: since something is too large for the dtype, or in the source."""
    if not too_large:
        raise NonFiniteError(
            f"{spec.name}: a code or constant is NaN or infinite", hint="download the checkpoint again"
        )
    larger = {"F16": "use --dtype bfloat16 or float32", "BF16": "use --dtype float32"}
    raise NonFiniteError(
        f"{spec.name}: {too_large} is too large for {spec.dtype}", hint=larger.get(spec.dtype, "check the checkpoint")
    )


def _manifest(out: Output, checkpoint: Checkpoint, recorded: dict[str, object]) -> Manifest:
    digests = {name: digest for note in out.notes.values() for name, digest in note.items()}
    base = [TensorRecord.of(located.spec, digests[name]) for name, located in checkpoint.tensors.items()]
    return Manifest(
        kind="checkpoint",
        operation={"name": "dequantize", "options": recorded},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=(parent_of("base", read_manifest(checkpoint.root), base, root=checkpoint.root),),
    )
