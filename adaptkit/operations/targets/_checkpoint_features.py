"""What programs handle differently in checkpoints, and the answers that they share."""

from collections.abc import Iterator

from adaptkit.checkpoint.layout import INDEX_NAME, read_json
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._checkpoint_formats import of_formats
from adaptkit.operations.targets._target import Response, Sighting, error, seen, some

_INTEGERS = ("I", "U", "BOOL")
CORRECT = "download the checkpoint again, or correct config.json"
SAME_PLACE = "correct config.json, or download it and the files from the same place"
KEEP_EXPERTS = "quantize the original with --moe keep, or run adaptkit dequantize {root} -o OUT"
_RESTORE = "restore config.json, or download the checkpoint again"
ALL_PROGRAMS: dict[str, Response] = {
    "no method": error("{program} cannot tell how the weights are quantized", _RESTORE),
    "load_in_4bit": error("{program} cannot tell how the weights are quantized", _RESTORE),
    "not stated": error("{program} reads the codes as weights", "restore config.json, or quantize the original again"),
    "unfit parts": error("{program} cannot decode these weights", "download the checkpoint again"),
    "integers": error("{program} expects floats, or reads the integers as weights", _RESTORE),
    "absent": error("{program} silently computes with uninitialized memory", CORRECT),
    "other shape": error("{program} fails: the shapes differ", SAME_PLACE),
}
_TO_INTEGERS = "run adaptkit dequantize {root} -o OUT, and quantize that with --format w4a16"
SERVERS = ALL_PROGRAMS | {
    "gptq order": error("{program} reads GPTQ only without desc_act", _TO_INTEGERS),
    "gptq zero points": error("{program} reads GPTQ only without zero points", _TO_INTEGERS),
    "gptq bits": error("{program} reads GPTQ only in 4 and 8 bits", _TO_INTEGERS),
    "factors differ": error(
        "{program} uses the largest for all of them, and decodes wrong values",
        "quantize the original with adaptkit quantize --format nvfp4, which shares them",
    ),
    "fused in part": error(
        "{program} joins them into one matrix, and fails unless all of it is quantized",
        "quantize the original with --skip for all of them or none",
    ),
    "other groups": error("{program}'s kernels read groups of 32, 64 and 128, and whole rows", _TO_INTEGERS),
    "float storage": error(
        "{program} accepts only uint8", "run adaptkit dequantize {root} -o OUT, and quantize the result"
    ),
    "quantized stack": error("{program} does not support such stacks; only adaptkit loads them", KEEP_EXPERTS),
    "files beside": error(
        "{program} then loads every *.safetensors file in the folder as weights",
        "load a copy of the folder without {beside}",
    ),
}
"""Answers that vLLM and SGLang share."""


def of_checkpoint(files: CheckpointFiles) -> Iterator[Sighting]:
    """Find the features that a checkpoint's folder, its configuration and its headers tell."""
    checkpoint, is_stated = files.checkpoint, files.config.get("quantization_config") is not None
    if is_stated and not files.names_method:
        feature = "load_in_4bit" if files.stated.get("load_in_4bit") else "no method"
        yield Sighting(feature, "quantization_config in config.json names no quant_method")
    elif files.quantization is not None and not files.names_method:
        names = [packed.name for packed in files.packed]
        what = f"{some(names) if names else 'the tensors'} {'is' if len(names) == 1 else 'are'} quantized"
        yield Sighting("not stated", f"config.json has no quantization_config, but {what} ({files.quantization})")
    if files.unfit:
        yield Sighting("unfit parts", files.unfit)
    dtypes = {} if files.quantization else {name: checkpoint.spec(name).dtype for name in checkpoint.tensors}
    integers = [name for name, dtype in dtypes.items() if name.endswith("weight") and dtype.startswith(_INTEGERS)]
    yield from seen("integers", integers, "weight of integers, although config.json names no quantization")
    if files.quantization == "bitsandbytes":
        yield Sighting("bitsandbytes", "quant_method is bitsandbytes in config.json")
        storage = str(files.stated.get("bnb_4bit_quant_storage") or "uint8")  # dtype of the tensors of codes
        if storage != "uint8":
            yield Sighting("float storage", f"bnb_4bit_quant_storage is {storage!r} in config.json")
    yield from of_formats(files)
    stacks = [packed.name for packed in files.packed if packed.is_stack]
    yield from seen("quantized stack", stacks, "quantized stack of experts")
    experts = [packed.name for packed in files.packed if packed.is_expert]
    yield from seen("quantized expert", experts, "quantized expert")
    if not (files.root / INDEX_NAME).is_file():  # which tells weights from other files
        others = [path.name for path in files.root.glob("*.safetensors") if path.name not in checkpoint.headers]
        beside = some(others) if others else ""
        yield from seen("files beside", others, f"{{}} beside model.safetensors, without a {INDEX_NAME}", beside=beside)
    elif "metadata" not in read_json(files.root / INDEX_NAME):
        yield Sighting("no metadata", f"{INDEX_NAME} has no metadata")
    yield from seen("absent", files.absent, f"the files lack {{}}, which {files.architecture} has")
    yield from seen("other shape", files.misshapen, "the shape differs from config.json: {}")
    if not files.has_tokenizer:
        yield Sighting("no tokenizer", "no tokenizer found in the folder")
