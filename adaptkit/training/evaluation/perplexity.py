"""Loss on answers, perplexity on windows of text, and divergence from a reference's next-token distributions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from adaptkit.data.batches import collate, rows_by_length
from adaptkit.data.encoding import Sample
from adaptkit.data.limits import check_vocabulary
from adaptkit.errors import BaseMismatchError
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import Model

POSITIONS = 64
"""Number of tokens whose log-probabilities over the vocabulary are in memory at a time."""


@dataclass(frozen=True)
class TextReport:
    """Measurements on text, over every token of every window except its first.

    Attributes:
        windows: number of windows.
        tokens: number of predicted tokens.
        loss: mean cross-entropy, in nats.
        perplexity: exponential of the loss; None if it is too large.
        reference: folder of the reference; None without one, as are the following.
        reference_loss: loss of the reference.
        reference_perplexity: perplexity of the reference.
        kl_divergence: mean over the tokens of KL(reference ‖ model) over the whole vocabulary, in nats.
        same_top_token: fraction of the tokens for which both models have the same most likely token.
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


@torch.no_grad()
def mean_loss(model: Model, samples: Sequence[Sample], batch_size: int, padding: int) -> float:
    """Return the mean cross-entropy per answer token, in nats."""
    model.network.eval()
    total = sum(float(summed_loss(model, collate(rows, padding))) for rows in rows_by_length(samples, batch_size))
    return total / sum(sample.answer_tokens for sample in samples)


@torch.no_grad()
def measure_text(model: Model, windows: Tensor, reference: Model | None = None) -> TextReport:
    """Measure perplexity on windows of text, and how far the model is from a reference, one window at a time.

    Log-probabilities are float32, from logits of the compute dtype; their sums are float64.

    Args:
        model: model to measure.
        windows: (windows, window) int64.
        reference: model with the same vocabulary to compare with.

    Raises:
        BaseMismatchError: the reference has another vocabulary size.
        UsageError: a token is not in the model's vocabulary.
    """
    _check_vocabulary(model, windows, reference)
    sums = torch.zeros(4, dtype=torch.float64)
    for window in windows:
        sums += _window_sums(model, window, reference)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, reference_loss, divergence, same = (sums / tokens).tolist()
    report = TextReport(len(windows), tokens, loss, perplexity_of(loss))
    if reference is None:
        return report
    return replace(
        report,
        reference=str(reference.checkpoint.root),
        reference_loss=reference_loss,
        reference_perplexity=perplexity_of(reference_loss),
        kl_divergence=divergence,
        same_top_token=same,
    )


def _check_vocabulary(model: Model, windows: Tensor, reference: Model | None) -> None:
    known = model.network.get_input_embeddings().weight.shape[0]
    check_vocabulary([int(windows.max())], known, str(model.checkpoint.root))
    others = known if reference is None else reference.network.get_input_embeddings().weight.shape[0]
    if reference is not None and others != known:
        raise BaseMismatchError(
            f"{reference.checkpoint.root}: has {others} tokens, but {model.checkpoint.root} has {known}",
            hint="use the checkpoint that the model was made from as --reference",
        )


def _window_sums(model: Model, window: Tensor, reference: Model | None) -> Tensor:
    """Return ``_text_sums`` of a window; its logits are freed before the next window."""
    sums = torch.zeros(4, dtype=torch.float64)
    logits = _next_token_logits(model, window)
    others = None if reference is None else _next_token_logits(reference, window)
    for start in range(0, len(logits), POSITIONS):
        rows = slice(start, start + POSITIONS)
        wanted = window[1:][rows].to(logits.device)
        sums += _text_sums(logits[rows], wanted, None if others is None else others[rows])
    return sums


def _next_token_logits(model: Model, window: Tensor) -> Tensor:
    """Return (window - 1, vocabulary) logits in the compute dtype."""
    model.network.eval()
    logits: Tensor = model.network(input_ids=window[None].to(model.device), use_cache=False).logits
    return logits[0, :-1]


def _text_sums(logits: Tensor, wanted: Tensor, others: Tensor | None) -> Tensor:
    """Return (4,) float64: sums over positions of loss, reference loss, divergence, and equal most likely tokens."""
    found = _log_probabilities(logits)
    sums = torch.zeros(4, dtype=torch.float64)
    sums[0] = -found.gather(-1, wanted[:, None]).double().sum()
    if others is not None:
        expected = _log_probabilities(others)
        sums[1] = -expected.gather(-1, wanted[:, None]).double().sum()
        sums[2] = (
            functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1, dtype=torch.float64).sum()
        )
        sums[3] = (found.argmax(-1) == expected.argmax(-1)).sum()
    return sums


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return the float32 log-softmax; torch's own loses small terms of the sum on a CPU, up to 1e-4 nats."""
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def perplexity_of(loss: float) -> float | None:
    """Return the exponential of a mean cross-entropy in nats; None if it is NaN or at least 700, near overflow."""
    return math.exp(loss) if loss < 700 else None
