"""Open a checkpoint folder and read its tensors one at a time, or piece by piece."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adaptkit.checkpoint import pages
from adaptkit.checkpoint.header import Header, TensorSpec, read_header
from adaptkit.checkpoint.layout import CONFIG_NAME, read_config, read_small, resolve_inside, side_files, weight_files
from adaptkit.errors import DISK_HINTS, CheckpointError, IntegrityError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from adaptkit.numerics.arrays import Array

_GET_AGAIN = "download or copy the checkpoint again: index and shards must be from the same save"
_KEEP_STILL = "check the disk, and run the command again when nothing writes to that folder"


@dataclass(frozen=True)
class Located:
    """A tensor and where its bytes are."""

    spec: TensorSpec
    file: str
    position: int


class TensorFiles:
    """Some safetensors files read as one set of tensors.

    Attributes:
        root: the folder.
        headers: by file name.
        tensors: by tensor name, in file order.
    """

    _beside: ClassVar[tuple[str, ...]] = ()
    """Further files whose changes count."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root = root
        self._paths = {file: resolve_inside(root, file) for file in files}
        self.headers: dict[str, Header] = {file: read_header(path) for file, path in self._paths.items()}
        self.tensors: dict[str, Located] = {}
        for file, header in self.headers.items():
            for spec, position in header.tensors:
                if spec.name in self.tensors:
                    other = self.tensors[spec.name].file
                    raise CheckpointError(
                        f"{root}: tensor {spec.name!r} is in both {other} and {file}", hint=_GET_AGAIN
                    )
                self.tensors[spec.name] = Located(spec, file, position)

    def spec(self, name: str) -> TensorSpec:
        """Name, type and shape of a tensor."""
        return self.tensors[name].spec

    def read(self, name: str) -> "Tensor":
        """Read a whole tensor, for torch."""
        return _as_tensor(self.read_array(name))

    def read_flat(self, name: str, start: int, count: int) -> "Tensor":
        """Read ``count`` elements from the ``start``-th on, in row-major order, for torch: (count,)."""
        return _as_tensor(self.read_flat_array(name, start, count))

    def read_array(self, name: str) -> "Array":
        """Read a whole tensor."""
        spec = self.spec(name)
        return self._read(self.tensors[name], 0, spec.nbytes).view(_dtype(spec)).reshape(spec.shape)

    def read_flat_array(self, name: str, start: int, count: int) -> "Array":
        """Read ``count`` elements from the ``start``-th on, in row-major order: (count,)."""
        dtype = _dtype(self.spec(name))
        return self._read(self.tensors[name], start * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def read_bytes(self, name: str, start: int, count: int) -> "Array":
        """Read ``count`` bytes of a tensor, whatever its type, from the ``start``-th on: (count,) uint8."""
        return self._read(self.tensors[name], start, count)

    def state(self) -> list[list[Any]]:
        """Sizes and modification times of the files, to notice that an input changed between two runs.

        Raises:
            IntegrityError: a file is no longer there.
        """
        try:
            found = [(file, resolve_inside(self.root, file).stat()) for file in sorted([*self.headers, *self._beside])]
        except OSError as error:
            raise _unreadable(error.filename, error) from error
        return [[file, status.st_size, status.st_mtime_ns] for file, status in found]

    def require_state(self, state: list[list[Any]]) -> None:
        """Refuse to go on with files that are no longer those that were read before.

        Raises:
            IntegrityError: a file changed since ``state``, or is no longer there.
        """
        now = self.state()
        if now != state:
            changed = next(file for (file, *before), (_, *after) in zip(state, now, strict=True) if before != after)
            raise IntegrityError(f"{self.root}: {changed} changed while it was read", hint=_KEEP_STILL)

    def _read(self, located: Located, offset: int, size: int) -> "Array":
        import numpy as np  # here, so that who reads no tensor need not wait for it

        buffer = np.empty(size, np.uint8)
        done = 0
        try:
            handle = os.open(self._paths[located.file], os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < size:
                    count = os.preadv(handle, [buffer.data[done:]], located.position + offset + done)
                    if count == 0:
                        raise IntegrityError(f"{located.file}: ends inside tensor {located.spec.name!r}", _KEEP_STILL)
                    done += count
            finally:
                os.close(handle)
        except OSError as error:
            raise _unreadable(located.file, error) from error
        return buffer


class Checkpoint(TensorFiles):
    """A Hugging Face checkpoint folder.

    Args:
        root: the folder.

    Raises:
        UsageError: not a folder.
        CheckpointError: not a checkpoint, or index and shards disagree.
        UnsafeInputError: the index points outside the folder.
    """

    _beside = (CONFIG_NAME,)

    def __init__(self, root: Path) -> None:
        files, weight_map = weight_files(root)
        super().__init__(root, files)
        if weight_map is not None:
            for name, file in weight_map.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise CheckpointError(
                        f"{root}: the index lists {name!r} in {file}, which does not contain it", hint=_GET_AGAIN
                    )
            unlisted = sorted(set(self.tensors) - set(weight_map))
            if unlisted:
                raise CheckpointError(
                    f"{root}: {unlisted[0]!r} is in {self.tensors[unlisted[0]].file} but not in the index",
                    hint=_GET_AGAIN,
                )
        if not self.tensors:
            raise CheckpointError(f"{root}: contains no tensors", hint=_GET_AGAIN)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return read_config(self.root / CONFIG_NAME)

    @property
    def quantization_method(self) -> str | None:
        """What the checkpoint is quantized with, or None."""
        quantization = self.config.get("quantization_config")
        if quantization is None:
            return None
        return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else "unknown"

    def side_contents(self) -> dict[str, bytes]:
        """The small files that travel with the weights, by name; see ``layout.side_files``."""
        return {name: read_small(path) for name, path in side_files(self.root).items()}

    def give_back(self, tensor: "Tensor") -> None:
        """Let go of the pages of a tensor that is mapped; here none is."""

    def outline(self) -> str:
        """sha256 over the configuration and all headers: what the checkpoint is like, but for the weights' values."""
        digest = hashlib.sha256(read_small(self.root / CONFIG_NAME))
        for file, header in sorted(self.headers.items()):
            digest.update(file.encode() + header.raw)
        return digest.hexdigest()


class MappedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are views of its mapped files: pages of them are read when they are touched.

    The mappings are private: what is written to a tensor does not reach the file. The files must stay as they are
    while tensors of them are alive.
    """

    def _read(self, located: Located, offset: int, size: int) -> "Array":
        import numpy as np

        start = located.position + offset
        if not size or start % _dtype(located.spec).itemsize:  # as no writer that is known aligns them
            return super()._read(located, offset, size)
        try:
            whole = self._maps.get(located.file)
            if whole is None:
                whole = np.memmap(self._paths[located.file], np.uint8, mode="c")
                self._maps[located.file] = whole
        except OSError as error:
            raise _unreadable(located.file, error) from error
        if start + size > len(whole):
            raise IntegrityError(f"{located.file}: ends inside tensor {located.spec.name!r}", hint=_KEEP_STILL)
        return whole[start : start + size]

    def give_back(self, tensor: "Tensor") -> None:
        """Let go of the pages of a tensor that is a view of a mapped file: they come back when they are touched.

        Args:
            tensor: contiguous, never written: what was written is lost.
        """
        if tensor.device.type != "cpu":
            return  # a training step asks for every weight several times
        start = tensor.data_ptr()
        for whole in self._maps.values():
            if 0 <= start - whole.ctypes.data <= len(whole) - tensor.nbytes:
                pages.give_back(start, tensor.nbytes)

    @cached_property
    def _maps(self) -> dict[str, Any]:
        """By file name."""
        return {}


def _unreadable(file: str, error: OSError) -> IntegrityError:
    return IntegrityError(f"{file}: cannot be read: {error.strerror}", DISK_HINTS.get(error.errno or 0, _KEEP_STILL))


def _dtype(spec: TensorSpec) -> "np.dtype[Any]":
    from adaptkit.checkpoint.dtypes import ARRAY_DTYPES

    return ARRAY_DTYPES[spec.dtype]


def _as_tensor(array: "Array") -> "Tensor":
    from adaptkit.numerics.arrays import as_tensor

    return as_tensor(array)
