"""AdamW over one flat vector of parameters, its state in pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.training.paging import PagedState
from adaptkit.training.parameters import Group


class PagedAdamW:
    """AdamW (arXiv:1711.05101), to the bit what ``torch.optim.AdamW(foreach=False)`` computes.

    Args:
        parameters: (N,) float32; updated in place.
        gradients: (N,) float32; read.
        groups: cover them, in order; say what the learning rate is multiplied by, and whether weights decay.
        state: the moments of N parameters.
        weight_decay: decoupled from the gradient.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        groups: Sequence[Group],
        state: PagedState,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parameters, self._gradients, self._groups = parameters, gradients, groups
        self.state, self._weight_decay, self._betas, self._eps = state, weight_decay, betas, eps
        self.steps = 0

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm, and return the norm that they had; 0 leaves them as they are."""
        norm = torch.linalg.vector_norm(self._gradients)
        if max_norm > 0:
            self._gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return float(norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all parameters, page by page."""
        self.steps += 1
        for span, first, second in self.state.sweep():
            for group in self._groups:
                part = slice(max(span.start, group.span.start), min(span.stop, group.span.stop))
                if part.start < part.stop:
                    inside = slice(part.start - span.start, part.stop - span.start)
                    self._update(part, first[inside], second[inside], learning_rate * group.rate, group.decay)

    def _update(self, part: slice, first: Tensor, second: Tensor, learning_rate: float, decay: bool) -> None:
        beta1, beta2 = self._betas
        step_size = learning_rate / (1 - beta1**self.steps)
        root_correction = (1 - beta2**self.steps) ** 0.5
        parameters, gradients = self._parameters[part], self._gradients[part]
        if decay:
            parameters.mul_(1 - learning_rate * self._weight_decay)
        first.lerp_(gradients, 1 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        parameters.addcdiv_(first, (second.sqrt() / root_correction).add_(self._eps), value=-step_size)
