"""Turn an NF4 checkpoint back into a plain one."""

from dataclasses import asdict, dataclass
from pathlib import Path

from adaptkit.checkpoint import quantized
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.header import DTYPE_NAMES, TensorSpec
from adaptkit.checkpoint.integrity import Progress, no_progress
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.layout import CONFIG_NAME, side_files
from adaptkit.checkpoint.manifest import Manifest, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.operations._pipeline import thread_count
from adaptkit.operations._selection import stores_transposed
from adaptkit.operations._shards import Group, Made, plan_shards, write_shards


@dataclass(frozen=True)
class DequantizeOptions:
    """How to dequantize.

    Attributes:
        max_shard_bytes: no shard grows larger, unless one tensor is.
        threads: number of tensors decoded at a time; one per processor if None. Not part of the result.
    """

    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None


@dataclass(frozen=True)
class DequantizeReport:
    """What was done.

    Attributes:
        output: folder.
        dequantized: number of matrices.
        bytes_after: of tensors.
        tensors_root: binds the result's tensors.
        manifest_sha256: of the result's manifest.
    """

    output: str
    dequantized: int
    bytes_after: int
    tensors_root: str
    manifest_sha256: str


def dequantize(
    source: Path,
    output: Path,
    options: DequantizeOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> DequantizeReport:
    """Write a plain checkpoint with every NF4 weight in the type that it had.

    Args:
        source: folder of an NF4 checkpoint, ours or bitsandbytes'.
        output: folder to make.
        options: how.
        force: replace an existing output.
        progress: told of bytes written.

    Raises:
        CheckpointError: the source is malformed, or not in NF4.
        OutputExistsError: the output exists.
    """
    options = options or DequantizeOptions()
    checkpoint = Checkpoint(source)
    names = quantized.quantized_names(checkpoint)
    if not names:
        raise CheckpointError(f"{source}: holds no NF4 weights", hint="it is not quantized, or not by bitsandbytes")
    check_output(output, force, [source])
    parts = {part for name in names for part in quantized.part_names(checkpoint, name)}
    groups = [
        _group(checkpoint, name) if name in set(names) else Group(name, (checkpoint.spec(name),))
        for name in checkpoint.tensors
        if name not in parts or name in set(names)
    ]
    shards = plan_shards(groups, options.max_shard_bytes)

    def make(group: Group) -> Made:
        if group.source not in parts:
            weight = checkpoint.read(group.source)
        else:
            weight = quantized.read_quantized(checkpoint, group.source).dequantize()
            if stores_transposed(checkpoint, group.source.removesuffix(".weight")):
                weight = weight.T.contiguous()
        return Made({group.source: weight}, fingerprint(weight))

    recorded = {k: v for k, v in asdict(options).items() if k != "threads"}
    with Output(output, [str(source.resolve()), checkpoint.state(), recorded], force) as out:
        write_shards(out, shards, make, thread_count(options.threads), progress)
        out.write_json(CONFIG_NAME, {k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
        for path in side_files(source):
            out.write(path.name, path.read_bytes())
        base = [
            TensorRecord(name, "", located.spec.dtype, located.spec.shape, fingerprint(checkpoint.read(name)))
            for name, located in checkpoint.tensors.items()
        ]
        manifest = Manifest(
            kind="checkpoint",
            operation={"name": "dequantize", "options": recorded},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=(parent_of("base", read_manifest(source), base),),
        )
        out.publish(manifest)
    bytes_after = sum(group.nbytes for group in groups)
    return DequantizeReport(str(output), len(names), bytes_after, manifest.tensors_root, manifest.sha256)


def _group(checkpoint: Checkpoint, name: str) -> Group:
    """The plain tensor that an NF4 weight becomes; shape and type are in its state, which is small."""
    weight = quantized.read_quantized(checkpoint, name)
    shape = weight.shape
    if stores_transposed(checkpoint, name.removesuffix(".weight")):
        shape = shape[::-1]
    return Group(name, (TensorSpec(name, DTYPE_NAMES[weight.dtype], shape),))
