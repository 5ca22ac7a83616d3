"""A checkpoint's folder as other programs see it: which files they would open, and how weights are quantized."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.layout import INDEX_NAME
from adaptkit.checkpoint.reader import Checkpoint

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Packed:
    """A quantized weight.

    Attributes:
        name: in the file.
        format: nf4, fp4 or int8.
        is_expert: whether it is one of several experts' matrices, or a stack of them.
        is_stack: whether it is a stack.
    """

    name: str
    format: str
    is_expert: bool
    is_stack: bool


@dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint's folder holds.

    Attributes:
        root: the folder.
        config: ``config.json``.
        quantization: by which method it is quantized, told by configuration or tensors; None if it is not.
        says_so: whether ``config.json`` names a method.
        packed: weights in the layout of bitsandbytes or of adaptkit.
        has_index: whether an index says which files hold the weights.
        beside: names of safetensors files in the folder that do not.
        has_tokenizer: whether there is one.
    """

    root: Path
    config: Mapping[str, Any]
    quantization: str | None
    says_so: bool
    packed: tuple[Packed, ...]
    has_index: bool
    beside: tuple[str, ...]
    has_tokenizer: bool

    @property
    def storage(self) -> str:
        """The type that bitsandbytes' configuration gives to the tensors of codes."""
        given = self.config.get("quantization_config")
        return str(given.get("bnb_4bit_quant_storage") or "uint8") if isinstance(given, dict) else "uint8"


def read_checkpoint_files(root: Path) -> CheckpointFiles:
    """Look into a checkpoint's folder.

    Raises:
        UsageError, CheckpointError: not a checkpoint, or a broken one.
    """
    checkpoint = Checkpoint(root)
    quantization = quantization_found(checkpoint)
    return CheckpointFiles(
        root=root,
        config=checkpoint.config,
        quantization=quantization,
        says_so=checkpoint.quantization_method is not None,
        packed=tuple(_packed(checkpoint)) if quantization else (),
        has_index=(root / INDEX_NAME).is_file(),
        beside=tuple(sorted(path.name for path in root.glob("*.safetensors") if path.name not in checkpoint.headers)),
        has_tokenizer=any((root / name).is_file() for name in _TOKENIZERS),
    )


def _packed(checkpoint: Checkpoint) -> Iterator[Packed]:
    from adaptkit.checkpoint.quantized import quantized_names, read_outline  # here, since they wait for torch

    for name in quantized_names(checkpoint):
        outline = read_outline(checkpoint, name)
        stack = len(outline.shape) == 3
        yield Packed(name, outline.encoding.format, stack or ".experts." in name, stack)
