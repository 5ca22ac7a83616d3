"""The options of quantizing and calibrating a checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptkit.arguments import as_paths, as_texts, typed_fields
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.errors import UsageError
from adaptkit.formats._format import Encoding
from adaptkit.models.kinds import MOE
from adaptkit.operations._shards import check_shard_size
from adaptkit.operations._threads import check_threads
from adaptkit.wording import counted


@dataclass(frozen=True)
class Calibration:
    """Text to run through the model, and how to use the measurements.

    Attributes:
        files: text, or rows; see ``data.windows``.
        tokens: largest number of tokens to read.
        window: tokens per sequence.
        init_rank: rank of a companion adapter that offsets part of the quantization error; None for no adapter.
        bits_budget: average bits per weight over the quantized matrices; bits beyond the plan's go where they save
            most. None for no upgrades.
        compensate: round columns one after the other, each compensating for the error of those before it, instead of
            each weight to the nearest level; takes more time, and memory quadratic in the number of a layer's inputs.
    """

    files: tuple[Path, ...]
    tokens: int = 8192
    window: int = 512
    init_rank: int | None = None
    bits_budget: float | None = None
    compensate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", as_paths(self.files, "files"))
        typed_fields(self)
        if not self.files:
            raise UsageError("calibration: no text given", hint="add --calibrate FILE")
        if self.window < 2 or self.tokens < 2:
            raise UsageError(
                f"calibration on {counted(self.tokens, 'token')} in windows of {self.window}: both must be at least 2"
            )
        if self.init_rank is not None and self.init_rank < 1:
            raise UsageError(f"init_rank: must be at least 1, found {self.init_rank}")
        if self.bits_budget is not None and not 4 < self.bits_budget < 16:
            raise UsageError(
                f"bits_budget: must be between 4 and 16, found {self.bits_budget}",
                hint="for example, --bits-budget 4.5",
            )

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        return asdict(self) | {"files": [file_sha256(file) for file in self.files]}


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        format: nf4, fp4 or int8; bitsandbytes loads the first two.
        block_size: weights sharing one constant; a power of two from 32 to 4096.
        double_quant: quantize the constants too.
        skip: shell patterns of module paths that stay in 16 bits.
        include_head: quantize the output layer too.
        moe: ``keep`` experts in 16 bits, or ``quantize`` them for adaptkit's own trainer.
        max_shard_bytes: largest size of a shard, unless a single tensor is larger.
        threads: number of pieces encoded at a time; one per processor if None. The result does not depend on it.
        calibration: choose constants and codes from the inputs of linear layers on a text; only for nf4.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()
    include_head: bool = False
    moe: str = "keep"
    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        typed_fields(self)
        object.__setattr__(self, "skip", as_texts(self.skip, "skip"))
        check_shard_size(self.max_shard_bytes)
        check_threads(self.threads)
        if self.moe not in MOE:
            raise UsageError(f"moe: must be one of {', '.join(MOE)}, found {self.moe!r}")
        if self.calibration is not None and self.format != "nf4":
            raise UsageError(
                f"calibration: needs format nf4, found {self.format}", hint="leave out --calibrate, or use --format nf4"
            )
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """How a weight is quantized."""
        return Encoding(self.format, self.block_size, self.double_quant)

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        values = {name: value for name, value in asdict(self).items() if name not in {"threads", "calibration"}}
        values["skip"] = sorted(set(self.skip))
        return values | ({"calibration": self.calibration.recorded()} if self.calibration else {})
