"""Open a checkpoint folder, and read its tensors whole or piece by piece."""

import hashlib
import mmap
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from adaptkit.checkpoint.header import Header, read_header
from adaptkit.checkpoint.layout import CONFIG_NAME, read_config, read_small, resolve_inside, weight_files
from adaptkit.checkpoint.side_files import side_files
from adaptkit.errors import DISK_HINTS, CheckpointError, IntegrityError
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_GET_AGAIN = "download or copy the checkpoint again: index and shards must be from the same save"
_CHANGED_HINT = "check the disk, and run the command again when nothing writes to that folder"


@dataclass(frozen=True)
class Located:
    """A tensor and the location of its bytes: file name, and offset from the file's start."""

    spec: TensorSpec
    file: str
    position: int


class TensorFiles:
    """Several safetensors files in a folder, read as one set of tensors, which are in file order."""

    _extra: ClassVar[tuple[str, ...]] = ()
    """Further files that ``state`` covers."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root = root
        self._paths = {file: resolve_inside(root, file) for file in files}
        self.headers: dict[str, Header] = {file: read_header(path) for file, path in self._paths.items()}
        self.tensors: dict[str, Located] = {}
        for file, header in self.headers.items():
            for spec, position in header.tensors:
                if spec.name in self.tensors:
                    other = self.tensors[spec.name].file
                    raise CheckpointError(f"{root}: tensor {spec.name!r} is in both {other} and {file}", _GET_AGAIN)
                self.tensors[spec.name] = Located(spec, file, position)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(located.spec.nbytes for located in self.tensors.values())

    def spec(self, name: str) -> TensorSpec:
        """Return name, type and shape of a tensor."""
        return self.tensors[name].spec

    def read(self, name: str) -> Array:
        """Read a whole tensor as an array."""
        spec = self.spec(name)
        return self._view(self.tensors[name], 0, spec.nbytes).view(ARRAY_DTYPES[spec.dtype]).reshape(spec.shape)

    def read_flat(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` elements from the ``start``-th on, in row-major order, as an array: (count,)."""
        dtype = ARRAY_DTYPES[self.spec(name).dtype]
        return self._view(self.tensors[name], start * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def copy_flat(self, name: str, start: int, count: int) -> Array:
        """Read like ``read_flat``, into memory of its own even if ``read`` maps the file."""
        dtype = ARRAY_DTYPES[self.spec(name).dtype]
        array = self._read(self.tensors[name], start * dtype.itemsize, count * dtype.itemsize)
        return array.view(dtype)

    def read_bytes(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` bytes of a tensor, whatever its type, from the ``start``-th on: (count,) uint8.

        They are in memory of their own even if ``read`` maps the file: hashing a base would fill memory with its pages.
        """
        return self._read(self.tensors[name], start, count)

    def unit(self, name: str) -> int:
        """Return the number of consecutive elements that are read together at the cost of one of them; 1 in a file."""
        return 1

    def stored_bytes(self, name: str) -> int:
        """Return the size that a tensor has in the files."""
        return self.spec(name).nbytes

    def state(self) -> list[list[Any]]:
        """Return [file, size, modification time in ns] of each file, to detect that an input changed."""
        try:
            found = [(file, resolve_inside(self.root, file).stat()) for file in sorted([*self.headers, *self._extra])]
        except OSError as error:
            raise _unreadable(error.filename, error) from error
        return [[file, status.st_size, status.st_mtime_ns] for file, status in found]

    def require_state(self, state: list[list[Any]]) -> None:
        """Check that the files are as when ``state`` was taken; an IntegrityError otherwise."""
        now = self.state()
        if now != state:
            changed = next(file for (file, *before), (_, *after) in zip(state, now, strict=True) if before != after)
            raise IntegrityError(f"{self.root}: {changed} changed while it was read", hint=_CHANGED_HINT)

    def _view(self, located: Located, offset: int, size: int) -> Array:
        """Return some bytes of a tensor, in memory of their own or in a mapped file: (size,) uint8."""
        return self._read(located, offset, size)

    def _read(self, located: Located, offset: int, size: int) -> Array:
        """Read some bytes of a tensor into memory of their own: (size,) uint8."""
        buffer = np.empty(size, np.uint8)
        done = 0
        try:
            handle = os.open(self._paths[located.file], os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < size:
                    count = os.preadv(handle, [buffer.data[done:]], located.position + offset + done)
                    if count == 0:
                        raise IntegrityError(f"{located.file}: ends inside tensor {located.spec.name!r}", _CHANGED_HINT)
                    done += count
            finally:
                os.close(handle)
        except OSError as error:
            raise _unreadable(located.file, error) from error
        return buffer


class Checkpoint(TensorFiles):
    """A Hugging Face checkpoint folder; a CheckpointError if it is none, or if index and shards disagree."""

    _extra = (CONFIG_NAME,)

    def __init__(self, root: Path) -> None:
        files, weight_map = weight_files(root)
        super().__init__(root, files)
        if weight_map is not None:
            for name, file in weight_map.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    problem = f"the index lists {name!r} in {file}, which does not contain it"
                    raise CheckpointError(f"{root}: {problem}", hint=_GET_AGAIN)
            if unlisted := sorted(set(self.tensors) - set(weight_map)):
                problem = f"{unlisted[0]!r} is in {self.tensors[unlisted[0]].file} but not in the index"
                raise CheckpointError(f"{root}: {problem}", hint=_GET_AGAIN)
        if not self.tensors:
            raise CheckpointError(f"{root}: contains no tensors", hint=_GET_AGAIN)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return read_config(self.root / CONFIG_NAME)

    def side_contents(self) -> dict[str, bytes]:
        """Read the small files that are copied along with the weights, by name; see ``side_files``."""
        return {name: read_small(path) for name, path in side_files(self.root).items()}

    def release_pages(self, tensor: "Tensor") -> None:
        """Release the pages of a memory-mapped tensor; does nothing here, since no tensor is mapped."""

    def outline(self) -> str:
        """Return a sha256 over the configuration and all headers: everything except the weights' values."""
        digest = hashlib.sha256(read_small(self.root / CONFIG_NAME))
        for file, header in sorted(self.headers.items()):
            digest.update(file.encode() + header.raw)
        return digest.hexdigest()


class MappedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are views of its memory-mapped files; pages are read on first access.

    The mappings are private: writing to a tensor does not change the file. The files must not change while tensors of
    them are alive.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._maps: dict[str, mmap.mmap] = {}

    def _view(self, located: Located, offset: int, size: int) -> Array:
        start = located.position + offset
        if not size or start % ITEM_BYTES[located.spec.dtype]:  # unaligned, which no known writer produces
            return self._read(located, offset, size)
        try:
            if located.file not in self._maps:
                with self._paths[located.file].open("rb") as file:
                    self._maps[located.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise _unreadable(located.file, error) from error
        whole = np.frombuffer(self._maps[located.file], np.uint8)
        if start + size > len(whole):
            raise IntegrityError(f"{located.file}: ends inside tensor {located.spec.name!r}", hint=_CHANGED_HINT)
        return whole[start : start + size]

    def release_pages(self, tensor: "Tensor") -> None:
        """Release the pages of a contiguous view that was never written to; the next access reads them again."""
        if tensor.device.type != "cpu" or sys.platform != "linux":  # elsewhere the advice may mean something else
            return
        for whole in self._maps.values():
            start = tensor.data_ptr() - np.frombuffer(whole, np.uint8).ctypes.data
            if 0 <= start <= len(whole) - tensor.nbytes:
                first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    whole.madvise(mmap.MADV_DONTNEED, first, last - first)


def _unreadable(file: str, error: OSError) -> IntegrityError:
    return IntegrityError(f"{file}: cannot be read: {error.strerror}", DISK_HINTS.get(error.errno or 0, _CHANGED_HINT))
