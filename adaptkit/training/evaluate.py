"""Loss on held-out answers, perplexity on text, divergence from a reference, and what a model says to a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.architecture import load_tokenizer, quiet_transformers
from adaptkit.checkpoint.text import check_window, read_tokens
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.training.batches import Batch, collate
from adaptkit.training.config import COMPUTE_DTYPES
from adaptkit.training.data import IGNORED, Sample, load_data, prompt_ids
from adaptkit.training.loading import load_adapter
from adaptkit.training.model import Model, choose_device, load_model

POSITIONS = 64
"""Tokens whose log-probabilities over the vocabulary are in memory at a time."""


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        prompts: user messages to answer, greedily.
        max_new_tokens: of an answer.
        max_length: tokens of a sample.
        batch_size: samples at a time.
        window: tokens of a window of text.
        max_tokens: of text; None is all of it.
        compute_dtype: bfloat16 or float32.
        device: cpu, cuda, or auto.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    max_length: int = 1024
    batch_size: int = 8
    window: int = 512
    max_tokens: int | None = None
    compute_dtype: str = "bfloat16"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("max_length", 2),
            ("batch_size", 1),
            ("window", 2),
            ("max_tokens", 2),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} cannot be used", hint=f"it is at least {least}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UsageError(f"compute_dtype: {self.compute_dtype!r} is none of {', '.join(COMPUTE_DTYPES)}")


@dataclass(frozen=True)
class TextReport:
    """What was measured on text, over every token of every window but its first.

    Attributes:
        windows: number of them.
        tokens: that were predicted.
        loss: mean cross-entropy, in nats.
        perplexity: its exponential; None where that is no number.
        reference: folder of the reference, or None; what follows is None without one.
        reference_loss: the reference's own.
        reference_perplexity: the reference's own.
        kl_divergence: mean over the tokens of KL(reference ‖ model) over the whole vocabulary, in nats.
        same_top_token: fraction of the tokens for which both think the same token likeliest.
    """

    windows: int
    tokens: int
    loss: float
    perplexity: float | None
    reference: str | None = None
    reference_loss: float | None = None
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    same_top_token: float | None = None


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
        text: what was measured on text; None without it.
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
    text: TextReport | None
    answers: dict[str, str]


def evaluate(
    base: Path,
    adapter: Path | None = None,
    data: Sequence[Path] = (),
    options: EvaluateOptions | None = None,
    *,
    text: Sequence[Path] = (),
    reference: Path | None = None,
) -> EvaluateReport:
    """Measure a model, with or without an adapter.

    Args:
        base: folder of an NF4 or plain checkpoint.
        adapter: folder of a LoRA adapter.
        data: jsonl files; see ``training.data``.
        options: how.
        text: files; see ``checkpoint.text``.
        reference: folder of a checkpoint that the model shall resemble on the text: the one that it was made from.

    Raises:
        UsageError: neither data, nor text, nor prompts; or a reference without text.
        BaseMismatchError: the adapter does not fit the base, or the reference has another vocabulary.
    """
    options = options or EvaluateOptions()
    if not data and not text and not options.prompts:
        raise UsageError("nothing to evaluate", hint="give --data FILE, --text FILE or --prompt TEXT")
    if reference is not None and not text:
        raise UsageError("a reference is compared on text", hint="give --text FILE")
    if reference is not None:
        check_window(reference, options.window)
    tokenizer = load_tokenizer(base)
    dataset = load_data(data, tokenizer, options.max_length) if data else None
    windows = read_tokens(text, base, window=options.window, max_tokens=options.max_tokens) if text else None
    dtype, device = getattr(torch, options.compute_dtype), choose_device(options.device)
    model = load_model(base, dtype, device)
    if adapter is not None:
        load_adapter(model, read_adapter(adapter))
    samples = dataset.samples if dataset else ()
    loss = mean_loss(model, samples, options.batch_size, pad_id(tokenizer)) if samples else None
    other = load_model(reference, dtype, device) if reference is not None else None
    return EvaluateReport(
        base=str(base),
        adapter=str(adapter) if adapter else None,
        samples=len(samples),
        truncated=dataset.truncated if dataset else 0,
        dropped=dataset.dropped if dataset else 0,
        answer_tokens=sum(sample.answer_tokens for sample in samples),
        loss=loss,
        perplexity=None if loss is None else _perplexity(loss),
        text=None if windows is None else measure_text(model, windows, other),
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
        attention_mask=batch.mask.to(device) if batch.positions is None else None,
        position_ids=None if batch.positions is None else batch.positions.to(device),
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
        rows = [(sample,) for sample in by_length[start : start + batch_size]]
        total += float(summed_loss(model, collate(rows, padding)))
    return total / sum(sample.answer_tokens for sample in samples)


@torch.no_grad()
def measure_text(model: Model, windows: Tensor, reference: Model | None = None) -> TextReport:
    """Measure perplexity on windows of text, and how far the model is from a reference, one window at a time.

    Log-probabilities are float32, from logits of the compute dtype; their sums are float64.

    Args:
        model: to measure.
        windows: (windows, window) int64.
        reference: of the same vocabulary.

    Raises:
        BaseMismatchError: it has another vocabulary.
        UsageError: a token is not in the model's vocabulary.
    """
    _check_vocabulary(model, windows, reference)
    sums = torch.zeros(4, dtype=torch.float64)
    for window in windows:
        logits = _next_token_logits(model, window)
        others = None if reference is None else _next_token_logits(reference, window)
        for start in range(0, len(logits), POSITIONS):
            rows = slice(start, start + POSITIONS)
            wanted = window[1:][rows].to(logits.device)
            sums += _text_sums(logits[rows], wanted, None if others is None else others[rows])
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, reference_loss, divergence, same = (sums / tokens).tolist()
    report = TextReport(len(windows), tokens, loss, _perplexity(loss))
    if reference is None:
        return report
    return replace(
        report,
        reference=str(reference.checkpoint.root),
        reference_loss=reference_loss,
        reference_perplexity=_perplexity(reference_loss),
        kl_divergence=divergence,
        same_top_token=same,
    )


def _check_vocabulary(model: Model, windows: Tensor, reference: Model | None) -> None:
    known = model.network.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= known:
        raise UsageError(
            f"{model.checkpoint.root}: its tokenizer makes the token {int(windows.max())}, its model knows {known}"
        )
    others = known if reference is None else reference.network.get_input_embeddings().weight.shape[0]
    if reference is not None and others != known:
        raise BaseMismatchError(
            f"{reference.checkpoint.root}: knows {others} tokens, {model.checkpoint.root} knows {known}",
            hint="the reference is the checkpoint that the model was made from",
        )


def _next_token_logits(model: Model, window: Tensor) -> Tensor:
    """(window - 1, vocabulary), in the compute dtype."""
    model.network.eval()
    device = next(model.network.parameters()).device
    logits: Tensor = model.network(input_ids=window[None].to(device), use_cache=False).logits
    return logits[0, :-1]


def _text_sums(logits: Tensor, wanted: Tensor, others: Tensor | None) -> Tensor:
    """(4,) float64: sums over positions of loss, the reference's loss, divergence, and equal likeliest tokens."""
    found = logits.float().log_softmax(-1)
    sums = torch.zeros(4, dtype=torch.float64)
    sums[0] = -found.gather(-1, wanted[:, None]).double().sum()
    if others is not None:
        expected = others.float().log_softmax(-1)
        sums[1] = -expected.gather(-1, wanted[:, None]).double().sum()
        sums[2] = (
            functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1, dtype=torch.float64).sum()
        )
        sums[3] = (found.argmax(-1) == expected.argmax(-1)).sum()
    return sums


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


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
