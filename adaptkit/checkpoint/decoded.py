"""A quantized checkpoint read as the 16- or 32-bit one that it stands for, without writing that."""

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
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec


class DecodedCheckpoint(Checkpoint):
    """The checkpoint that ``dequantize`` would write, whose weights are decoded when they are read.

    Its tensors are located where their codes are. Reading one that is too large for its type is a NonFiniteError.

    Args:
        stored: a quantized checkpoint.
        dtype: safetensors name of the type to decode to; None for the one that the files tell, or else bfloat16, which
            models are trained in and which holds MXFP4 exactly.

    Attributes:
        stored: as above.
        method: its quantization method.
        weights: its quantized weights, by name; at least one.
        input_scales: number of its tensors that no weight needs.

    Raises:
        CheckpointError: a weight is malformed, or in a format that is not known.
    """

    def __init__(self, stored: Checkpoint, dtype: str | None = None) -> None:
        self.stored, self.root, self.headers = stored, stored.root, stored.headers
        self.method = str(quantization_found(stored))
        weights = stored_weights(stored, self.method)
        self.weights = {weight.name: weight for weight in weights}
        self.input_scales = sum(len(weight.input_scales) for weight in weights)
        self._dtype = dtype
        by_codes = {weight.parts[0]: weight for weight in weights}
        inside = {part for weight in weights for part in weight.parts[1:]}
        self.tensors = {}
        for name, located in stored.tensors.items():
            weight = by_codes.get(name)
            if weight is not None:
                spec = TensorSpec(weight.name, dtype or weight.dtype or "BF16", weight.shape)
                self.tensors[weight.name] = Located(spec, located.file, located.position)
            elif name not in inside:
                self.tensors[name] = located

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as the 16-bit checkpoint has it."""
        return without_quantization(self.stored.config)

    def outline(self) -> str:
        """Return a sha256 that is not the quantized checkpoint's own; see ``Checkpoint``."""
        return hashlib.sha256(f"{self.stored.outline()} {self._dtype or 'BF16'}".encode()).hexdigest()

    def unit(self, name: str) -> int:
        """See ``TensorFiles``."""
        weight = self.weights.get(name)
        return weight.unit if weight else 1

    def stored_bytes(self, name: str) -> int:
        """See ``TensorFiles``."""
        return sum(self.stored.spec(part).nbytes for part in self.parts(name))

    def fingerprints_of_parts(self, name: str) -> dict[str, str]:
        """Return the fingerprints of the stored tensors that a tensor is made from, by name."""
        return {part: fingerprint_in_pieces(self.stored, part) for part in self.parts(name)}

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a tensor is made from."""
        weight = self.weights.get(name)
        return weight.parts if weight else (name,)

    def _read(self, located: Located, offset: int, size: int) -> Array:
        spec = located.spec
        weight, itemsize = self.weights.get(spec.name), ITEM_BYTES[spec.dtype]
        if weight is None or not size:
            return self.stored._read(located, offset, size)
        first, last = offset // itemsize, -(-(offset + size) // itemsize)
        start = first // weight.unit * weight.unit
        count = min(-(-last // weight.unit) * weight.unit, spec.count) - start
        values = weight.decode(self.stored, start, count, ARRAY_DTYPES[spec.dtype])
        what = "" if all_finite(values) else weight.too_large(self.stored, start, count, values)
        if what:  # a broken one is for the reader
            name = {"BF16": "bfloat16", "F16": "float16"}.get(spec.dtype, "float32")
            raise NonFiniteError(
                f"{spec.name}: {what} is too large for {name}",
                hint=f"run: adaptkit dequantize {shlex.quote(str(self.root))} -o PLAIN --dtype float32; then use PLAIN",
            )
        return values.view("uint8")[offset - start * itemsize :][:size]


def open_plain(root: Path) -> Checkpoint:
    """Open a checkpoint to read its 16- or 32-bit weights; one released in few bits is decoded while it is read.

    One that is quantized otherwise is returned as it is.
    """
    checkpoint = Checkpoint(root)
    return DecodedCheckpoint(checkpoint) if is_released(quantization_found(checkpoint)) else checkpoint
