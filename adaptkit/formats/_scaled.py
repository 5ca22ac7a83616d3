"""Weights that are stored as codes under their own name, and scales beside them, as FP8 and MXFP4 are released.

M.weight             codes
M.weight_scale_inv   scales; or M.weight_scale (compressed-tensors, ModelOpt), M.scale (DeepSeek-V4),
M.qscale_weight (Mistral); of a stack X: X_scale_inv
M.activation_scale   of inputs of products in 8 bits, in which a plain weight takes no part; or M.input_scale,
M.qscale_act (Mistral); of a stack X: X_activation_scale
"""

from adaptkit.errors import CheckpointError
from adaptkit.formats._stored import Files
from adaptkit.numerics.spec import TensorSpec

EXPONENTS = ("F8_E8M0", "U8")
"""Types of scales that are powers of two: 2 ** (byte - 127)."""
_SCALE, _OTHER_SCALES = "_scale_inv", ("weight_scale", "scale", "qscale_weight")
_OF_INPUTS = ("activation_scale", "input_scale", "qscale_act")


def scales_named(files: Files, name: str) -> list[str]:
    """Return the names of the tensors that may hold a weight's scales."""
    begin = name.removesuffix("weight")
    others = [begin + suffix for suffix in _OTHER_SCALES] if name.endswith(".weight") else []
    return [scales for scales in (name + _SCALE, *others) if scales in files.tensors]


def scales_of(files: Files, name: str, what: str, problem: str = "") -> tuple[TensorSpec, tuple[str, ...]]:
    """Return the spec of a weight's scales, and the names of the scales of its inputs.

    Args:
        files: that hold them.
        name: of the weight.
        what: the format's name, for messages.
        problem: what is wrong with the codes, if anything.

    Raises:
        CheckpointError: there is a problem, or there are no scales, or two tensors of them.
    """
    found = scales_named(files, name)
    if not problem and len(found) != 1:
        problem = f"both {' and '.join(found)} are there" if found else f"{name}{_SCALE} is missing"
    if problem:
        raise CheckpointError(f"{name}: not a weight in {what}: {problem}", hint="use the 16-bit checkpoint")
    begin = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
    return files.spec(found[0]), tuple(begin + end for end in _OF_INPUTS if begin + end in files.tensors)


def is_scale(files: Files, name: str) -> bool:
    """Whether a tensor can only be the scales of a weight or of inputs."""
    return (
        name.endswith((_SCALE, ".weight_scale", ".qscale_weight", *_OF_INPUTS))
        or files.spec(name).dtype == EXPONENTS[0]
    )


def is_nvfp4(files: Files, name: str) -> bool:
    """Whether a tensor of bytes holds the codes of a weight in ModelOpt's layout of NVFP4."""
    return f"{name}_scale_2" in files.tensors


def described(codes: TensorSpec, scales: TensorSpec) -> str:
    """Describe two parts that do not fit together."""
    return f"codes {codes.dtype} {list(codes.shape)}, scales {scales.dtype} {list(scales.shape)}"
