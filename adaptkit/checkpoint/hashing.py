"""Digests: sha256 says "was it tampered with", xxh3_128 "is it the same tensor".

xxh3_128 is fast and not collision-resistant, so it never decides whether to trust anything.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

if TYPE_CHECKING:
    from adaptkit.checkpoint.manifest import TensorRecord
    from adaptkit.checkpoint.reader import TensorFiles

_CHUNK_BYTES = 4 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """View a CPU tensor's elements as bytes, without copying when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprint(tensor: Tensor) -> str:
    """xxh3_128 of a tensor's bytes, in hexadecimal; dtype and shape are not part of it."""
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor))


def fingerprint_in_pieces(files: "TensorFiles", name: str) -> str:
    """The fingerprint of a tensor in a file, read piece by piece."""
    digest, spec = xxhash.xxh3_128(), files.spec(name)
    for start in range(0, spec.nbytes, _CHUNK_BYTES):
        digest.update(bytes_of(files.read_bytes(name, start, min(_CHUNK_BYTES, spec.nbytes - start))))
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in file_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def tensors_root(tensors: "Iterable[TensorRecord]") -> str:
    """One sha256 that binds name, dtype, shape and digest of a set of tensors, whatever files hold them."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {t.xxh3_128}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
