"""What a training method owns: its settings, the rows it reads, its batches, its loss and its metrics.

    sources  -- read -->  samples  -- collate, some at a time -->  Batch  -- loss -->  sums by name
    metrics of a step     {"loss": Σ loss / Σ weight, ...the other sums in the same way, UNIT: Σ weight}
    held-out metrics      {"held_out_loss": ...}

Each is a class, the ``METHOD`` of a file of this folder, and nothing else lists it: the loop, resume, paging,
checkpoints, the memory plan and the command line know only ``TrainingMethod``. Files import torch inside functions,
since ``--help`` needs their settings.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adaptkit.discovery import load, names
from adaptkit.settings import Settings, settings
from adaptkit.training import methods

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.data.batches import Batch, Row
    from adaptkit.data.dataset import Dataset
    from adaptkit.data.encoding import Sample
    from adaptkit.training.network.model import Model

_DEFAULT = "sft"


@dataclass(frozen=True)
class TrainingMethod(ABC):
    """A training method, with the settings of a run.

    Attributes:
        config: settings of the run, a ``TrainConfig``, which imports this module.
        settings: a frozen dataclass of keyword-only settings with defaults, each ``after`` another setting of a run;
            they are options of ``train``, keys of its file and fields of ``TrainConfig``.
        unit: what the loss is a mean over; the name of their number among the metrics.
        sequences: number of rows in a batch that a row of samples becomes.
    """

    config: Any
    settings: ClassVar[type[Settings]]
    unit: ClassVar[str]
    sequences: ClassVar[int] = 1

    def check(self) -> None:  # noqa: B027  # not every method has some
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: names one.
        """

    @property
    def pack_length(self) -> int | None:
        """Length of rows that hold several samples; None if each sample has a row of its own."""
        return None

    @abstractmethod
    def read(self, sources: Sequence[str], tokenizer: Any, context: int | None, known: int | None) -> "Dataset":
        """Read sources and tokenize their rows.

        Args:
            sources: files or Hub datasets; see ``data.rows``.
            tokenizer: tokenizer of the model, with the run's chat template.
            context: maximum sequence length of the model; None if unknown.
            known: vocabulary size of the model; None if unknown.

        Raises:
            UsageError, DataError: the data cannot be used.
        """

    @abstractmethod
    def weight(self, sample: "Sample") -> int:
        """Return the number of units of a sample."""

    def collate(self, rows: "Sequence[Row]", padding: int) -> "Batch":
        """Pad rows of samples to one length."""
        from adaptkit.data.batches import collate

        return collate(rows, padding)

    @abstractmethod
    def loss(self, model: "Model", batch: "Batch", share: float = 1.0) -> Mapping[str, "Tensor"]:
        """Return the sums of the metrics over a batch, each () float32; first ``loss``, which is differentiable.

        The names are the same for every batch, also for one without labels, which a process without rows gets.

        Args:
            model: the model, in training mode or not.
            batch: what ``collate`` made.
            share: factor of this loss in what is to be minimized; see ``network.loss.summed_loss``.
        """


def default_method() -> type[TrainingMethod]:
    """Return the method of a run that names none."""
    found: type[TrainingMethod] = load(methods, _DEFAULT, "METHOD")
    return found


def _all_settings() -> dict[str, type]:
    return {name: load(methods, name, "METHOD").settings for name in names(methods)}


def combined_settings() -> Any:
    """Return a class with the settings of all methods, for ``TrainConfig`` to inherit."""
    return type("MethodSettings", tuple(dict.fromkeys(_all_settings().values())), {})


def settings_of_others(method: TrainingMethod) -> set[str]:
    """Return the names of settings that a run by this method does not have."""
    return {name for kind in _all_settings().values() for name in settings(kind)} - set(settings(method.settings))
