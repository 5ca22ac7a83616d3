"""A checkpoint released in few bits, as FP8, MXFP4 or GPTQ, read as the 16-bit one that it stands for, unwritten."""

import hashlib
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.quantization import is_released, quantization_found, without_quantization
from adaptkit.checkpoint.reader import Checkpoint, Located
from adaptkit.errors import NonFiniteError
from adaptkit.formats._find import stored_weights
from adaptkit.formats._stored import StoredWeight
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec

_DTYPE = "BF16"
"""What models are trained in; it holds MXFP4 exactly, and is ``dequantize``'s default."""


class ReleasedCheckpoint(Checkpoint):
    """The checkpoint that ``dequantize`` would write, whose weights are decoded when they are read.

    Its tensors are located where their codes are. Reading one that is too large for bfloat16 is a NonFiniteError.

    Attributes:
        release: a checkpoint in one of the methods ``foreign.is_released``.
        weights: its weights in few bits, by name; at least one.
        input_scales: number of tensors of the release that no weight needs.
    """

    def __init__(self, release: Checkpoint, weights: list[StoredWeight], method: str) -> None:
        self.release, self.root, self.method = release, release.root, method
        self.headers = release.headers
        self.weights = {weight.name: weight for weight in weights}
        self.input_scales = sum(len(weight.input_scales) for weight in weights)
        by_codes = {weight.parts[0]: weight for weight in weights}
        inside = {part for weight in weights for part in weight.parts[1:]}
        self.tensors = {}
        for name, located in release.tensors.items():
            weight = by_codes.get(name)
            if weight is not None:
                spec = TensorSpec(weight.name, _DTYPE, weight.shape)
                self.tensors[weight.name] = Located(spec, located.file, located.position)
            elif name not in inside:
                self.tensors[name] = located

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as the 16-bit checkpoint has it."""
        return without_quantization(self.release.config)

    def outline(self) -> str:
        """Return a sha256 that is not the release's own; see ``Checkpoint``."""
        return hashlib.sha256(f"{self.release.outline()} {_DTYPE}".encode()).hexdigest()

    def unit(self, name: str) -> int:
        """See ``TensorFiles``."""
        weight = self.weights.get(name)
        return weight.unit if weight else 1

    def stored_bytes(self, name: str) -> int:
        """See ``TensorFiles``."""
        return sum(self.release.spec(part).nbytes for part in self._parts(name))

    def fingerprints_of_parts(self, name: str) -> dict[str, str]:
        """Return the fingerprints of the tensors in the release that a tensor is made from, by name."""
        return {part: fingerprint_in_pieces(self.release, part) for part in self._parts(name)}

    def _parts(self, name: str) -> tuple[str, ...]:
        weight = self.weights.get(name)
        return weight.parts if weight else (name,)

    def _read(self, located: Located, offset: int, size: int) -> Array:
        weight, itemsize = self.weights.get(located.spec.name), ITEM_BYTES[located.spec.dtype]
        if weight is None or not size:
            return self.release._read(located, offset, size)
        first, last = offset // itemsize, -(-(offset + size) // itemsize)
        start, stop = first // weight.unit * weight.unit, -(-last // weight.unit) * weight.unit
        values = weight.decode(self.release, start, stop - start, ARRAY_DTYPES[_DTYPE])
        what = "" if all_finite(values) else weight.too_large(self.release, start, stop - start, values)
        if what:  # a broken one is for the reader
            raise NonFiniteError(
                f"{weight.name}: {what} is too large for bfloat16",
                hint=f"run: adaptkit dequantize {shlex.quote(str(self.root))} -o PLAIN --dtype float32; then use PLAIN",
            )
        return values.view("uint8")[offset - start * itemsize :][:size]


def open_plain(root: Path) -> Checkpoint:
    """Open a checkpoint to read its 16- or 32-bit weights; one released in few bits is decoded while it is read.

    One that is quantized otherwise is returned as it is.
    """
    checkpoint = Checkpoint(root)
    if not is_released(method := quantization_found(checkpoint)):
        return checkpoint
    return ReleasedCheckpoint(checkpoint, stored_weights(checkpoint, method), str(method))
