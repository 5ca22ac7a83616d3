"""Embeddings whose tables a GPU need not hold: of a batch it needs some of their rows, and reads those from the host.

That is the vocabulary's table where the output layer has one of its own (a gigabyte in Llama 3 8B), and those that some
models have for every layer. A tied table stays: the output layer multiplies with all of it.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

LEAST_BYTES = 32 << 20
"""Of a table that is worth it."""


def host_tables(network: Any, dtype: torch.dtype) -> dict[str, nn.Embedding]:
    """The embeddings whose tables may stay in host memory while a network is trained on a GPU, by dotted path.

    Args:
        network: of transformers, also one without memory.
        dtype: that its embeddings are held in.
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
