"""A checkpoint's folder as other programs see it: how weights are quantized, and whether they fit the architecture."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.quantization import is_released, quantization_found, stated_method
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.tokenizer_files import has_tokenizer
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._format import stated_quantization
from adaptkit.models.architecture import empty_network, named_network, why_unsupported
from adaptkit.models.naming import missing_parameters, places, shape_in
from adaptkit.operations._roles import stores_transposed


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight in the layout of bitsandbytes.

    Attributes:
        name: its name in the file.
        shape: shape of the dequantized weight.
        block_size: number of weights that share one constant.
    """

    name: str
    shape: tuple[int, ...]
    block_size: int

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts."""
        return len(self.shape) == 3

    @property
    def is_expert(self) -> bool:
        """Whether it is the matrix of one expert, or a stack of experts."""
        return self.is_stack or ".experts." in self.name


@dataclass(frozen=True)
class CheckpointFiles:
    """Contents of a checkpoint's folder.

    Attributes:
        checkpoint: its headers.
        quantization: quantization method, from the configuration or the tensors; None if it is not quantized.
        packed: quantized weights.
        architecture: transformers' model class that the files were compared with; empty if there was no comparison.
        absent: parameters of that model that the files lack.
        misshapen: tensors whose shape differs from the model's, with both shapes, for messages.
    """

    checkpoint: Checkpoint
    quantization: str | None
    packed: tuple[PackedTensor, ...]
    architecture: str = ""
    absent: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder."""
        return self.checkpoint.root

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json``."""
        return self.checkpoint.config

    @property
    def stated(self) -> Mapping[str, Any]:
        """What ``config.json`` says about the quantization; empty if nothing."""
        return stated_quantization(self.config)

    @property
    def names_method(self) -> bool:
        """Whether ``config.json`` names the method."""
        return self.stated.get("quant_method") is not None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return has_tokenizer(self.root)

    @property
    def unfit(self) -> str:
        """Why ``dequantize`` could not read a checkpoint whose layout it knows; other programs know further ones."""
        is_fp8 = self.quantization == "fp8" and any(name.endswith("_scale_inv") for name in self.checkpoint.tensors)
        is_gpt_oss = self.quantization == "mxfp4" and self.config.get("model_type") == "gpt_oss"
        is_integers = self.quantization in ("gptq", "awq") or self.stated.get("format") == "pack-quantized"
        if is_fp8 or is_gpt_oss or is_integers:
            from adaptkit.formats._find import stored_weights  # imported here: loads numpy

            try:
                stored_weights(self.checkpoint, self.quantization)
            except CheckpointError as error:
                return error.message
        return ""


def read_checkpoint_files(root: Path) -> CheckpointFiles:
    """Read the configuration and headers in a checkpoint's folder, and compare them with the model of transformers.

    Raises:
        UsageError, CheckpointError: not a checkpoint, or a broken one.
    """
    checkpoint = Checkpoint(root)
    quantization = stated_method(checkpoint.config) or quantization_found(checkpoint)
    packed = tuple(_packed(checkpoint)) if quantization else ()
    files = CheckpointFiles(checkpoint, quantization, packed)
    shapes = {name: located.spec.shape for name, located in checkpoint.tensors.items()}
    if quantization and not packed:
        shapes = _decoded_shapes(checkpoint, quantization)
    if why_unsupported(checkpoint) or not shapes:
        return files
    try:
        network = named_network(checkpoint) or empty_network(checkpoint)
    except UsageError:  # transformers cannot build this configuration; other programs may
        return files
    for weight in packed:  # (out, in), also for Conv1D
        shapes[weight.name] = weight.shape[::-1] if stores_transposed(checkpoint, weight.name) else weight.shape
    found = places(network, shapes)
    wanted = {name: shape for name, place in found.items() if (shape := shape_in(network, place)) is not None}
    misshapen = tuple(
        f"{name} (expected {list(shape)}, found {list(shapes[name])})"
        for name, shape in wanted.items()
        if shape != shapes[name]
    )
    absent = tuple(missing_parameters(network, found))
    return CheckpointFiles(checkpoint, quantization, packed, type(network).__name__, absent, misshapen)


def _decoded_shapes(checkpoint: Checkpoint, method: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what ``dequantize`` would write; empty if it does not read the method."""
    from adaptkit.checkpoint.decoded import DecodedCheckpoint  # imported here: loads numpy

    if not is_released(method):
        return {}
    try:
        decoded = DecodedCheckpoint(checkpoint)
    except CheckpointError:  # reported as unfit parts, or in a layout that other programs may know
        return {}
    return {name: located.spec.shape for name, located in decoded.tensors.items()}


def _packed(checkpoint: Checkpoint) -> Iterator[PackedTensor]:
    from adaptkit.formats._find import quantized_names, read_outline  # imported here: loads numpy

    for name in quantized_names(checkpoint):
        outline = read_outline(checkpoint, name)
        yield PackedTensor(name, outline.shape, outline.encoding.block_size)
