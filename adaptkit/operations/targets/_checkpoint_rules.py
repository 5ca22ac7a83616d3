"""What several programs trip over in a checkpoint's folder."""

from collections.abc import Iterator

from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._target import Finding, some


def quantization(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """A method that only adaptkit has, or none in the configuration though the tensors are quantized."""
    plain = f"adaptkit dequantize {files.root} -o OUT, or quantize the original with --format nf4"
    if files.quantization == "adaptkit" or any(packed.format == "int8" for packed in files.packed):
        yield Finding(
            "error",
            "quant_method is adaptkit in config.json (int8)",
            f"{reader} does not know this layout, which only adaptkit reads",
            plain,
        )
    elif files.quantization is not None and not files.says_so:
        names = [packed.name for packed in files.packed]
        yield Finding(
            "error",
            f"config.json has no quantization_config, but {some(names) if names else 'the tensors'} "
            f"{'are' if len(names) != 1 else 'is'} quantized ({files.quantization})",
            f"{reader} takes the codes for weights",
            "get config.json again, or quantize the original anew",
        )


def storage(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """Codes of 4 bits that say they were floats."""
    if files.storage != "uint8":
        yield Finding(
            "error",
            f"bnb_4bit_quant_storage is {files.storage!r} in config.json",
            f"{reader} takes uint8 alone",
            f"adaptkit dequantize {files.root} -o OUT, and quantize that",
        )


def stacks(files: CheckpointFiles, effect: str) -> Iterator[Finding]:
    """Quantized stacks of experts, which only adaptkit packs."""
    names = [packed.name for packed in files.packed if packed.is_stack]
    if names:
        yield Finding(
            "error",
            f"{some(names)}: experts quantized in stacks",
            f"{effect}; only adaptkit reads them",
            f"quantize the original with --moe keep, or adaptkit dequantize {files.root} -o OUT",
        )


def beside(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """Safetensors files that are no weights, in a folder without an index that says so."""
    if files.beside and not files.has_index:
        yield Finding(
            "error",
            f"{some(files.beside)} beside model.safetensors, and no model.safetensors.index.json",
            f"{reader} then loads every *.safetensors in the folder as weights",
            f"give it a copy of the folder without {some(files.beside)}",
        )


def tokenizer(files: CheckpointFiles, effect: str, change: str) -> Iterator[Finding]:
    """No tokenizer in the folder."""
    if not files.has_tokenizer:
        yield Finding("warning", "there is no tokenizer in the folder", effect, change)


def model(files: CheckpointFiles, effect_of_absence: str, effect_of_shape: str) -> Iterator[Finding]:
    """Tensors that the architecture has and the files lack, or hold in another shape."""
    if files.absent:
        yield Finding(
            "error",
            f"the files lack {some(files.absent)}, which {files.architecture} has",
            effect_of_absence,
            "get the checkpoint again, or make config.json say what the files hold",
        )
    if files.misshapen:
        yield Finding(
            "error",
            f"{some(files.misshapen)} by config.json",
            effect_of_shape,
            "make config.json say what the files hold, or get both from one place",
        )
