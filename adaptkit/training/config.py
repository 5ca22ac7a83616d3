"""Everything that determines a training run; each field is an option of ``adaptkit train`` and a key of its file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from adaptkit.training.settings import check, check_values, refuse, setting

COMPUTE_DTYPES = ("bfloat16", "float32")
INITS = ("kaiming", "normal")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
_LARGEST = 1e30
"""Of a factor: float32 holds 3.4e38, and products of factors need room."""
_SEEDS = (1 << 40) - 1
"""Steps are added to a million times the seed, in 64 bits."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run. What a field means is said beside it."""

    # What is trained, and on what
    base: str = setting("Folder of an NF4 checkpoint that quantize made.")
    data: tuple[str, ...] = setting("jsonl file.")
    init: str = setting("Of A: kaiming (uniform, as PEFT) or normal (deviation 1 / rank); or the folder of an adapter "
                        "to begin with, whose rank, alpha and targets are then the run's.", "kaiming")  # fmt: skip

    # The adapter
    rank: int = setting("Of the adapter's matrices.", 16, at_least=1, at_most=1 << 16)
    alpha: float = setting("The adapter's change is scaled by alpha / rank.", 32.0, above=0, at_most=_LARGEST)
    targets: tuple[str, ...] = setting("Shell pattern of module paths that get an adapter; * is every linear layer "
                                       "inside the model.", ("*",))  # fmt: skip
    dropout: float = setting("Of the adapter's input.", 0.0, at_least=0, below=1)

    lora_plus_ratio: float = setting("How much faster B learns than A; LoRA+ suggests 16.", 1.0, above=0,
                                     at_most=_LARGEST)  # fmt: skip

    # Samples
    max_length: int = setting("Tokens of a sample; longer ones are cut, which is reported.", 1024, at_least=2)
    held_out: float = setting(
        "Fraction of the samples that is measured instead of trained on.", 0.1, at_least=0, below=1
    )

    # Steps
    steps: int | None = setting("Optimizer steps; default: as many as the epochs take.", None, at_least=1)
    epochs: float = setting("Passes over the data.", 1.0, above=0)
    batch_size: int = setting("Samples in a step.", 8, at_least=1)
    micro_batch_size: int | None = setting("Samples that go through the model at a time; default: the whole batch.",
                                           None, at_least=1)  # fmt: skip
    group_by_length: bool = setting("Put samples of like length into one step, which pads little.", False)
    eval_every: int = setting(
        "Steps between measurements of the held-out loss; 0: only before and after.", 0, at_least=0
    )
    save_every: int = setting("Steps between checkpoints; 0: none.", 50, at_least=0)
    seed: int = setting("Of the initial A, the order of samples, dropout and the held-out choice.", 0, at_least=-_SEEDS,
                        at_most=_SEEDS)  # fmt: skip

    # The optimizer
    learning_rate: float = setting("At its highest.", 2e-4, above=0, at_most=_LARGEST)
    schedule: str = setting("Of the rate, after the warm-up.", "constant", choices=SCHEDULES)
    decay: float = setting("Fraction of the steps in which the rate of wsd falls.", 0.2, above=0, at_most=1)
    warmup: float = setting("Fraction of the steps in which the rate rises.", 0.03, at_least=0, below=1)
    weight_decay: float = setting("AdamW's.", 0.0, at_least=0, at_most=_LARGEST)
    max_grad_norm: float = setting("Gradients are scaled down to this norm; 0 leaves them.", 1.0, at_least=0)

    # Memory
    checkpointing: str = setting("Of activations: none, layer, sqrt (segments of √n layers) or segments:K.", "layer")
    optimizer_pages_mib: float | None = setting("Optimizer state that is resident; the rest waits in host memory. "
                                                "Default: all of it.", None, above=0, at_most=_LARGEST)  # fmt: skip
    page_kib: int = setting("Size of a page of optimizer state.", 512, at_least=1, at_most=1 << 20)
    compute_dtype: str = setting("Of activations and dequantized weights.", "bfloat16", choices=COMPUTE_DTYPES)
    device: str = setting("cpu, cuda, or auto.", "auto")

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        object.__setattr__(self, "targets", tuple(self.targets))
        check(self)
        for name in ("data", "targets"):
            if not getattr(self, name):
                refuse(self, name, "at least one")
        if self.init not in INITS and not Path(self.init).is_dir():
            refuse(self, "init")

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """Make a configuration from a file's or the command line's values.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or a required key that is missing.
        """
        return cls(**check_values(cls, values, where))

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all of it but paths and devices, which say nothing about the result."""
        values = {k: v for k, v in asdict(self).items() if k not in {"base", "data", "device"}}
        return values if self.init in INITS else values | {"init": "adapter"}  # a parent in the manifest says which
