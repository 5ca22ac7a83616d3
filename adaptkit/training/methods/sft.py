"""Supervised fine-tuning: the cross-entropy of answers, or of whole texts.

The loss of a step is -Σ log p(token | tokens before it) / answer_tokens, over its tokens that carry loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.errors import ConfigError
from adaptkit.settings import Settings, setting
from adaptkit.training.methods._method import TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.data.batches import Batch
    from adaptkit.data.dataset import Dataset
    from adaptkit.data.encoding import Sample
    from adaptkit.training.network.model import Model

LOSS_ON = ("answers", "last_answer", "all")


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(Settings):
    """Settings of supervised fine-tuning."""

    loss_on: str = setting("Tokens to learn; plain text is always learned in full.", "answers", choices=LOSS_ON,
                           after="chat_template_kwargs")  # fmt: skip
    pack: bool = setting("Pack samples into rows of max_length tokens; a step then has batch_size rows.", False,
                         after="mixture")  # fmt: skip


class SupervisedTuning(TrainingMethod):
    """Learns the tokens of conversations' answers, and plain text in full."""

    settings, unit = SupervisedSettings, "answer_tokens"

    def check(self) -> None:
        """See ``TrainingMethod``."""
        if self.config.pack and self.config.group_by_length:
            raise ConfigError(
                "group_by_length: cannot be combined with pack: packed rows have similar lengths",
                hint="leave out one of the two",
            )

    @property
    def pack_length(self) -> int | None:
        """See ``TrainingMethod``."""
        return self.config.max_length if self.config.pack else None

    def read(self, sources: Sequence[str], tokenizer: Any, context: int | None, known: int | None) -> "Dataset":
        """See ``TrainingMethod``; the layouts of rows are those of ``data.conversation``."""
        from adaptkit.data.dataset import load_data

        config = self.config
        return load_data(
            sources,
            tokenizer,
            config.max_length,
            too_long=config.too_long,
            loss_on=config.loss_on,
            layout=config.layout,
            context=context,
            known=known,
        )

    def weight(self, sample: "Sample") -> int:
        """See ``TrainingMethod``."""
        return sample.answer_tokens

    def loss(self, model: "Model", batch: "Batch", share: float = 1.0) -> Mapping[str, "Tensor"]:
        """See ``TrainingMethod``."""
        from adaptkit.training.network.loss import summed_loss

        return {"loss": summed_loss(model, batch, share)}


METHOD = SupervisedTuning
