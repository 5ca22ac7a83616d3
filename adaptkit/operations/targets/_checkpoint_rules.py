"""Rules about a checkpoint's folder that several programs share."""

from collections.abc import Iterator

from adaptkit.formats._format import stated_quantization
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._target import Finding, error_about, some


def quantization(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """Find a method that only adaptkit supports or that is not named, unfit parts, and weights of integers."""
    plain = f"run adaptkit dequantize {files.root} -o OUT, or quantize the original with --format nf4"
    if files.quantization == "adaptkit" or any(packed.is_ours for packed in files.packed):
        yield Finding(
            "error",
            "quant_method is adaptkit in config.json (int8)",
            f"{reader} does not support this layout, which only adaptkit loads",
            plain,
        )
    elif files.config.get("quantization_config") is not None and not files.names_method:
        if reader != "transformers" or not stated_quantization(files.config).get("load_in_4bit"):
            yield Finding(
                "error",
                "quantization_config in config.json names no quant_method",
                f"{reader} cannot tell how the weights are quantized",
                "restore config.json, or download the checkpoint again",
            )
    elif files.quantization is not None and not files.names_method:
        names = [packed.name for packed in files.packed]
        yield Finding(
            "error",
            f"config.json has no quantization_config, but {some(names) if names else 'the tensors'} "
            f"{'are' if len(names) != 1 else 'is'} quantized ({files.quantization})",
            f"{reader} reads the codes as weights",
            "restore config.json, or quantize the original again",
        )
    if files.unfit:
        yield Finding("error", files.unfit, f"{reader} cannot decode these weights", "download the checkpoint again")
    yield from error_about(
        files.integers,
        "weight of integers, although config.json names no quantization",
        f"{reader} expects floats, or reads the integers as weights",
        "restore config.json, or download the checkpoint again",
    )


def storage(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """Find 4-bit codes that are stored as floats."""
    if files.storage != "uint8":
        yield Finding(
            "error",
            f"bnb_4bit_quant_storage is {files.storage!r} in config.json",
            f"{reader} accepts only uint8",
            f"run adaptkit dequantize {files.root} -o OUT, and quantize the result",
        )


def stacks(files: CheckpointFiles, effect: str) -> Iterator[Finding]:
    """Find quantized stacks of experts, which only adaptkit writes."""
    names = [packed.name for packed in files.packed if packed.is_stack]
    yield from error_about(
        names,
        "quantized stack of experts",
        f"{effect}; only adaptkit loads them",
        f"quantize the original with --moe keep, or run adaptkit dequantize {files.root} -o OUT",
    )


def beside(files: CheckpointFiles, reader: str) -> Iterator[Finding]:
    """Find safetensors files that are not weights, in a folder without an index that tells them from weights."""
    if files.beside and not files.has_index:
        yield Finding(
            "error",
            f"{some(files.beside)} beside model.safetensors, without a model.safetensors.index.json",
            f"{reader} then loads every *.safetensors file in the folder as weights",
            f"load a copy of the folder without {some(files.beside)}",
        )


def tokenizer(files: CheckpointFiles, effect: str, change: str) -> Iterator[Finding]:
    """Find a folder without a tokenizer."""
    if not files.has_tokenizer:
        yield Finding("warning", "no tokenizer found in the folder", effect, change)


def model(files: CheckpointFiles, effect_of_absence: str, effect_of_shape: str) -> Iterator[Finding]:
    """Find tensors of the architecture that the files lack, or hold in another shape."""
    if files.absent:
        yield Finding(
            "error",
            f"the files lack {some(files.absent)}, which {files.architecture} has",
            effect_of_absence,
            "download the checkpoint again, or correct config.json",
        )
    if files.misshapen:
        yield Finding(
            "error",
            f"the shape differs from config.json: {some(files.misshapen)}",
            effect_of_shape,
            "correct config.json, or download it and the files from the same place",
        )
