"""The run that ``plan`` predicts, in the words of ``train``: the settings on which its memory depends."""

from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from adaptkit.errors import UsageError
from adaptkit.models.kinds import MOE
from adaptkit.settings import Settings, setting, settings
from adaptkit.training.config import TrainConfig

_ADAPTERS = ("auto", "lora", "qlora")


def _of_train(name: str, default: Any = MISSING, **changed: Any) -> Any:
    """Return a field that is a setting of ``train``, with its meaning and limits.

    Args:
        name: name of the setting.
        default: default value if it differs.
        changed: attributes of ``Setting`` that differ.
    """
    found, rule = settings(TrainConfig)[name]
    rule = replace(rule, section="", after="", **changed)
    return field(default=found.default if default is MISSING else default, metadata={"setting": rule})


@dataclass(frozen=True)
class PlanOptions(Settings):
    """The training run to plan; its settings mean what they mean in ``TrainConfig``."""

    method: str = _of_train("method", "qlora")
    rank: int = _of_train("rank")
    targets: tuple[str, ...] = _of_train("targets")
    moe: str | None = setting("With qlora, experts: in 16 bits, or quantized by quantize --moe quantize.  [default: as "
                              "in MODEL if it is quantized, otherwise keep]", None, choices=MOE)  # fmt: skip
    max_length: int = _of_train("max_length", at_most=1 << 24)
    batch_size: int = _of_train("batch_size", 1, at_most=1 << 16)
    micro_batch_size: int | None = _of_train("micro_batch_size", at_most=1 << 16)
    checkpointing: str = _of_train(
        "checkpointing", "layer", help="Activation checkpointing: none, layer, sqrt (segments of √n layers), "
        "segments:K, budget:MIB, or auto, planned as layer: the least that it needs.",
    )  # fmt: skip
    offload_checkpoints: bool = _of_train("offload_checkpoints")
    optimizer: str = _of_train("optimizer")
    compute_dtype: str = _of_train("compute_dtype", "bfloat16")
    device: str = _of_train("device", choices=("auto", "cpu", "cuda"),
                            help="auto: a GPU if this machine has one, or with --offload-checkpoints.")  # fmt: skip

    def validate(self) -> None:
        """See ``Settings``."""
        for name, methods in (("rank", _ADAPTERS), ("targets", _ADAPTERS), ("moe", ("auto", "qlora"))):
            if getattr(self, name) != getattr(PlanOptions, name) and self.method not in methods:
                raise UsageError(
                    f"{name}: does not apply to method {self.method}",
                    hint=f"leave it out, or use --method {' or '.join(methods[1:])}",
                )
        if not self.targets:
            raise UsageError("targets: must name at least one pattern", hint="'*' matches all modules")
        if self.offload_checkpoints and self.device == "cpu":
            raise UsageError(
                "offload_checkpoints: has no effect on a CPU",
                hint="leave out --offload-checkpoints, or use --device cuda",
            )

    @property
    def rows(self) -> int:
        """Samples per forward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def on_gpu(self) -> bool:
        """Whether the planned run uses a GPU."""
        if self.device == "auto":
            import torch

            return self.offload_checkpoints or torch.cuda.is_available()
        return self.device == "cuda"
