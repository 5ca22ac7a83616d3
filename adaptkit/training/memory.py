"""Which activations a run keeps, and what it needs of memory."""

from typing import Any

import torch
from torch import nn

from adaptkit.checkpoint.activations import Checkpointing, LayerSize, measure_layers
from adaptkit.checkpoint.assembly import find_stack
from adaptkit.errors import UsageError
from adaptkit.training.config import TrainConfig
from adaptkit.training.offload import Shelf
from adaptkit.training.segments import checkpoint_layers, choose_checkpointing


def save_activations(
    network: Any, config: TrainConfig, largest: tuple[int, int], device: torch.device
) -> Checkpointing:
    """Make a network keep the activations that the run's policy says.

    Args:
        network: with its adapter.
        config: of the run.
        largest: rows and length of the run's largest batch; where there is a budget, a batch of this shape goes
            through the network once, layer by layer.
        device: of the network.

    Raises:
        ConfigError: no such policy.
        UsageError: the budget is too small, or this network or device cannot do it.
    """
    if config.offload_checkpoints and device.type != "cuda":
        raise UsageError(
            "offload_checkpoints: moves checkpoints to host memory, which is where a CPU has them already",
            hint="leave it out; checkpointing: sqrt keeps fewer of them",
        )
    found = choose_checkpointing(
        network, config.checkpointing, lambda: layer_sizes(network, largest, device), config.offload_checkpoints
    )
    checkpoint_layers(network, found, Shelf(device) if config.offload_checkpoints else None)
    return found


def layer_sizes(network: Any, shape: tuple[int, int], device: torch.device) -> list[LayerSize]:
    """Measure a network's layers with a padded batch of a shape; must come before ``checkpoint_layers``.

    Args:
        network: ready to train.
        shape: rows and length.
        device: of the network.
    """
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # so that the layers get a mask, as most batches have one
    layers: list[nn.Module] = list(find_stack(network)[1])
    was_training = network.training
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        sizes = measure_layers(
            layers,
            lambda: network.train()(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1),
        )
    network.train(was_training)
    return sizes
