"""The output layer of a model whose name no table has; see ``checkpoint.vocabulary``."""

from typing import Any

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.networks.architecture import empty_network, named_network, why_unknown


def asked_head(checkpoint: Checkpoint) -> str:
    """The dotted path of a checkpoint's output layer by transformers; empty if that is absent, or does not know it.

    Loads transformers.

    Raises:
        UsageError, CheckpointError: ``config.json`` describes a model that cannot be built.
    """
    if why_unknown(checkpoint):
        return ""
    network = named_network(checkpoint) or empty_network(checkpoint)
    return head_path(network)


def head_path(network: Any) -> str:
    """The dotted path of a model's output layer; empty if it has none."""
    head = network.get_output_embeddings()
    return next((path for path, module in network.named_modules() if head is not None and module is head), "")
