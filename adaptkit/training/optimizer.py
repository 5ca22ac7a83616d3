"""AdamW over one flat vector of parameters, its state in pages."""

import torch
from torch import Tensor

from adaptkit.training.paging import PagedState


class PagedAdamW:
    """AdamW (arXiv:1711.05101), to the bit what ``torch.optim.AdamW(foreach=False)`` computes.

    Args:
        parameters: (N,) float32; updated in place.
        gradients: (N,) float32; read.
        state: the moments of N parameters.
        weight_decay: decoupled from the gradient.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        state: PagedState,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parameters, self._gradients, self.state = parameters, gradients, state
        self._weight_decay, self._betas, self._eps = weight_decay, betas, eps
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
        beta1, beta2 = self._betas
        step_size = learning_rate / (1 - beta1**self.steps)
        root_correction = (1 - beta2**self.steps) ** 0.5
        for span, first, second in self.state.sweep():
            parameters, gradients = self._parameters[span], self._gradients[span]
            parameters.mul_(1 - learning_rate * self._weight_decay)
            first.lerp_(gradients, 1 - beta1)
            second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
            parameters.addcdiv_(first, (second.sqrt() / root_correction).add_(self._eps), value=-step_size)
