"""The options of the operations on files: what each can be told, with limits and defaults, and what manifests record.

Nothing here imports torch or numpy, since ``--help`` reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.signing import Trust
from adaptkit.discovery import load, names
from adaptkit.errors import UsageError
from adaptkit.formats._format import Encoding, encoding_of, writable
from adaptkit.models.kinds import MOE
from adaptkit.numerics import stacking
from adaptkit.settings import Settings, setting, settings

if TYPE_CHECKING:
    from adaptkit.numerics.randomized import Sketching

DTYPES = ("bfloat16", "float16", "float32")
MERGE_FORMATS = ("keep", "plain", *writable())
_LARGEST_RANK = 256


def _threads() -> Any:
    return setting(
        "Pieces processed at a time; the result does not depend on it. Default: one per processor.", None, at_least=1
    )


def _max_shard_bytes() -> Any:
    help = "Largest size of a shard, unless a single tensor is larger."
    return setting(help, 5_000_000_000, at_least=1, flag="--max-shard-size", is_size=True)


def _weights() -> Any:
    return setting("Weight of each adapter, in order. Default: 1 each.", (), flag="--weight")


def _energy() -> Any:
    help = "Instead of a rank: share of each module's squared norm to keep, such as 0.99."
    return setting(help, None, above=0, at_most=1, metavar="SHARE")


def _check_rank_or_energy(rank: int | None, energy: float | None) -> None:
    """Refuse both or neither of a rank and a share of the squared norm."""
    if rank is None and energy is None:
        raise UsageError("neither a rank nor an energy share is given", hint="give --rank 16, or --energy 0.99")
    if rank is not None and energy is not None:
        raise UsageError("a rank and an energy share cannot be combined", hint="leave out --rank or --energy")


@dataclass(frozen=True)
class ThreadOptions(Settings):
    """The only option of some operations."""

    threads: int | None = _threads()


@dataclass(frozen=True)
class AdoptOptions(ThreadOptions):
    """How to adopt."""


@dataclass(frozen=True)
class Calibration(Settings):
    """Text to run through the model, and how to use the measurements; see ``data.windows`` for the files."""

    files: tuple[Path, ...] = setting(
        "Text, or rows as for train: choose constants and codes by the model's activations on it.",
        flag="--calibrate",
        metavar="FILE",
    )
    tokens: int = setting("With --calibrate: maximum number of tokens.", 8192, at_least=2, flag="--calibration-tokens")
    window: int = setting("With --calibrate: tokens per sequence.", 512, at_least=2)
    init_rank: int | None = setting(
        "With --calibrate: also write an adapter that offsets much of the loss, for train --init.",
        None,
        at_least=1,
        flag="--init-adapter",
        metavar="RANK",
    )
    bits_budget: float | None = setting(
        "With --calibrate: spend bits where they help most, up to this average per quantized weight, such as 4.5.",
        None,
        above=4,
        below=16,
        metavar="BITS",
    )
    compensate: bool = setting(
        "With --calibrate: each column compensates the error of those before it. Slower, closer.", True
    )

    def validate(self) -> None:
        """See ``Settings``."""
        if not self.files:
            raise UsageError("files: no text given", hint="add --calibrate FILE")

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        from adaptkit.checkpoint.hashing import file_sha256

        return asdict(self) | {"files": [file_sha256(file) for file in self.files]}


@dataclass(frozen=True)
class QuantizeOptions(Settings):
    """How to quantize."""

    format: str = setting("nf4, fp4: for bitsandbytes; others: compressed-tensors.", "nf4", choices=writable())
    block_size: int | None = setting(
        "Weights per constant: 64 for nf4, fp4, else 128; fp8: a row, or 128 for blocks of 128 x 128.", None, at_least=1
    )
    double_quant: bool = setting("nf4, fp4: quantize the constants too.", True)
    zero_points: bool = setting("w4a16: zero points, for groups that are not symmetric.", False)
    skip: tuple[str, ...] = setting("Modules to keep in 16 bits: '*.down_proj'.", (), metavar="PATTERN")
    include_head: bool = setting("Quantize the output layer too.", False)
    moe: str = setting("Experts; only adaptkit, not bitsandbytes, loads them quantized.", "keep", choices=MOE)
    max_shard_bytes: int = _max_shard_bytes()
    threads: int | None = _threads()
    calibration: Calibration | None = None

    def validate(self) -> None:
        """See ``Settings``."""
        codec = self.encoding.codec
        if self.calibration is not None and not codec.can_be_calibrated:
            raise UsageError(f"calibration: not known for format {self.format}", hint="use --format nf4, or w4a16")
        if self.calibration is not None and self.calibration.bits_budget is not None and self.format != "nf4":
            raise UsageError(f"bits_budget: needs format nf4, found {self.format}", hint="leave out --bits-budget")

    @property
    def encoding(self) -> Encoding:
        """How a weight is quantized."""
        return encoding_of(self.format, self.block_size, self.double_quant, self.zero_points)

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        values = {name: value for name, value in asdict(self).items() if name not in {"threads", "calibration"}}
        values |= {"skip": sorted(set(self.skip)), "block_size": self.encoding.block_size}
        if not self.zero_points:
            del values["zero_points"]
        return values | ({"calibration": self.calibration.recorded()} if self.calibration else {})


@dataclass(frozen=True)
class DequantizeOptions(Settings):
    """How to dequantize."""

    dtype: str | None = setting(
        "Default: the one recorded for each weight; quantize records float32 as bfloat16, FP8 and MXFP4 none: "
        "bfloat16.",
        None,
        choices=DTYPES,
    )
    max_shard_bytes: int = _max_shard_bytes()
    threads: int | None = _threads()


@dataclass(frozen=True)
class MergeOptions(Settings):
    """How to merge."""

    weights: tuple[float, ...] = _weights()
    undo: bool = setting("Write the undo record that makes unmerge exact.", True)
    allow_base_mismatch: bool = setting("Merge into a base that the adapter was not trained on.", False)
    untie: bool = setting("Untie the head from the embedding if the merge makes them differ.", False)
    format: str = setting(
        "keep: the types of what is merged into; plain: 16 bits, if that is quantized; others: quantize the result.",
        "keep",
        choices=MERGE_FORMATS,
    )
    onto: str | None = setting(
        "Of a quantized BASE: the 16-bit original, or the values that it has, which an adapter was trained on. "
        "Default: the original; trained, if BASE was released so.",
        None,
        choices=("original", "trained"),
    )
    calibrate: tuple[Path, ...] = setting("Text that decides how codes of BASE change.", (), metavar="FILE")
    text: tuple[Path, ...] = setting("Text on which to compare with BASE plus ADAPTERS.", (), metavar="FILE")
    embed_adapter: bool = setting("Store copies of the adapters in the output, for unmerge.", False)
    threads: int | None = _threads()

    def validate(self) -> None:
        """See ``Settings``."""
        left_out = f"--format {self.format}" if self.format != "keep" else "" if self.undo else "--no-undo"
        if self.embed_adapter and left_out:
            what = f"embed_adapter: needs the undo record, as unmerge does, which {left_out} leaves out"
            raise UsageError(what, hint=f"leave out --embed-adapter or {left_out}")


@dataclass(frozen=True)
class ExtractOptions(Settings):
    """How to extract."""

    rank: int | None = setting("Rank of the adapter's matrices.", None, at_least=1)
    energy: float | None = _energy()
    max_rank: int | None = setting("With --energy: the largest rank. [default: 256]", None, at_least=1)
    target: tuple[str, ...] = setting("Only modules whose path matches, such as '*.q_proj'.", (), metavar="PATTERN")
    only_linear: bool = setting("Leave out differing embeddings, heads, norms and biases.", False)
    oversampling: int = setting("Extra sketch columns.", 10, at_least=0)
    iterations: int = setting("Subspace iterations, one pass over the matrix each.", 3, at_least=1)
    seed: int = setting("Seed of the sketch.", 0, at_least=0, at_most=2**63 - 1)
    threads: int | None = _threads()

    def validate(self) -> None:
        """See ``Settings``."""
        _check_rank_or_energy(self.rank, self.energy)
        if self.max_rank is not None and self.energy is None:
            raise UsageError("max_rank: needs --energy", hint="add --energy 0.99, or leave out --max-rank")

    @property
    def largest_rank(self) -> int:
        """Largest rank tried to keep the energy."""
        return _LARGEST_RANK if self.max_rank is None else self.max_rank

    @property
    def sketching(self) -> "Sketching":
        """Accuracy settings of the randomized decomposition."""
        from adaptkit.numerics.randomized import Sketching

        return Sketching(self.oversampling, self.iterations, self.seed)

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        values = asdict(self) | {"max_rank": None if self.energy is None else self.largest_rank}
        values["target"] = sorted(set(self.target))
        return {name: value for name, value in values.items() if name != "threads" and value is not None}


@dataclass(frozen=True)
class ResizeOptions(Settings):
    """How to resize."""

    rank: int | None = setting("Rank of every module that has a larger one.", None, at_least=1)
    energy: float | None = _energy()
    threads: int | None = _threads()

    def validate(self) -> None:
        """See ``Settings``."""
        _check_rank_or_energy(self.rank, self.energy)

    def recorded(self) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        return {name: value for name, value in asdict(self).items() if name != "threads" and value is not None}


@dataclass(frozen=True)
class StackOptions(Settings):
    """How to stack; ``settings`` holds options of the method by name: density, epsilon, gamma, lambda, seed."""

    method: str = setting("How to combine the adapters; see below.", "cat", choices=tuple(names(stacking)))
    weights: tuple[float, ...] = _weights()
    rank: int | None = setting("Maximum rank of the result.", None, at_least=1)
    energy: float | None = _energy()
    settings: Mapping[str, int | float] = field(default_factory=dict)
    threads: int | None = _threads()

    def validate(self) -> None:
        """See ``Settings``."""
        if self.rank is not None:
            _check_rank_or_energy(self.rank, self.energy)
        self.resolved()

    def resolved(self) -> Any:
        """Return the method's own options, defaults included.

        Raises:
            UsageError: the method has no such option, or a value is out of range.
        """
        options = load(stacking, self.method, "METHOD").options
        known = {name.rstrip("_"): name for name in sorted(settings(options))}
        for name in self.settings:
            if name not in known:
                used = ", ".join(f"--{each}" for each in known)
                raise UsageError(
                    f"{self.method} does not use --{name}",
                    hint=f"besides --weight, --rank and --energy, it uses {used or 'no option'}",
                )
        return options(**{known[name]: value for name, value in self.settings.items()})

    def recorded(self, weights: Sequence[float]) -> dict[str, Any]:
        """Return the options that affect the result, for the manifest."""
        limits = {"rank": self.rank, "energy": self.energy}
        source = load(stacking, self.method, "METHOD").source
        recorded = {"method": self.method, "source": source, "weights": list(weights), **self.own_settings()}
        return recorded | {name: value for name, value in limits.items() if value is not None}

    def own_settings(self) -> dict[str, Any]:
        """Return the values of the method's own options by name."""
        return {name.rstrip("_"): value for name, value in sorted(asdict(self.resolved()).items())}


@dataclass(frozen=True)
class VerifyOptions(Settings):
    """What to check, and what to require."""

    manifest_sha256: str | None = setting("Required sha256 of the manifest.", None, metavar="HASH")
    trust: Trust | None = None
    signature: Path | None = setting("Signature file. [default: adaptkit-manifest.sig in PATH]", None, metavar="FILE")
    parents: tuple[Path, ...] | None = setting(
        "Also verify its parents, found here: an artifact, or a folder of artifacts.", None, metavar="DIR"
    )
    recompute: bool = setting("Rebuild it and its parents from their own parents, and compare.", False)
    threads: int | None = _threads()

    def validate(self) -> None:
        """See ``Settings``."""
        from adaptkit.checkpoint.manifest import check_sha256

        check_sha256(self.manifest_sha256)
        if self.signature is not None and self.trust is None:
            raise UsageError(
                "signature: needs a public key or an identity to check it against",
                hint="add --public-key FILE, or --identity NAME --identity-provider URL",
            )
        if self.recompute and not self.parents:
            raise UsageError("recompute: needs the parents", hint="give their folders with --parents")
