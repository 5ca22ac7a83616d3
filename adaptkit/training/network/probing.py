"""Probe a network's behaviour by running it on a few tokens, without side effects.

transformers recognizes the samples of a packed row by positions that restart, and keeps them from attending to each
other if it is passed no mask: ``sdpa`` and ``eager`` attention by a mask that it builds, for any batch size; flash
attention by sequence lengths, for batch size one. Layers without attention (convolutions, recurrent states) still see
other samples.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import UsageError
from adaptkit.models.probing import forked_random

_PROBE_TOKENS = 6
_TOLERANCE = 0.02
"""Largest difference that counts as rounding, relative to the logits' standard deviation: other tokens in the batch
change the rounding of some layers."""


@contextmanager
def with_attribute(parts: Iterable[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of some modules while the block runs."""
    modules = list(parts)
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            setattr(module, name, was)


@contextmanager
def as_in_training(network: Any) -> Iterator[None]:
    """Put a network in training mode while the block runs, without gradients; restore mode and random state."""
    training = with_attribute(network.modules(), "training", True)
    with torch.no_grad(), forked_random(network.device), training:
        yield


@torch.no_grad()
def require_causal(network: Any) -> None:
    """Check that a network is causal: changing the second token must not change the first one's logits.

    Raises:
        UsageError: it does, as in BERT, unless its configuration makes it a decoder.
    """
    said = {getattr(module, "is_causal", None) for module in network.modules()} - {None}
    if said == {True}:  # all attention modules declare it; probing a large model takes seconds
        return
    known = network.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[known // 3, known // 2], [known // 3, known // 4]], device=network.device)
    one, two = network(input_ids=ids, use_cache=False).logits[:, 0].float()
    if _differ(one, two):
        raise UsageError(
            f"{type(network).__name__} is not causal: its tokens see the ones they should predict",
            hint='use a causal language model; some become one with "is_decoder": true in config.json',
        )


@torch.no_grad()
def check_packing(network: Any) -> None:
    """Check that a model keeps packed samples apart: changing one must not change the logits of another.

    Args:
        network: transformers model.

    Raises:
        UsageError: it does.
    """
    device = next(network.parameters()).device
    known = network.get_input_embeddings().weight.shape[0]
    first, other, second = (torch.arange(start, start + _PROBE_TOKENS) % known for start in (0, known // 2, known // 3))
    positions = torch.arange(_PROBE_TOKENS).repeat(2)[None].to(device)
    one, two = (
        network(
            input_ids=torch.cat([before, second])[None].to(device), position_ids=positions, use_cache=False
        ).logits[0, _PROBE_TOKENS:].float()
        for before in (first, other)
    )  # fmt: skip
    if _differ(one, two):
        raise UsageError(
            f"{type(network).__name__} does not keep packed samples apart",
            hint="use --group-by-length instead of --pack",
        )


def _differ(one: Tensor, two: Tensor) -> bool:
    """Return whether logits differ by more than rounding."""
    return float((one - two).abs().max()) > _TOLERANCE * float(one.std())
