"""The options of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptkit.data.conversation import LAYOUTS
from adaptkit.errors import UsageError
from adaptkit.settings import Settings, setting
from adaptkit.training.config import COMPUTE_DTYPES


@dataclass(frozen=True)
class EvaluateOptions(Settings):
    """How to evaluate."""

    prompts: tuple[str, ...] = setting("Prompt to answer, by greedy decoding.", (), flag="--prompt")
    generate: bool = setting("Answer the data's questions; score them by BLEU, NIST, METEOR, ROUGE-L and CIDEr.", False)
    samples: int | None = setting("Maximum number of questions to answer, chosen by the seed.", None, at_least=1)
    seed: int = setting("Seed for choosing questions and examples.", 0, at_least=0, at_most=2**63 - 1)
    shots: int = setting("Also evaluate every base with K examples before each question.", 0, at_least=0, metavar="K")
    shots_from: tuple[Path, ...] = setting("File to take the examples from.", ())
    max_new_tokens: int = setting("Maximum tokens per answer.", 64, at_least=1)
    max_length: int = setting("Maximum tokens per sample.", 1024, at_least=2)
    batch_size: int = setting("Samples per forward pass.", 8, at_least=1)
    window: int = setting("Tokens per window of text.", 512, at_least=2)
    max_tokens: int | None = setting("Maximum number of text tokens.", None, at_least=2)
    layout: str | None = setting("Layout of the rows. Default: detected for each row.", None, choices=LAYOUTS)
    chat_template_kwargs: Mapping[str, str | int | float | bool] = setting(
        "Variable of the chat template, as for train.", {}
    )
    compute_dtype: str = setting(
        "auto: bfloat16 if the device multiplies bfloat16 matrices.", "auto", choices=COMPUTE_DTYPES
    )
    device: str = setting("cpu, cuda, or auto.", "auto")

    def validate(self) -> None:
        """See ``Settings``."""
        if bool(self.shots) != bool(self.shots_from):
            raise UsageError("shots: must be given together with shots_from", hint="give both")
        if self.samples is not None and not self.generate:
            raise UsageError("samples: needs generate", hint="add --generate")
