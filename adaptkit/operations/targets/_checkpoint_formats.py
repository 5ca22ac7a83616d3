"""Features of checkpoints in formats that servers run, as far as programs differ in which of them they read.

Sources: vLLM 0.33 and SGLang 0.5.23 (their ``compressed_tensors``, ``gptq_marlin``, ``awq`` and ``modelopt`` modules),
transformers 5.24 (its ``quantizers``).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._target import Sighting, seen

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that servers join into one matrix."""
_GROUP_SIZES = (32, 64, 128)
_BLOCK = 128


def of_formats(files: CheckpointFiles) -> Iterator[Sighting]:
    """Find the features of the format that a checkpoint is quantized in."""
    stated = files.stated
    if files.quantization == "compressed-tensors":
        yield Sighting("compressed-tensors", "quant_method is compressed-tensors in config.json")
        yield from _of_compressed_tensors(files, _weights_of_groups(stated))
    elif files.quantization == "gptq":
        yield Sighting("gptq", "quant_method is gptq in config.json")
        if stated.get("desc_act"):
            yield Sighting("gptq order", "desc_act is true in config.json")
        if stated.get("sym") is False:
            yield Sighting("gptq zero points", "sym is false in config.json")
        if stated.get("bits") not in (4, 8):
            yield Sighting("gptq bits", f"bits is {stated.get('bits')} in config.json")
    elif files.quantization == "awq":
        yield Sighting("awq", "quant_method is awq in config.json")
    elif files.quantization == "modelopt":
        yield Sighting("modelopt", "quant_method is modelopt in config.json")
    elif files.quantization == "fp8":
        block = stated.get("weight_block_size") or [_BLOCK, _BLOCK]
        sizes = [(name, zip(shape, block, strict=False)) for name, shape in _in_blocks(files, "_scale_inv")]
        edges = [name for name, pairs in sizes if any(size % step for size, step in pairs)]
        yield from seen("edges of blocks", edges, f"blocks of {' x '.join(map(str, block))} do not divide its shape")


def _of_compressed_tensors(files: CheckpointFiles, groups: Sequence[Mapping[str, Any]]) -> Iterator[Sighting]:
    names, form = files.checkpoint.tensors, files.stated.get("format")
    if len(groups) > 1:
        yield Sighting("several groups", f"config.json has {len(groups)} config_groups")
    bits = sorted({group["num_bits"] for group in groups if isinstance(group.get("num_bits"), int)})
    sizes = sorted({group["group_size"] for group in groups if isinstance(group.get("group_size"), int)})
    if form == "pack-quantized":
        odd = [each for each in bits if each not in (4, 8)]
        yield from seen("odd bits", [str(each) for each in odd], "bits a weight in config.json")
        other = [str(size) for size in sizes if size not in _GROUP_SIZES and size > 0]
        yield from seen("other groups", other, "weights a group in config.json")
        zeros = [name for name in names if name.endswith(".weight_zero_point")]
        yield from seen("zero points", zeros)
    if form == "mxfp4-pack-quantized":
        dense = [name for name in names if name.endswith(".weight_packed") and ".experts." not in name]
        yield from seen("dense mxfp4", dense, "MXFP4 outside experts")
    if form == "float-quantized" and any(group.get("strategy") == "block" for group in groups):
        joined = {name for group in _FUSED for name in group}
        uneven = [n for n, shape in _in_blocks(files, "_scale") if shape[0] % _BLOCK and n.split(".")[-2] in joined]
        yield from seen("uneven fused blocks", uneven, f"number of rows is not a multiple of {_BLOCK}")
    yield from seen("factors differ", list(_differing_factors(files)), "not equal to those that servers join it with")
    yield from seen("fused in part", list(_fused_in_part(files)), "not quantized, but what servers join it with is")


def _weights_of_groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    named = stated.get("config_groups")
    groups = (
        [group.get("weights") for group in named.values() if isinstance(group, dict)] if isinstance(named, dict) else []
    )
    return [group for group in groups if isinstance(group, dict)]


def _in_blocks(files: CheckpointFiles, suffix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of matrices whose scales, one for each block, have a name with this suffix."""
    for name in files.checkpoint.tensors:
        scales = files.checkpoint.tensors.get(f"{name}{suffix}")
        if scales is not None and len(scales.spec.shape) == 2:
            yield name, files.checkpoint.spec(name).shape


def _differing_factors(files: CheckpointFiles) -> Iterator[str]:
    """Yield the factors of NVFP4 weights that differ from those of weights that servers join them with."""
    end = ".weight_global_scale"
    for name in [name for name in files.checkpoint.tensors if name.endswith(end)]:
        block, _, leaf = name.removesuffix(end).rpartition(".")
        others = [f"{block}.{other}{end}" for group in _FUSED if leaf in group[1:] for other in group[:1]]
        for other in others:
            if other in files.checkpoint.tensors:
                one, two = (files.checkpoint.read(each).reshape(-1) for each in (name, other))
                if one.tolist() != two.tolist():
                    yield name


def _fused_in_part(files: CheckpointFiles) -> Iterator[str]:
    """Yield the weights in 16 bits that servers join with quantized ones."""
    names = files.checkpoint.tensors
    scaled = {name.rpartition(".")[0] for name in names if name.endswith(".weight_scale")}
    for module in scaled:
        block, _, leaf = module.rpartition(".")
        for group in _FUSED:
            if leaf in group:
                others = [f"{block}.{other}" for other in group if other != leaf]
                yield from (f"{o}.weight" for o in others if o not in scaled and f"{o}.weight" in names)
