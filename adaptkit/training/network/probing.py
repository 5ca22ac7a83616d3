"""What a network does, found out by running it on a few tokens; and how that leaves no trace.

transformers tells the samples of a packed sequence by positions that begin again, and lets none attend to another, as
long as it gets no mask: ``sdpa`` and ``eager`` attention through a mask that it makes, in sequences of any number;
flash attention for one sequence at a time, by lengths. What does not attend (convolutions, states) sees other samples.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import UsageError
from adaptkit.torch_compiler import without_compiler

_PROBE_TOKENS = 6
_TOLERANCE = 0.02
"""Of the deviation of the logits: other tokens change the rounding of some layers, and no more."""


def forked_random(device: torch.device) -> Any:
    """A context in which random numbers are drawn, on the host and on a device, that are drawn again after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def as_in_training(network: Any) -> Iterator[None]:
    """Let a network run as it does in training while the block runs, but for gradients."""
    was_training = network.training
    try:
        with without_compiler(), torch.no_grad(), forked_random(network.device):
            network.train()
            yield
    finally:
        network.train(was_training)


@contextmanager
def exchanged(module: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let a module have other parts of these names while the block runs."""
    before = {name: module._modules[name] for name in parts}
    module._modules.update(parts)
    try:
        yield
    finally:
        module._modules.update(before)


@torch.no_grad()
def require_causal(network: Any) -> None:
    """Make sure that no token sees what it is to foretell: the second one may change nothing for the first.

    Raises:
        UsageError: it does, as in BERT, which is no decoder unless it is told to be one.
    """
    said = {getattr(module, "is_causal", None) for module in network.modules()} - {None}
    if said == {True}:  # of all its attention; to ask a large model takes seconds
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
    """Make sure that a model keeps packed samples apart: nothing may change for one when another does.

    Args:
        network: transformers' model.

    Raises:
        UsageError: something does.
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
    """Whether logits are others, beyond rounding."""
    return float((one - two).abs().max()) > _TOLERANCE * float(one.std())
