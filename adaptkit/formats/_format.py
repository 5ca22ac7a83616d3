"""What a format of quantized weights owns: their parts in files, decoding and encoding, and its block in config.json.

    values  -- encode, piece by piece -->  EncodedPiece  -- Gathering.finish -->  the parts that follow the codes

A format that is only decoded is a ``Format``; one that can be written is a ``WritableFormat``. Each is the ``FORMAT``
of a file of this folder, and nothing else lists it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from adaptkit import formats
from adaptkit.discovery import load, names
from adaptkit.errors import UsageError
from adaptkit.formats._stored import Format
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from adaptkit.numerics.rounding import LinearInputs


@dataclass(frozen=True)
class EncodedPiece:
    """A piece of a weight.

    Attributes:
        codes: what the first part holds of the piece, as that part's type.
        constants: what its blocks or groups share; their meaning is the format's.
        zeros: zero points of its groups, as that part's type; None if there are none.
        moments: what the error is computed from once the constants are known; None if not requested.
    """

    codes: Array
    constants: Array
    zeros: Array | None = None
    moments: Array | None = None


class Gathering(Protocol):
    """What follows from all pieces of a weight."""

    def add(self, piece: EncodedPiece) -> None:
        """Take the next piece's constants."""

    def finish(self) -> tuple[dict[str, Array], list[float]]:
        """Return all parts but the first, by name and in the order of ``specs``, and Σ(w − q)² and Σw²."""


class WritableFormat(Format):
    """A format that can be written, too.

    Attributes:
        block_sizes: how many weights may share a constant, the default first; 0 stands for a row.
        has_double_quant: whether constants can be quantized, too.
        has_zero_points: whether groups can have zero points.
        shares_top: whether a constant depends on the largest magnitude of a weight and of those that servers fuse with
            it, so that these are read once more.
        can_be_calibrated: whether ``calibrated`` knows it.
        holds_conv1d: whether weights of a Conv1D, as of the GPT-2 family, can be in it.
    """

    block_sizes: tuple[int, ...]
    has_double_quant: bool = False
    has_zero_points: bool = False
    shares_top: bool = False
    can_be_calibrated: bool = True
    holds_conv1d: bool = False

    def check(self, encoding: Encoding) -> None:
        """Refuse parameters that readers of the format do not accept.

        Raises:
            UsageError: names the parameter.
        """
        if encoding.block_size not in self.block_sizes:
            known = ", ".join(map(str, sorted(self.block_sizes)))
            raise UsageError(
                f"block_size: must be one of {known} in format {self.name}, found {encoding.block_size}",
                hint="leave out --block-size",
            )
        if encoding.zero_points and not self.has_zero_points:
            raise UsageError(f"zero_points: format {self.name} has none", hint="leave out --zero-points")

    @abstractmethod
    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """Return why weights of a shape cannot be encoded; empty if they can."""

    @abstractmethod
    def unit(self, weight: TensorSpec, encoding: Encoding) -> int:
        """Return the fewest consecutive weights that can be encoded."""

    @abstractmethod
    def specs(self, weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
        """Return the parts of a weight in the order in which they are written; the first holds its codes.

        All are aligned, and their sizes are known before any weight is read.
        """

    @abstractmethod
    def encode(
        self, values: Array, weight: TensorSpec, encoding: Encoding, top: float = 0.0, measure: bool = False
    ) -> EncodedPiece:
        """Encode a piece of a weight.

        Args:
            values: whole units in row-major order, unless it is the last piece.
            weight: all of it, as (out, in).
            encoding: how it is quantized.
            top: the largest magnitude that ``shares_top`` is about.
            measure: whether to return moments.

        Raises:
            NonFiniteError: a value is NaN or infinite; names its index.
        """

    @abstractmethod
    def gather(self, weight: TensorSpec, encoding: Encoding, top: float = 0.0) -> Gathering:
        """Begin to gather the pieces of a weight, which must have been measured; see ``encode``."""

    @abstractmethod
    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """Return what ``encode`` makes of whole rows, decoded with their own constants: (rows, columns) float32."""

    @abstractmethod
    def calibrated(
        self, values: Array, weight: TensorSpec, inputs: LinearInputs, encoding: Encoding, top: float = 0.0
    ) -> tuple[dict[str, Array], Array]:
        """Encode a whole weight so that the outputs of its linear layer change little.

        Args:
            values: (out, in), finite.
            weight: the same, as (out, in).
            inputs: of the layer.
            encoding: how it is quantized.
            top: see ``encode``.

        Returns:
            All parts, by name and in the order of ``specs``; and the decoded weight, (out, in) float32.
        """

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
        block_size: number of weights that share one constant; see ``WritableFormat``.
        double_quant: whether the constants are quantized too.
        zero_points: whether groups of integers have zero points.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    zero_points: bool = False

    def __post_init__(self) -> None:
        self.codec.check(self)

    @property
    def codec(self) -> WritableFormat:
        """The format."""
        return self.codec_of(self.format)

    @staticmethod
    def codec_of(name: str) -> WritableFormat:
        """Return the format of a name.

        Raises:
            UsageError: there is none that can be written.
        """
        if name not in (known := writable()):
            raise UsageError(f"formats: unknown name {name!r}", hint=f"choose one of: {', '.join(sorted(known))}")
        found: WritableFormat = load(formats, name, "FORMAT")
        return found


def encoding_of(
    form: str, block_size: int | None = None, double_quant: bool = True, zero_points: bool = False
) -> Encoding:
    """Return an encoding with the format's own block size, if none is given, and without what the format lacks.

    Raises:
        UsageError: the format is unknown, or does not have the block size or the zero points.
    """
    codec = Encoding.codec_of(form)
    size = codec.block_sizes[0] if block_size is None else block_size
    return Encoding(form, size, double_quant and codec.has_double_quant, zero_points)


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
