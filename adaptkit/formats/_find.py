"""Which of the formats a checkpoint's weights are in: each format is asked, and no other module lists them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from adaptkit import formats
from adaptkit.discovery import load, names
from adaptkit.errors import CheckpointError
from adaptkit.formats import _blockwise_state
from adaptkit.formats._blockwise import Blockwise, BlockwiseWeight
from adaptkit.formats._format import Encoding, WritableFormat
from adaptkit.formats._stored import GET_AGAIN, Files, Format, StoredWeight


@cache
def all_formats() -> tuple[Format, ...]:
    """Return every format."""
    return tuple(load(formats, name, "FORMAT") for name in names(formats))


def released_methods() -> frozenset[str]:
    """Return the methods that some models are released in, without a 16-bit checkpoint; ``dequantize`` makes one."""
    return frozenset(method for one in all_formats() for method in one.released_as)


def method_shown(tensors: Collection[str]) -> str | None:
    """Return the quantization method of one of the formats, if tensors' names show it."""
    return next((method for one in all_formats() if (method := one.method_shown(tensors)) is not None), None)


def stated_encoding(block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
    """Read a ``quantization_config``, which may be anybody's, and empty; see ``WritableFormat.stated``."""
    writable = (one for one in all_formats() if isinstance(one, WritableFormat))
    return next((found for one in writable if (found := one.stated(block)) is not None), None)


def stored_weights(files: Files, method: str | None) -> list[StoredWeight]:
    """Find the quantized weights of a checkpoint, in file order.

    Args:
        files: the checkpoint.
        method: its quantization method.

    Returns:
        The weights; empty if they are in none of the formats.

    Raises:
        CheckpointError: a weight lacks a part, or they do not fit together; a part belongs to no weight; or there are
            none in a checkpoint whose method is one that models are released in.
    """
    asked = [one for one in all_formats() if not one.released_as or method in one.released_as]
    found = [weight for name in files.tensors for one in asked if (weight := one.weight_at(files, name)) is not None]
    used = {part for weight in found for part in weight.parts}
    for name in files.tensors:
        if name not in used and any(one.is_part(files, name) for one in asked):
            raise CheckpointError(f"{files.root}: {name} belongs to no quantized weight", hint=GET_AGAIN)
    taken = next((w.name for w in found if w.parts[0] != w.name in files.tensors), None)
    if taken is not None:
        raise CheckpointError(f"{files.root}: {taken} is there both plain and quantized", hint=GET_AGAIN)
    if not found and method in released_methods():
        raise CheckpointError(
            f"{files.root}: is quantized with {method} by its config.json or its tensors' names, but no weight is",
            hint="if all its weights have 16 or 32 bits, remove quantization_config from its config.json",
        )
    return found


def quantized_names(files: Files) -> list[str]:
    """Return the names of a checkpoint's block-wise weights, in file order."""
    known = [one.state_suffix for one in _blockwise_formats()]
    states = [name for name in files.tensors if ".quant_state." in name]
    return [name.removesuffix(suffix) for name in states for suffix in known if name.endswith(suffix)]


def read_outline(files: Files, name: str) -> BlockwiseWeight:
    """Return a block-wise weight, of which only the state is checked."""
    return _form_of(files, name).read_outline(files, name)


def read_weight(files: Files, name: str) -> BlockwiseWeight:
    """Return a block-wise weight, whose parts fit together."""
    return _form_of(files, name).read_weight(files, name)


def _blockwise_formats() -> list[Blockwise]:
    return [one for one in all_formats() if isinstance(one, Blockwise)]


def _form_of(files: Files, name: str) -> Blockwise:
    found = next((one for one in _blockwise_formats() if name + one.state_suffix in files.tensors), None)
    if found is None:
        raise CheckpointError(f"{name}: its quantization state is missing", hint=_blockwise_state.GET_AGAIN)
    return found
