"""A checkpoint's folder as other programs see it: which files they open, and how weights are quantized."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.layout import INDEX_NAME, read_json
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.tokenizer_files import has_tokenizer
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._format import stated_quantization
from adaptkit.models.architecture import empty_network, named_network, why_unsupported
from adaptkit.models.naming import missing_parameters, places, shape_in
from adaptkit.operations._roles import stores_transposed


@dataclass(frozen=True)
class Packed:
    """A quantized weight.

    Attributes:
        name: its name in the file.
        is_ours: whether only adaptkit reads its format.
        is_expert: whether it is the matrix of one expert, or a stack of experts.
        shape: shape of the dequantized weight.
        block_size: number of weights that share one constant.
    """

    name: str
    is_ours: bool
    is_expert: bool
    shape: tuple[int, ...]
    block_size: int

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class CheckpointFiles:
    """Contents of a checkpoint's folder.

    Attributes:
        root: the folder.
        config: ``config.json``.
        quantization: quantization method, from the configuration or the tensors; None if it is not quantized.
        names_method: whether ``config.json`` names the method.
        packed: quantized weights in the layout of bitsandbytes or of adaptkit.
        unfit: why the parts of released FP8 or MXFP4 weights do not fit together; empty if they do.
        integers: weights of integers in a checkpoint that is not quantized.
        has_index: whether there is an index of the weight files.
        lacks_metadata: whether that index has no metadata.
        beside: names of safetensors files in the folder that are not weight files of the checkpoint.
        has_tokenizer: whether the folder has a tokenizer.
        architecture: transformers' model class that the files were compared with; empty if there was no comparison.
        absent: parameters of that model that the files lack.
        misshapen: tensors whose shape differs from the model's, with both shapes, for messages.
    """

    root: Path
    config: Mapping[str, Any]
    quantization: str | None
    names_method: bool
    packed: tuple[Packed, ...]
    unfit: str
    integers: tuple[str, ...]
    has_index: bool
    lacks_metadata: bool
    beside: tuple[str, ...]
    has_tokenizer: bool
    architecture: str
    absent: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def storage(self) -> str:
        """Dtype that bitsandbytes' configuration gives the tensors of codes."""
        given = self.config.get("quantization_config")
        return str(given.get("bnb_4bit_quant_storage") or "uint8") if isinstance(given, dict) else "uint8"


def read_checkpoint_files(root: Path) -> CheckpointFiles:
    """Read the configuration and headers in a checkpoint's folder.

    Raises:
        UsageError, CheckpointError: not a checkpoint, or a broken one.
    """
    checkpoint = Checkpoint(root)
    quantization = checkpoint.quantization_method or quantization_found(checkpoint)
    packed = tuple(_packed(checkpoint)) if quantization else ()
    has_index = (root / INDEX_NAME).is_file()
    architecture, lacking, misshapen = _beside_model(checkpoint, packed, quantization)
    return CheckpointFiles(
        root=root,
        config=checkpoint.config,
        quantization=quantization,
        names_method=stated_quantization(checkpoint.config).get("quant_method") is not None,
        packed=packed,
        unfit=_unfit(checkpoint, quantization),
        integers=tuple(
            sorted(name for name in checkpoint.tensors if not quantization and _is_integer(checkpoint, name))
        ),
        has_index=has_index,
        lacks_metadata=has_index and "metadata" not in read_json(root / INDEX_NAME),
        beside=tuple(sorted(path.name for path in root.glob("*.safetensors") if path.name not in checkpoint.headers)),
        has_tokenizer=has_tokenizer(root),
        architecture=architecture,
        absent=lacking,
        misshapen=misshapen,
    )


def _packed(checkpoint: Checkpoint) -> Iterator[Packed]:
    from adaptkit.formats._find import quantized_names, read_outline  # imported here: loads numpy

    for name in quantized_names(checkpoint):
        outline = read_outline(checkpoint, name)
        is_expert = len(outline.shape) == 3 or ".experts." in name
        yield Packed(name, not outline.form.readers, is_expert, outline.shape, outline.encoding.block_size)


def _unfit(checkpoint: Checkpoint, quantization: str | None) -> str:
    """Return why ``dequantize`` could not read FP8 with block scales or MXFP4; other programs know further layouts."""
    is_fp8 = quantization == "fp8" and any(name.endswith("_scale_inv") for name in checkpoint.tensors)
    is_mxfp4 = quantization == "mxfp4" and checkpoint.config.get("model_type") == "gpt_oss"
    if is_fp8 or is_mxfp4:
        from adaptkit.formats._find import stored_weights  # imported here: loads numpy

        try:
            stored_weights(checkpoint, quantization)
        except CheckpointError as error:
            return error.message
    return ""


def _is_integer(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a weight, not a buffer such as a mask, and of integers."""
    return name.endswith("weight") and checkpoint.spec(name).dtype.startswith(("I", "U", "BOOL"))


def _beside_model(
    checkpoint: Checkpoint, packed: Sequence[Packed], quantization: str | None
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Compare the files with the model that transformers builds: return its class, absent and misshapen tensors."""
    if why_unsupported(checkpoint) or (quantization and not packed):  # other methods' tensors are not decoded here
        return "", (), ()
    try:
        network = named_network(checkpoint) or empty_network(checkpoint)
    except UsageError:  # transformers cannot build this configuration; other programs may
        return "", (), ()
    shapes = {name: located.spec.shape for name, located in checkpoint.tensors.items()}
    for weight in packed:  # (out, in), also for Conv1D
        shapes[weight.name] = weight.shape[::-1] if stores_transposed(checkpoint, weight.name) else weight.shape
    found = places(network, shapes)
    wanted = {name: shape_in(network, place) for name, place in found.items()}
    misshapen = tuple(
        f"{name} (expected {list(shape)}, found {list(shapes[name])})"
        for name, shape in wanted.items()
        if shape is not None and shape != shapes[name]
    )
    return type(network).__name__, tuple(missing_parameters(network, found)), misshapen
