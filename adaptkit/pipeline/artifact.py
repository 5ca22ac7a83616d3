"""Kinds of artifacts, and which of them an input of a step takes."""

from pathlib import Path
from typing import Literal

from adaptkit.checkpoint.layout import has_checkpoint, is_adapter
from adaptkit.checkpoint.quantization import is_released, packed_weights, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.documents import Place
from adaptkit.errors import CheckpointError

Kind = Literal["adapter", "unquantized checkpoint", "released checkpoint", "quantized checkpoint"]
"""A released checkpoint is one in FP8 or MXFP4; see ``foreign.is_released``."""
Takes = Literal[
    "file",
    "folder",
    "checkpoint",
    "adapter",
    "unquantized checkpoint",
    "quantized checkpoint",
    "unquantized or released checkpoint",
]
"""``folder`` is any artifact, ``checkpoint`` a quantized or unquantized one."""

_FITS = {
    ("released checkpoint", "quantized checkpoint"),
    ("released checkpoint", "unquantized or released checkpoint"),
    ("unquantized checkpoint", "unquantized or released checkpoint"),
}
_HINTS = {
    ("adapter", "checkpoint"): "to merge it into its base, add a merge step",
    ("adapter", "unquantized checkpoint"): "to merge it into its base, add a merge step",
    ("quantized checkpoint", "unquantized checkpoint"): (
        "use the 16-bit checkpoint that it was made from; if there is none, add a dequantize step"
    ),
    ("released checkpoint", "unquantized checkpoint"): "add a dequantize step, and use what it makes",
    ("quantized checkpoint", "unquantized or released checkpoint"): "use the 16-bit checkpoint that it was made from",
    ("adapter", "unquantized or released checkpoint"): "to merge it into its base, add a merge step",
    ("unquantized checkpoint", "quantized checkpoint"): "name a quantized one, such as the output of a quantize step",
    ("checkpoint", "adapter"): "to get the change from its base, add an extract step",
    ("unquantized checkpoint", "adapter"): "to get the change from its base, add an extract step",
}


def kind_of(folder: Path, *, as_adapter: bool) -> Kind:
    """Return the kind of an artifact.

    Args:
        folder: of the artifact.
        as_adapter: whether a folder that holds both an adapter and a checkpoint is an adapter.

    Raises:
        AdaptkitError: the folder holds neither a checkpoint nor an adapter.
    """
    if is_adapter(folder) and (as_adapter or not has_checkpoint(folder)):
        return "adapter"
    method = quantization_found(Checkpoint(folder))
    return "unquantized checkpoint" if method is None else _quantized_kind(method)


def check_kind(kind: Kind, takes: Takes, name: str, place: Place) -> None:
    """Check that an input takes artifacts of a kind.

    Args:
        kind: of the artifact.
        takes: what the input takes.
        name: of the artifact, in the recipe.
        place: of the input in the recipe.

    Raises:
        ConfigError: it does not take them.
    """
    may_fit = takes == "checkpoint" and kind != "adapter"
    if takes not in ("folder", kind) and not may_fit and (kind, takes) not in _FITS:
        problem = f"{name!r} is {_with_article(kind)}; expected {_with_article(takes)}"
        raise place.error(problem, hint=_HINTS.get((kind, takes), "name a source or step of that kind"))


def refuse_undecoded(folder: Path) -> None:
    """Reject a checkpoint that another tool quantized in a format that no step but dequantize reads, if any.

    Raises:
        CheckpointError: names the format.
    """
    checkpoint = Checkpoint(folder)
    method = quantization_found(checkpoint)
    if method is not None and not packed_weights(checkpoint):
        hint = "use the 16-bit checkpoint that it was made from"
        if is_released(method):
            hint = "add a dequantize step, and use what it makes"
        raise CheckpointError(f"{folder}: is quantized with {method}, which this step cannot read", hint=hint)


def _quantized_kind(method: str) -> Kind:
    return "released checkpoint" if is_released(method) else "quantized checkpoint"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
