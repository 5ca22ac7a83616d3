"""Read safetensors headers strictly, and write them deterministically.

    8 bytes    N, little-endian
    N bytes    JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [start, end]}, ...}, spaces
    the rest   the tensors' bytes; offsets count from here, with neither holes nor overlaps

The ``safetensors`` library checks lengths, offsets and overlaps. This module also rejects what the library accepts
(duplicate keys, extra fields, hostile names), and keeps the header's bytes so that a rewritten shard can reuse them.
"""

import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adaptkit.documents import REPAIR, strict_json
from adaptkit.errors import DISK_HINTS, CheckpointError
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec

_MAX_HEADER_BYTES = 100_000_000
_LONGEST_NAME = 1024
"""Limit on a tensor's name: matching a very long name with the patterns for adapters' names takes hours."""
_MAX_TENSOR_BYTES = 1 << 63
"""Limit on a tensor's size: strides must fit in 64 bits, even those of a tensor without elements."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        raw: everything before the data: the length field, the JSON and its padding.
        tensors: in file order, each with the position of its first byte in the file.
    """

    raw: bytes
    tensors: tuple[tuple[TensorSpec, int], ...]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: not a regular file, not safetensors, or ambiguous: different readers would see different
            content.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            length = file.read(8)
            raw = length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))
        if raw.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path}: is a Git LFS pointer, not the file itself", hint="run `git lfs pull` in the cloned repository"
            )
        with safe_open(path, framework="np"):
            pass  # the library checks lengths, offsets, overlaps and trailing bytes
    except (SafetensorError, OSError) as error:
        hint = DISK_HINTS.get(getattr(error, "errno", None) or 0, "download or copy the file again")
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})", hint=hint) from error
    return parse_header(raw, str(path))


def parse_header(raw: bytes, where: str) -> Header:
    """Parse the first bytes of a safetensors file whose lengths and offsets were already checked."""
    entries = strict_json(raw[8:], where)
    entries.pop("__metadata__", None)
    tensors = [(_spec(name, entry, where), len(raw) + entry["data_offsets"][0]) for name, entry in entries.items()]
    return Header(raw, tuple(sorted(tensors, key=lambda item: (item[1], item[0].name))))


def write_header(specs: Iterable[TensorSpec]) -> bytes:
    """Lay out tensors in the given order without gaps, and return the header's bytes; deterministic."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_regular(path: Path) -> None:
    """Reject anything but a regular file, without opening it: opening a FIFO would block."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        hint = "check the path and its permissions, or download or copy the file again"
        raise CheckpointError(f"{path}: {error.strerror}", hint=hint) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file", hint="put a file in its place")


def _spec(name: str, entry: Any, where: str) -> TensorSpec:
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{where}: a tensor's name has {len(name)} characters: {name[:40]!r}…", hint=REPAIR)
    plain = name.isprintable() and "/" not in name and "\\" not in name and unicodedata.is_normalized("NFC", name)
    if not name or not plain:
        raise CheckpointError(f"{where}: tensor name {name!r} is empty or has invalid characters", hint=REPAIR)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: tensor {name!r}: expected dtype, shape and data_offsets", hint=REPAIR)
    if entry["dtype"] not in ITEM_BYTES:
        raise CheckpointError(
            f"{where}: tensor {name!r} has type {entry['dtype']!r}, which is not supported",
            hint="if the model is quantized (MLX's models have U32), use the checkpoint that it was made from",
        )
    shape, nbytes = tuple(entry["shape"]), ITEM_BYTES[entry["dtype"]]
    for size in shape:  # checked per factor, since the product of very many sizes takes hours
        nbytes *= max(1, size)
        if nbytes >= _MAX_TENSOR_BYTES:
            raise CheckpointError(f"{where}: tensor {name!r}: too large, with {len(shape)} dimensions", hint=REPAIR)
    return TensorSpec(name, entry["dtype"], shape)
