"""All trained parameters in one vector; the modules hold views of it.

The optimizer works on long contiguous pages, whatever the sizes of the matrices, and a run's checkpoint consists of
this vector and the optimizer's state.

    values     [ group 0 | group 1 | ... ]     a group holds whole parameters, in the model's order
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptkit.models.architecture import language_part
from adaptkit.models.kinds import is_indexer
from adaptkit.training.network.model import Model


@dataclass(frozen=True)
class Group:
    """A contiguous range of parameters with the same learning rate and weight decay.

    Attributes:
        span: range in the vector.
        rate: factor of the learning rate.
        decay: whether weight decay applies.
    """

    span: slice
    rate: float = 1.0
    decay: bool = True


@dataclass(frozen=True)
class Trainable:
    """All trained parameters.

    Attributes:
        values: (N,) float32.
        gradients: (N,) float32; the backward pass accumulates into them.
        groups: parameter groups, which cover the vector in order.
    """

    values: Tensor
    gradients: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, model: Model, lora_plus_ratio: float = 1.0) -> Self:
        """Move a model's trainable parameters into one vector, and allocate one for their gradients.

        Weight decay applies only to matrices that text reaches: torch's AdamW skips parameters without a gradient.

        Args:
            model: the model; its parameters become views of the vector.
            lora_plus_ratio: factor of the learning rate of B (LoRA+, arXiv:2402.12354). As in PEFT's optimizer, it
                also applies to parameters that are not matrices (biases, magnitudes).
        """
        text = _reached_by_text(model.network)
        kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
        no_decay = set()
        for name, parameter in model.network.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.dim() > 1
                fast = name.endswith("lora_b") or not is_matrix
                kinds.setdefault((lora_plus_ratio if fast else 1.0, is_matrix), []).append(parameter)
                if not is_matrix or id(parameter) not in text or is_indexer(name):
                    no_decay.add(id(parameter))
        everything = [parameter for kind in kinds.values() for parameter in kind]
        count = sum(parameter.numel() for parameter in everything)
        values, start = torch.empty(count, device=everything[0].device), 0
        spans = []
        for parameter in everything:
            spans.append(slice(start, start + parameter.numel()))
            values[spans[-1]] = parameter.detach().reshape(-1)
            parameter.data = values[spans[-1]].view(parameter.shape)  # frees the old tensor
            start = spans[-1].stop
        gradients = torch.zeros_like(values)  # only now, so that a full model never exists three times
        for parameter, span in zip(everything, spans, strict=True):
            parameter.grad = gradients[span].view(parameter.shape)
        groups, start = [], 0
        for (rate, _), kind in kinds.items():
            for decay, alike in groupby(kind, key=lambda parameter: id(parameter) not in no_decay):
                end = start + sum(parameter.numel() for parameter in alike)
                groups.append(Group(slice(start, end), rate, decay))
                start = end
        return cls(values, gradients, tuple(groups))


def _reached_by_text(network: Any) -> set[int]:
    """Return the ids of the parameters that process text or compute logits: all, except in a multimodal model."""
    parts = network.get_submodule(language_part(network)), network.get_output_embeddings()
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
