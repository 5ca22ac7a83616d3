"""Loss on held-out answers, and what a model says to a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.architecture import load_tokenizer, quiet_transformers
from adaptkit.errors import UsageError
from adaptkit.training.config import COMPUTE_DTYPES
from adaptkit.training.data import IGNORED, Batch, Sample, collate, load_data, prompt_ids
from adaptkit.training.model import Model, attach_adapter, choose_device, load_model


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        prompts: user messages to answer, greedily.
        max_new_tokens: of an answer.
        max_length: tokens of a sample.
        batch_size: samples at a time.
        compute_dtype: bfloat16 or float32.
        device: cpu, cuda, or auto.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    max_length: int = 1024
    batch_size: int = 8
    compute_dtype: str = "bfloat16"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} cannot be used", hint=f"it is at least {least}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UsageError(f"compute_dtype: {self.compute_dtype!r} is none of {', '.join(COMPUTE_DTYPES)}")


@dataclass(frozen=True)
class EvaluateReport:
    """What was measured.

    Attributes:
        base: folder.
        adapter: folder, or None.
        samples: number of them that were measured.
        truncated: samples cut to the longest length.
        dropped: samples left out since the cut took their whole answer.
        answer_tokens: that carry loss.
        loss: mean over the answer tokens, in nats; None without data.
        perplexity: its exponential; None without data.
        answers: prompt -> answer.
    """

    base: str
    adapter: str | None
    samples: int
    truncated: int
    dropped: int
    answer_tokens: int
    loss: float | None
    perplexity: float | None
    answers: dict[str, str]


def evaluate(
    base: Path, adapter: Path | None = None, data: Sequence[Path] = (), options: EvaluateOptions | None = None
) -> EvaluateReport:
    """Measure a model, with or without an adapter.

    Args:
        base: folder of an NF4 or plain checkpoint.
        adapter: folder of a LoRA adapter.
        data: jsonl files; see ``training.data``.
        options: how.

    Raises:
        UsageError: neither data nor prompts.
        BaseMismatchError: the adapter does not fit the base.
    """
    options = options or EvaluateOptions()
    if not data and not options.prompts:
        raise UsageError("nothing to evaluate", hint="give --data FILE or --prompt TEXT")
    tokenizer = load_tokenizer(base)
    dataset = load_data(data, tokenizer, options.max_length) if data else None
    model = load_model(base, getattr(torch, options.compute_dtype), choose_device(options.device))
    if adapter is not None:
        attach_adapter(model, read_adapter(adapter).modules, str(adapter))
    samples = dataset.samples if dataset else ()
    loss = mean_loss(model, samples, options.batch_size, pad_id(tokenizer)) if samples else None
    return EvaluateReport(
        base=str(base),
        adapter=str(adapter) if adapter else None,
        samples=len(samples),
        truncated=dataset.truncated if dataset else 0,
        dropped=dataset.dropped if dataset else 0,
        answer_tokens=sum(sample.answer_tokens for sample in samples),
        loss=loss,
        perplexity=math.exp(loss) if loss is not None and loss < 700 else None,
        answers={prompt: answer(model, tokenizer, prompt, options.max_new_tokens) for prompt in options.prompts},
    )


def pad_id(tokenizer: Any) -> int:
    """The token to pad with; masks tell what is padding, so the end token does where there is none of its own."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def summed_loss(model: Model, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's answer tokens, in float32; logits exist only where there is loss."""
    device = next(model.network.parameters()).device
    labels = batch.labels[:, 1:]
    positions = (labels != IGNORED).any(dim=0).nonzero().reshape(-1)
    logits = model.network(
        input_ids=batch.ids.to(device),
        attention_mask=batch.mask.to(device),
        use_cache=False,
        logits_to_keep=positions.to(device),
    ).logits
    wanted = labels[:, positions].to(device)
    return functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def mean_loss(model: Model, samples: Sequence[Sample], batch_size: int, padding: int) -> float:
    """Mean cross-entropy per answer token, in nats. Samples of like length go together, to pad little."""
    model.network.eval()
    by_length = sorted(samples, key=lambda sample: len(sample.ids))
    total = 0.0
    for start in range(0, len(by_length), batch_size):
        total += float(summed_loss(model, collate(by_length[start : start + batch_size], padding)))
    return total / sum(sample.answer_tokens for sample in samples)


@torch.no_grad()
def answer(model: Model, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """What the model answers to a user's message, greedily."""
    model.network.eval()
    device = next(model.network.parameters()).device
    ids = torch.tensor([prompt_ids(prompt, tokenizer)], device=device)
    with quiet_transformers():
        output = model.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(tokenizer),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
