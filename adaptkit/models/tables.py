"""Embeddings whose tables can stay in host memory, since a batch needs only some rows, which the GPU reads from there.

These are the vocabulary's table if the output layer is not tied to it (a gigabyte in Llama 3 8B), and the per-layer
tables of some models. A tied table stays on the GPU: the output layer multiplies by all of it.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

LEAST_BYTES = 32 << 20
"""Smallest size of a table that is kept on the host."""


def host_tables(network: Any, dtype: torch.dtype) -> dict[str, nn.Embedding]:
    """Return, by dotted path, the embeddings whose tables can stay in host memory while a network trains on a GPU.

    Args:
        network: transformers' model, possibly on the meta device.
        dtype: dtype of its embeddings in training.
    """
    holders = Counter(id(held) for module in network.modules() for held in module._parameters.values())
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding)
        and (table := module._parameters.get("weight")) is not None
        and holders[id(table)] == 1
        and module.max_norm is None
        and table.numel() * dtype.itemsize >= LEAST_BYTES
    }
