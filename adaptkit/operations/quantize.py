"""Quantize a checkpoint into NF4 shards with doubly quantized constants, tensor by tensor."""

from collections import Counter
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from adaptkit.checkpoint import quantized
from adaptkit.checkpoint.hashing import fingerprint, tensors_root
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.integrity import Progress, no_progress
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.layout import CONFIG_NAME, side_files
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, parent_of, read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, NonFiniteError, UsageError
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.formats._blockwise import check_block_size
from adaptkit.operations._pipeline import thread_count
from adaptkit.operations._selection import Choice, select
from adaptkit.operations._shards import Group, Made, plan_shards, write_shards


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        block_size: weights sharing one constant; a power of two from 32 to 4096.
        double_quant: quantize the constants too.
        skip: shell patterns of module paths that stay in 16 bits.
        max_shard_bytes: no shard grows larger, unless one tensor is.
        threads: number of tensors encoded at a time; one per processor if None. Not part of the result.
    """

    block_size: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()
    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.max_shard_bytes < 1:
            raise UsageError("the shard size must be positive")


@dataclass(frozen=True)
class QuantizeReport:
    """What was done, or would be.

    Attributes:
        output: folder.
        quantized: number of matrices.
        quantized_parameters: in them.
        parameters: in the whole checkpoint.
        kept: reason -> number of tensors left as they are.
        bytes_before: of tensors.
        bytes_after: of tensors.
        bits_per_parameter: of the quantized matrices, constants and headers included.
        shards: number of files with tensors.
        tensors_root: binds the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
    """

    output: str
    quantized: int
    quantized_parameters: int
    parameters: int
    kept: dict[str, int]
    bytes_before: int
    bytes_after: int
    bits_per_parameter: float
    shards: int
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def quantize(
    source: Path,
    output: Path,
    options: QuantizeOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> QuantizeReport:
    """Write an NF4 copy of a checkpoint that transformers with bitsandbytes, and adaptkit's trainer, load.

    Args:
        source: folder of a 16- or 32-bit safetensors checkpoint, one file or sharded.
        output: folder to make.
        options: how.
        force: replace an existing output.
        dry_run: plan and validate only.
        progress: told of bytes written.

    Raises:
        CheckpointError: the source is malformed, quantized already, or has nothing to quantize.
        NonFiniteError: a weight is NaN or infinite; names tensor and index.
        OutputExistsError: the output exists.

    Source: QLoRA (arXiv:2305.14314); bytes as bitsandbytes 0.50 makes them.
    """
    options = options or QuantizeOptions()
    checkpoint = Checkpoint(source)
    choices = _choose(checkpoint, options)
    groups = {choice.spec.name: _group(choice, options) for choice in choices.values()}
    _check_names(checkpoint, groups)
    shards = plan_shards([groups[name] for name in choices], options.max_shard_bytes)
    report = _report(output, choices, groups, len(shards))
    check_output(output, force, [source])
    if dry_run:
        return report

    def make(group: Group) -> Made:
        return _make(checkpoint, choices[group.source], group, options)

    recorded = {k: v for k, v in asdict(options).items() if k != "threads"}
    with Output(output, [str(source.resolve()), checkpoint.state(), recorded], force) as out:
        write_shards(out, shards, make, thread_count(options.threads), progress)
        config = checkpoint.config | {
            "quantization_config": quantized.quantization_config(_skip_modules(choices), options.double_quant)
        }
        out.write_json(CONFIG_NAME, config)
        for path in side_files(source):
            out.write(path.name, path.read_bytes())
        manifest = _manifest(out, checkpoint, choices, groups, recorded)
        out.publish(manifest)
    return QuantizeReport(
        **asdict(report) | {"tensors_root": manifest.tensors_root, "manifest_sha256": manifest.sha256}
    )


def _choose(checkpoint: Checkpoint, options: QuantizeOptions) -> dict[str, Choice]:
    if checkpoint.quantization_method is not None:
        raise CheckpointError(
            f"{checkpoint.root}: quantized already, with {checkpoint.quantization_method}",
            hint="quantize the original 16-bit checkpoint",
        )
    choices = {choice.spec.name: choice for choice in select(checkpoint, options.skip)}
    for spec in (choice.spec for choice in choices.values()):
        if spec.count == 0:
            raise CheckpointError(f"{checkpoint.root}: tensor {spec.name!r} is empty ({list(spec.shape)})")
    for pattern in options.skip:
        if not any(fnmatchcase(choice.module, pattern) for choice in choices.values()):
            raise UsageError(f"--skip {pattern!r} matches no module", hint="patterns match whole paths: '*.down_proj'")
    if all(choice.kept_because for choice in choices.values()):
        raise CheckpointError(f"{checkpoint.root}: nothing to quantize: no matrices in numbered layers")
    return choices


def _group(choice: Choice, options: QuantizeOptions) -> Group:
    if choice.kept_because:
        return Group(choice.spec.name, (choice.spec,))
    parts = quantized.part_specs(_as_linear(choice), options.block_size, options.double_quant)
    return Group(choice.spec.name, tuple(parts))


def _check_names(checkpoint: Checkpoint, groups: dict[str, Group]) -> None:
    """Refuse a source with a tensor that has the name of a part of a quantized weight."""
    for group in groups.values():
        for spec in group.specs:
            if spec.name != group.source and spec.name in groups:
                raise CheckpointError(
                    f"{checkpoint.root}: tensor {spec.name!r} has the name of a part of {group.source!r} in NF4",
                    hint="leave that one in 16 bits with --skip, or remove the stray tensor",
                )


def _as_linear(choice: Choice) -> TensorSpec:
    """The weight as (out, in)."""
    shape = choice.spec.shape[::-1] if choice.transposed else choice.spec.shape
    return TensorSpec(choice.spec.name, choice.spec.dtype, shape)


def _make(checkpoint: Checkpoint, choice: Choice, group: Group, options: QuantizeOptions) -> Made:
    weight = checkpoint.read(choice.spec.name)
    digest = fingerprint(weight)
    try:
        check_finite(weight)  # here, so that the index is that in the file
        if choice.kept_because:
            return Made({choice.spec.name: weight}, digest)
        values = weight.T.contiguous() if choice.transposed else weight
        parts = quantized.encode(_as_linear(choice), values, options.block_size, options.double_quant)
    except NonFiniteError as error:
        raise NonFiniteError(f"{choice.spec.name}: {error.message}", error.hint) from error
    return Made(parts, digest)


def _skip_modules(choices: dict[str, Choice]) -> list[str]:
    """Linear modules that stay in 16 bits; the head is named even if it is tied and in no file."""
    return sorted({choice.module for choice in choices.values() if choice.is_kept_linear} | {"lm_head"})


def _manifest(
    out: Output,
    checkpoint: Checkpoint,
    choices: dict[str, Choice],
    groups: dict[str, Group],
    recorded: dict[str, object],
) -> Manifest:
    specs = {name: choice.spec for name, choice in choices.items()}
    base = [TensorRecord(name, "", spec.dtype, spec.shape, out.notes[name]) for name, spec in specs.items()]
    written = {tensor.name: tensor for tensor in out.tensors}
    targets = []
    for name, choice in choices.items():
        if not choice.kept_because:
            root = tensors_root(written[spec.name] for spec in groups[name].specs)
            targets.append(Target(choice.module, choice.spec.shape, out.notes[name], root))
    return Manifest(
        kind="quantized",
        operation={"name": "quantize", "options": recorded | {"format": "nf4"}},
        files=tuple(out.files),
        tensors=tuple(out.tensors),
        parents=(parent_of("base", read_manifest(checkpoint.root), base),),
        targets=tuple(targets),
    )


def _report(output: Path, choices: dict[str, Choice], groups: dict[str, Group], shards: int) -> QuantizeReport:
    encoded = [choice.spec for choice in choices.values() if not choice.kept_because]
    parameters = sum(spec.count for spec in encoded)
    return QuantizeReport(
        output=str(output),
        quantized=len(encoded),
        quantized_parameters=parameters,
        parameters=sum(choice.spec.count for choice in choices.values()),
        kept=dict(sorted(Counter(c.kept_because for c in choices.values() if c.kept_because).items())),
        bytes_before=sum(choice.spec.nbytes for choice in choices.values()),
        bytes_after=sum(group.nbytes for group in groups.values()),
        bits_per_parameter=8 * sum(groups[spec.name].nbytes for spec in encoded) / parameters,
        shards=shards,
    )
