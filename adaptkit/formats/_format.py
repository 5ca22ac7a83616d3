"""What a format of quantized weights owns: their parts in files, decoding and encoding, and its block in config.json.

    a file's tensors  -- weight_at -->  StoredWeight  -- decode(start, count) -->  values
    values  -- encode, piece by piece -->  EncodedPiece  -- Gathering.finish -->  the parts that follow the codes

A format that is only decoded is a ``Format``; one that can be written is a ``WritableFormat``. Each is the ``FORMAT``
of a file of this folder, and nothing else lists it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adaptkit import formats
from adaptkit.discovery import load, names
from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import TensorSpec

GET_AGAIN = "download the checkpoint again"


class Files(Protocol):
    """A checkpoint as formats see it; ``checkpoint.reader`` documents the functions."""

    root: Path

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Maps the tensors' names, in file order, to where they lie."""

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""

    def spec(self, name: str) -> TensorSpec:
        """Return name, type and shape of a tensor."""

    def read(self, name: str) -> Array:
        """Read a whole tensor."""

    def read_flat(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` elements from the ``start``-th on: (count,)."""

    def read_bytes(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` bytes of a tensor from the ``start``-th on: (count,) uint8."""


@dataclass(frozen=True, kw_only=True)
class StoredWeight(ABC):
    """One quantized weight as it lies in files; its parts are known to fit together.

    Attributes:
        name: of the plain weight.
        shape: of the plain weight: a matrix, or a stack of them.
        parts: names of the tensors that it is made of, that of its codes first.
        unit: the fewest consecutive weights that can be decoded.
        dtype: safetensors name of the type to decode to; None if the files do not tell it.
        input_scales: those parts that the plain weight does not depend on: scales of the inputs of products in 8 bits.
        is_linear: whether it is stored as (out, in) even if the plain checkpoint has (in, out), as of the GPT-2 family.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    unit: int
    dtype: str | None = None
    input_scales: tuple[str, ...] = ()
    is_linear: bool = False

    @abstractmethod
    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Read and decode ``count`` > 0 weights from the ``start``-th on, in whole units: (count,) of ``dtype``.

        Products are rounded once, from float32. The last unit of the weight may be short.
        """

    def too_large(self, files: Files, start: int, count: int, values: Array) -> str:
        """Say what of a run is too large for its dtype, given its decoded values, of which some are not finite.

        Returns:
            A noun, such as ``a weight``; empty if a code or a constant in the files is not finite.
        """
        return "" if (values != values).any() else "a weight"


class Format(ABC):
    """A format that can be decoded.

    Attributes:
        name: of the format, which is that of its file.
        bits: of a code.
        readers: programs beside adaptkit that load it.
        released_as: ``quant_method`` of the checkpoints that may hold such weights because models are released so,
            without a 16-bit checkpoint; empty if 16-bit checkpoints are what it is made from.
    """

    name: str
    bits: int
    readers: tuple[str, ...]
    released_as: tuple[str, ...] = ()

    @abstractmethod
    def method_shown(self, names: Collection[str]) -> str | None:
        """Return the quantization method that the names of a checkpoint's tensors show; None if not this format's."""

    @abstractmethod
    def weight_at(self, files: Files, name: str) -> StoredWeight | None:
        """Return the weight that a tensor shows: the weight's codes, or whichever part tells the format.

        Raises:
            CheckpointError: there is one, but parts are missing or do not fit together.
        """

    def is_part(self, files: Files, name: str) -> bool:
        """Whether a tensor can be nothing but a part of a weight in this format."""
        return False


@dataclass(frozen=True)
class EncodedPiece:
    """A piece of a weight.

    Attributes:
        codes: what the first part holds of the piece, as that part's type.
        constants: what its blocks or groups share; their meaning is the format's.
        moments: what the error is computed from once the constants are known; None if not requested.
    """

    codes: Array
    constants: Array
    moments: Array | None = None


class Gathering(Protocol):
    """What follows from all pieces of a weight."""

    def add(self, piece: EncodedPiece) -> None:
        """Take the next piece's constants."""

    def finish(self) -> tuple[dict[str, Array], list[float]]:
        """Return all parts but the first, by name and in the order of ``specs``, and Σ(w − q)² and Σw²."""


class WritableFormat(Format):
    """A format that can be written, too."""

    @abstractmethod
    def check(self, encoding: Encoding) -> None:
        """Refuse parameters that readers of the format do not accept.

        Raises:
            UsageError: names the parameter.
        """

    @abstractmethod
    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """Return why weights of a shape cannot be encoded; empty if they can."""

    @abstractmethod
    def specs(self, weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
        """Return the parts of a weight in the order in which they are written; the first holds its codes.

        All are aligned, and their sizes are known before any weight is read.
        """

    @abstractmethod
    def encode(self, values: Array, encoding: Encoding, measure: bool = False) -> EncodedPiece:
        """Encode a piece of a weight: whole blocks in row-major order, unless it is the last one.

        Raises:
            NonFiniteError: a value is NaN or infinite; names its index.
        """

    @abstractmethod
    def gather(self, weight: TensorSpec, encoding: Encoding) -> Gathering:
        """Begin to gather the pieces of a weight, which must have been measured."""

    @abstractmethod
    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """Return what ``encode`` makes of a piece, decoded with its own constants: float32, in the piece's shape."""

    @abstractmethod
    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """Return the ``quantization_config`` of config.json.

        Args:
            kept: full dotted paths of the linear modules that stay in 16 bits.
            encoding: of the other modules.
        """

    @abstractmethod
    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """Read what ``config_block`` or another writer of the format wrote; None if it is another format's.

        Returns:
            The encoding, with defaults for what is not told, and the paths of the modules that stay in 16 bits; None
            if none are named, which stands for the output layer.
        """


@dataclass(frozen=True)
class Encoding:
    """How a weight is quantized.

    Attributes:
        format: name of a format that can be written.
        block_size: number of weights that share one constant; a power of two from 32 to 4096.
        double_quant: whether the constants are quantized too.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        self.codec.check(self)

    @property
    def codec(self) -> WritableFormat:
        """The format."""
        if self.format not in (known := writable()):
            raise UsageError(
                f"formats: unknown name {self.format!r}", hint=f"choose one of: {', '.join(sorted(known))}"
            )
        found: WritableFormat = load(formats, self.format, "FORMAT")
        return found


@cache
def writable() -> tuple[str, ...]:
    """List the formats that can be written, the default first."""
    found = [name for name in names(formats) if isinstance(load(formats, name, "FORMAT"), WritableFormat)]
    return tuple(sorted(found, key=lambda name: (name != Encoding.format, name)))


def stated_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a configuration, or of its language model's; empty if there is none."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(found := holder.get("quantization_config"), dict):
            return found
    return {}
