"""The layouts of weights in the few-bit floats in which models are released: FP8 with block scales, and MXFP4.

    M.weight             F8_E4M3   [..., rows, columns]
    M.weight_scale_inv   float     [..., ceil(rows / r), ceil(columns / c)], or one number
    M.activation_scale   float     for products in 8 bits, in which a plain weight takes no part

A weight is its code times its scale, despite the name. ``weight_block_size`` in the configuration is [r, c]; if it says
nothing, blocks are of equal size. A stack X has X_scale_inv and X_activation_scale. The scales of M.weight may also be
named M.scale (DeepSeek-V4) or M.qscale_weight (Mistral), and be powers of two: F8_E8M0, or the same bytes as U8. Other
names of M.activation_scale are M.input_scale and M.qscale_act (Mistral).

    M.weight             I8        [..., rows, columns / 2]        MXFP4, two codes a byte
    M.scale              exponents [..., rows, columns / 32]       named like FP8's, which may lie beside it

    X_blocks             U8        [experts, out, in / 32, 16]     MXFP4, two codes a byte
    X_scales             U8        [experts, out, in / 32]         exponents

So gpt-oss stores its experts' weight X, which is [experts, in, out] in a 16-bit checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaptkit.checkpoint._low_precision_weights import (
    BLOCKS,
    SCALES,
    Fp8Weight,
    LowPrecisionWeight,
    Mxfp4Experts,
    Mxfp4Weight,
)
from adaptkit.checkpoint.foreign import quantization_found, stated_quantization
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.formats import _mxfp4
from adaptkit.numerics.spec import FLOATS, TensorSpec

__all__ = ["LowPrecisionWeight", "low_precision_weights"]

_SCALE, _OTHER_SCALES = "_scale_inv", ("scale", "qscale_weight")
_OF_INPUTS = ("activation_scale", "input_scale", "qscale_act")
_FP8, _FP4, _BYTES = "F8_E4M3", "I8", ("I8", "U8")
_EXPONENTS = ("F8_E8M0", "U8")
_GET_AGAIN = "download the checkpoint again"


def low_precision_weights(checkpoint: Checkpoint) -> list[LowPrecisionWeight]:
    """Find the weights of a checkpoint whose method is one of ``foreign.RELEASED``, in file order.

    Raises:
        CheckpointError: a weight lacks a part, or they do not fit together; a part belongs to no weight; or there are
            none.
    """
    found: list[LowPrecisionWeight] = []
    block = _stated_block(checkpoint)
    for name, located in checkpoint.tensors.items():
        if _is_half(checkpoint, name, BLOCKS):
            found.append(_experts(checkpoint, name.removesuffix(BLOCKS)))
        elif _holds_codes(checkpoint, located.spec):
            found.append(_scaled(checkpoint, located.spec, block))
    used = {part for weight in found for part in weight.parts}
    for name, located in checkpoint.tensors.items():
        is_scale = name.endswith((_SCALE, f".{_OTHER_SCALES[1]}", *_OF_INPUTS)) or located.spec.dtype == _EXPONENTS[0]
        if name not in used and (is_scale or _is_half(checkpoint, name, SCALES)):
            raise CheckpointError(f"{checkpoint.root}: {name} belongs to no quantized weight", hint=_GET_AGAIN)
    taken = next((w.name for w in found if w.parts[0] != w.name in checkpoint.tensors), None)
    if taken is not None:
        raise CheckpointError(f"{checkpoint.root}: {taken} is there both plain and quantized", hint=_GET_AGAIN)
    if not found:
        raise CheckpointError(
            f"{checkpoint.root}: is quantized with {quantization_found(checkpoint)} by its config.json or its tensors' "
            "names, but no weight is",
            hint="if all its weights have 16 or 32 bits, remove quantization_config from its config.json",
        )
    return found


def _is_half(checkpoint: Checkpoint, name: str, suffix: str) -> bool:
    return name.endswith(suffix) and checkpoint.spec(name).dtype == "U8"


def _holds_codes(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    """Whether a tensor holds codes: any 8-bit float that is no scale; bytes of a weight, or with scales."""
    if spec.dtype in _BYTES:
        return spec.name.endswith(".weight") or bool(_scales_named(checkpoint, spec.name))
    return spec.dtype.startswith("F8_") and spec.dtype != _EXPONENTS[0]


def _scales_named(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the names of the tensors that may hold a weight's scales."""
    begin = name.removesuffix("weight")
    others = [begin + suffix for suffix in _OTHER_SCALES] if name.endswith(".weight") else []
    return [scales for scales in (name + _SCALE, *others) if scales in checkpoint.tensors]


def _experts(checkpoint: Checkpoint, name: str) -> Mxfp4Experts:
    parts = name + BLOCKS, name + SCALES
    missing = next((part for part in parts if part not in checkpoint.tensors), None)
    if missing is not None:
        raise CheckpointError(f"{checkpoint.root}: {missing} is missing", hint=_GET_AGAIN)
    blocks, scales = map(checkpoint.spec, parts)
    fits = (*scales.shape, _mxfp4.BLOCK // 2) == blocks.shape and len(scales.shape) == 3 and scales.count and name
    if not fits or scales.dtype != "U8":
        raise CheckpointError(f"{parts[0]}: not experts in MXFP4: {_described(blocks, scales)}", hint=_GET_AGAIN)
    model_type = checkpoint.config.get("model_type")
    if model_type != "gpt_oss":  # nothing else says whether the 16-bit weight is the transposed one
        raise CheckpointError(
            f"{name}: MXFP4 in a model of type {model_type!r}, which is not supported",
            hint="only gpt_oss is known to be stored so",
        )
    experts, outputs, groups = scales.shape
    return Mxfp4Experts(name, (experts, groups * _mxfp4.BLOCK, outputs))


def _scaled(checkpoint: Checkpoint, codes: TensorSpec, stated: tuple[int, int] | None) -> Fp8Weight | Mxfp4Weight:
    """Return a weight in FP8 or MXFP4 that has the name of its codes."""
    name, what = codes.name, "MXFP4" if codes.dtype == _FP4 else "FP8"
    found = _scales_named(checkpoint, name)
    problem = "" if codes.dtype in (_FP8, _FP4) else f"{codes.dtype} instead of {_FP8}"
    if not problem and len(found) != 1:
        problem = f"both {' and '.join(found)} are there" if found else f"{name}{_SCALE} is missing"
    if problem:
        raise CheckpointError(f"{name}: not a weight in {what}: {problem}", hint="use the 16-bit checkpoint")
    scales = checkpoint.spec(found[0])
    begin = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
    beside = tuple(begin + suffix for suffix in _OF_INPUTS if begin + suffix in checkpoint.tensors)
    if codes.dtype == _FP4:
        return _mxfp4_weight(codes, scales, beside)
    block = _block(codes.shape, scales, stated)
    if block is None:
        text = f"{scales.dtype} {list(scales.shape)}" + (f" of blocks of {list(stated)}" if stated else "")
        raise CheckpointError(f"{name}: scales {text} do not fit a weight of {list(codes.shape)}", hint=_GET_AGAIN)
    return Fp8Weight(name, scales.name, codes.shape, beside, block)


def _mxfp4_weight(codes: TensorSpec, scales: TensorSpec, input_scales: Sequence[str]) -> Mxfp4Weight:
    *outer, half = codes.shape or (0,)
    fits = len(codes.shape) > 1 and codes.count and scales.shape == (*outer, 2 * half // _mxfp4.BLOCK)
    if not fits or 2 * half % _mxfp4.BLOCK or scales.dtype not in _EXPONENTS:
        raise CheckpointError(f"{codes.name}: not a weight in MXFP4: {_described(codes, scales)}", hint=_GET_AGAIN)
    return Mxfp4Weight(codes.name, scales.name, (*outer, 2 * half), tuple(input_scales))


def _described(codes: TensorSpec, scales: TensorSpec) -> str:
    return f"codes {codes.dtype} {list(codes.shape)}, scales {scales.dtype} {list(scales.shape)}"


def _stated_block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return rows and columns that share a scale according to the configuration; None if it says nothing."""
    said = stated_quantization(checkpoint.config).get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
        raise CheckpointError(
            f"{checkpoint.root}: weight_block_size is {said!r} in config.json; expected two sizes", hint=_GET_AGAIN
        )
    return said[0], said[1]


def _block(shape: tuple[int, ...], scales: TensorSpec, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return rows and columns that share a scale; None if the scales do not fit."""
    if len(shape) < 2 or scales.dtype not in (*FLOATS, *_EXPONENTS) or not math.prod(shape):
        return None
    rows, columns = shape[-2:]
    if scales.count == 1 and len(scales.shape) < 2:
        return rows, columns
    if len(scales.shape) != len(shape) or scales.shape[:-2] != shape[:-2]:
        return None
    grid = scales.shape[-2:]
    if stated is not None:
        size = min(stated[0], rows), min(stated[1], columns)
        return size if (-(-rows // size[0]), -(-columns // size[1])) == grid else None
    if 0 in grid or rows % grid[0] or columns % grid[1]:
        return None
    return rows // grid[0], columns // grid[1]
