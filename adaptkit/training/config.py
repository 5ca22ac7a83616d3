"""Everything that determines a training run; each field is an option of ``adaptkit train`` and a key of its file."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import yaml

from adaptkit.errors import ConfigError

COMPUTE_DTYPES = ("bfloat16", "float32")
INITS = ("kaiming", "normal")
SCHEDULES = ("constant", "linear", "cosine")
_LARGEST = 1e30
"""Of a factor: float32 holds 3.4e38, and products of factors need room."""
_LARGEST_RANK, _LARGEST_PAGE_KIB = 1 << 16, 1 << 20
_SEEDS = 1 << 40
"""Steps are added to a million times the seed, in 64 bits."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        base: folder of an NF4 checkpoint.
        data: jsonl files.
        rank: of the adapter's matrices.
        alpha: the adapter's change is multiplied by alpha / rank.
        targets: shell patterns of module paths that get an adapter; ``*`` is every linear layer inside the model.
        init: of A: ``kaiming`` (uniform, PEFT's default) or ``normal`` (standard deviation 1 / rank, as in the LoRA
            paper), B beginning as zero; or the folder of an adapter to begin with, whose rank, alpha and targets are
            then the run's.
        dropout: of the adapter's input.
        steps: optimizer steps; None means ``epochs``.
        epochs: passes over the data.
        batch_size: samples in a step.
        micro_batch_size: samples that go through the model at a time; None means the whole batch.
        max_length: tokens; longer samples are cut, which is reported.
        learning_rate: at its highest.
        schedule: constant, linear or cosine, after the warm-up.
        warmup: fraction of the steps in which the rate rises.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        checkpointing: ``none``, ``layer``, ``sqrt`` (segments of √n layers) or ``segments:K``.
        optimizer_pages_mib: how much optimizer state is resident; the rest waits in host memory. None: all of it.
        page_kib: size of a page of optimizer state.
        compute_dtype: of activations and dequantized weights: bfloat16 or float32.
        held_out: fraction of the samples that is not trained on, and measured before and after.
        eval_every: steps between measurements of the held-out loss; 0 means only before and after.
        save_every: steps between checkpoints; 0 means none.
        seed: of the initial A, the order of samples, dropout and the held-out choice.
        device: cpu, cuda, or auto.
    """

    base: str
    data: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("*",)
    init: str = "kaiming"
    dropout: float = 0.0
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    micro_batch_size: int | None = None
    max_length: int = 1024
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpointing: str = "layer"
    optimizer_pages_mib: float | None = None
    page_kib: int = 512
    compute_dtype: str = "bfloat16"
    held_out: float = 0.1
    eval_every: int = 0
    save_every: int = 50
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        object.__setattr__(self, "targets", tuple(self.targets))
        rules = {
            "data": len(self.data) > 0,
            "rank": 1 <= self.rank <= _LARGEST_RANK,
            "alpha": 0 < self.alpha <= _LARGEST,
            "targets": len(self.targets) > 0,
            "init": self.init in INITS or Path(self.init).is_dir(),
            "dropout": 0 <= self.dropout < 1,
            "steps": self.steps is None or self.steps >= 1,
            "epochs": 0 < self.epochs < float("inf"),
            "batch_size": self.batch_size >= 1,
            "micro_batch_size": self.micro_batch_size is None or self.micro_batch_size >= 1,
            "max_length": self.max_length >= 2,
            "learning_rate": 0 < self.learning_rate <= _LARGEST,
            "schedule": self.schedule in SCHEDULES,
            "warmup": 0 <= self.warmup < 1,
            "weight_decay": 0 <= self.weight_decay <= _LARGEST,
            "max_grad_norm": 0 <= self.max_grad_norm < float("inf"),
            "optimizer_pages_mib": self.optimizer_pages_mib is None or 0 < self.optimizer_pages_mib <= _LARGEST,
            "page_kib": 1 <= self.page_kib <= _LARGEST_PAGE_KIB,
            "compute_dtype": self.compute_dtype in COMPUTE_DTYPES,
            "held_out": 0 <= self.held_out < 1,
            "eval_every": self.eval_every >= 0,
            "save_every": self.save_every >= 0,
            "seed": abs(self.seed) < _SEEDS,
        }
        for name, holds in rules.items():
            if not holds:
                raise ConfigError(f"{name}: {getattr(self, name)!r} cannot be used", hint=_meaning(name))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """Make a configuration from a file's or the command line's values.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or a required key that is missing.
        """
        known = {field.name: field for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
                raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
            kind = known[key].type
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            if not _fits(value, expected):
                raise ConfigError(f"{where}: {key} is {value!r}; expected {expected}", hint=_meaning(key))
        for key in ("base", "data"):
            if key not in values:
                raise ConfigError(f"{where}: {key} is missing", hint=_meaning(key))
        return cls(**values)

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all of it but paths and devices, which say nothing about the result."""
        values = {k: v for k, v in asdict(self).items() if k not in {"base", "data", "device"}}
        return values if self.init in INITS else values | {"init": "adapter"}  # a parent in the manifest says which


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of options.

    Raises:
        ConfigError: absent, malformed, a key that appears twice, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = _read_json(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: malformed ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as 'rank: 16'")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which keeps the last of equal keys, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See ``yaml.SafeLoader``."""
        _unique([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def _read_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _unique([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _unique(keys: list[str]) -> None:
    twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} appears twice")


def _fits(value: Any, annotation: str) -> bool:
    if value is None:
        return "None" in annotation
    if "tuple" in annotation:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return "bool" in annotation
    kinds = {"int": int, "float": int | float, "str": str}
    return any(isinstance(value, kinds[name]) for name in annotation.replace(" ", "").split("|") if name in kinds)


def _meaning(name: str) -> str:
    """The field's line of the class docstring."""
    lines = (TrainConfig.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{name}:")), None)
    return "" if start is None else lines[start].strip()
