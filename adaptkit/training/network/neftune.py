"""NEFTune: noise on the embeddings of the training samples, against overfitting to their exact words.

    embedding + α / √(L d) · u        u uniform in [-1, 1], L: tokens of the sample, d: embedding dimension

L is counted per sample, also in packed rows, and excludes padding, as in the authors' code (arXiv:2310.05914).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.data.batches import Batch
from adaptkit.training.network.pinned import sent


class EmbeddingNoise:
    """Adds noise to the output of a model's embedding in training mode. Uses torch's global random state.

    Args:
        model: transformers model.
        alpha: α.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self._alpha = alpha
        self._lengths = torch.empty(0)
        model.get_input_embeddings().register_forward_hook(self._add)

    def expect(self, batch: Batch) -> None:
        """Set the batch of the next forward pass."""
        self._lengths = sample_lengths(batch)

    def _add(self, embedding: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not embedding.training:
            return output
        scale = self._alpha / torch.sqrt(sent(self._lengths, output.device) * output.shape[-1])
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * scale[..., None]).to(output.dtype)


def sample_lengths(batch: Batch) -> Tensor:
    """Return the length of each token's sample, (batch, length) float32; infinite for padding."""
    is_token = batch.mask == 1
    begins = is_token.cumsum(dim=1) == 1 if batch.positions is None else batch.positions == 0
    number = ((begins & is_token).cumsum(dim=1) - 1).clamp(min=0)  # index of the token's sample in its row
    counts = torch.zeros_like(number).scatter_add_(1, number, is_token.long())
    return counts.gather(1, number).float().masked_fill(~is_token, math.inf)
