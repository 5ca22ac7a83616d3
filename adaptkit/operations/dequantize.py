"""Turn a quantized checkpoint back into a plain one, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash

from adaptkit.arguments import AnyPath, checked_options, typed_fields
from adaptkit.checkpoint import quantized
from adaptkit.checkpoint.dtypes import ARRAY_DTYPES, dtype_name
from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.hashing import bytes_of, fingerprint
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.integrity import check_config
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import CONFIG_NAME, check_side_files
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import CheckpointError, NonFiniteError, UsageError
from adaptkit.numerics.arrays import Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.formats._double_quant import GROUP
from adaptkit.operations._discard import discard_on_bad_input
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._shards import (
    Group,
    Piece,
    check_shard_size,
    cut_pieces,
    plan_shards,
    read_jobs,
    write_index,
    write_shards,
)
from adaptkit.operations._threads import check_threads, thread_count

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class DequantizeOptions:
    """How to dequantize.

    Attributes:
        dtype: bfloat16, float16 or float32; None for the dtype recorded with each weight, where ``quantize`` records
            bfloat16 for a float32 weight.
        max_shard_bytes: largest size of a shard, unless a single tensor is larger.
        threads: number of pieces decoded at a time; one per processor if None. The result does not depend on it.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None

    def __post_init__(self) -> None:
        typed_fields(self)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype: must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        check_shard_size(self.max_shard_bytes)
        check_threads(self.threads)


@dataclass(frozen=True)
class DequantizeReport:
    """What was done.

    Attributes:
        output: folder.
        dequantized: number of matrices.
        bytes_after: size of all tensors.
        tensors_root: hash of the result's tensors.
        manifest_sha256: of the result's manifest.
    """

    output: str
    dequantized: int
    bytes_after: int
    tensors_root: str
    manifest_sha256: str


@dataclass(frozen=True)
class _Decoded:
    """A piece of a plain tensor, and the elements of the source that it was made from."""

    values: Array
    raw: Array


def dequantize(
    source: AnyPath,
    output: AnyPath,
    options: DequantizeOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> DequantizeReport:
    """Write a plain checkpoint with every quantized weight in its original dtype, or in another.

    Tensors that are not quantized keep their dtype, whatever ``options.dtype`` is.

    Args:
        source: folder of a checkpoint quantized by adaptkit, or to 4 bits by bitsandbytes.
        output: folder to make.
        options: see ``DequantizeOptions``.
        force: replace an existing output.
        progress: called with bytes written.

    Raises:
        CheckpointError: the source is malformed, or in another format.
        IntegrityError: config.json does not match the source's manifest.
        NonFiniteError: a weight is NaN, or too large for its dtype; names the tensor.
        OutputExistsError: the output exists.
    """
    source, output = Path(source), Path(output)
    options = checked_options(options, DequantizeOptions)
    checkpoint = Checkpoint(source)
    check_config(source, read_manifest(source))
    names = quantized.quantized_names(checkpoint)
    if not names:
        method = quantization_found(checkpoint)
        raise CheckpointError(
            f"{source}: "
            + (f"quantized with {method}, which is not supported" if method else "holds no quantized weights"),
            hint="give a checkpoint that adaptkit or bitsandbytes (4-bit) quantized",
        )
    check_output(output, force, [source])
    check_side_files(source)
    parts = {name: quantized.part_names(checkpoint, name) for name in names}
    inside = {part for found in parts.values() for part in found} - set(names)
    groups = [_group(checkpoint, name, name in parts, options) for name in checkpoint.tensors if name not in inside]
    shards = plan_shards(groups, options.max_shard_bytes)

    def jobs(group: Group) -> Sequence[Callable[[], _Decoded]]:
        if group.source in parts:
            return _decoding(checkpoint, group.specs[0])
        return [partial(_as_it_is, job) for job in read_jobs(checkpoint, group.specs[0])]

    def assemble(group: Group, results: Iterator[_Decoded], writer: TensorWriter) -> dict[str, str]:
        digest = xxhash.xxh3_128()
        for result in results:
            digest.update(bytes_of(result.raw))
            writer.write(group.source, result.values)
        small = [part for part in parts.get(group.source, ()) if part != group.source]
        return {part: fingerprint(checkpoint.read_array(part)) for part in small} | {group.source: digest.hexdigest()}

    recorded = {name: value for name, value in asdict(options).items() if name != "threads"}
    state = checkpoint.state()
    with (
        Output(output, [checkpoint.outline(), recorded], force, inputs=[[str(source.resolve()), state]]) as out,
        discard_on_bad_input(out),
    ):
        out.require_space(sum(group.nbytes for group in groups))
        write_shards(out, shards, jobs, assemble, thread_count(options.threads), progress)
        checkpoint.require_state(state)
        write_index(out, shards)
        out.write_json(CONFIG_NAME, {k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
        for name, content in checkpoint.side_contents().items():
            out.write(name, content)
        manifest = _manifest(out, checkpoint, recorded)
        out.publish(manifest)
    bytes_after = sum(group.nbytes for group in groups)
    return DequantizeReport(str(output), len(names), bytes_after, manifest.tensors_root, manifest.sha256)


def _group(checkpoint: Checkpoint, name: str, is_quantized: bool, options: DequantizeOptions) -> Group:
    """Return the plain tensor that a tensor becomes; a quantized weight's shape and dtype are in its state."""
    if not is_quantized:
        return Group(name, (checkpoint.spec(name),))
    weight = quantized.read_constants(checkpoint, name)  # all parts but codes: finds inconsistent ones before writing
    shape = weight.shape[::-1] if stores_transposed(checkpoint, name) else weight.shape
    return Group(name, (TensorSpec(name, dtype_name(options.dtype or weight.dtype), shape),))


def _decoding(checkpoint: Checkpoint, spec: TensorSpec) -> list[Callable[[], _Decoded]]:
    """Return jobs that decode a weight."""
    weight = quantized.read_constants(checkpoint, spec.name)
    absmax = weight.absmax

    def decoded(piece: Piece) -> _Decoded:
        packed = quantized.read_run(checkpoint, spec.name, weight, absmax, piece.start, piece.count)
        values = weight.encoding.numerics.dequantize(packed, ARRAY_DTYPES[spec.dtype])
        if not all_finite(values):
            _refuse(spec, packed.absmax)
        return _Decoded(values, packed.codes)

    def decoded_whole() -> _Decoded:
        found = decoded(Piece(0, spec.count))
        return _Decoded(np.ascontiguousarray(found.values.reshape(weight.shape).T), found.raw)

    if stores_transposed(checkpoint, spec.name):  # only in the GPT-2 family, whose matrices are small
        return [decoded_whole]
    return [partial(decoded, piece) for piece in cut_pieces(spec, weight.block_size * GROUP)]


def _refuse(spec: TensorSpec, constants: Array) -> NoReturn:
    if not all_finite(constants):
        raise NonFiniteError(f"{spec.name}: the constants hold NaN or infinity", hint="download the checkpoint again")
    raise NonFiniteError(
        f"{spec.name}: a weight of up to {np.abs(constants).max():.6g} is too large for {spec.dtype}",
        hint=f"use --dtype {'bfloat16 or ' if spec.dtype == 'F16' else ''}float32",
    )


def _as_it_is(job: Callable[[], Array]) -> _Decoded:
    values = job()
    return _Decoded(values, values)


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
