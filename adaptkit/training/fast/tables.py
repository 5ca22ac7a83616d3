"""Frozen embedding tables in pinned host memory, from which a GPU kernel reads the rows of a batch directly.

With Llama 3 8B, a lookup of 2048 tokens transfers 16 MiB over the bus, which takes half a millisecond, and frees a
gigabyte of device memory for activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.models.subclassing import take_place
from adaptkit.models.tables import host_tables
from adaptkit.training.network.pinned import pinned
from adaptkit.training.triton_needs import has_triton


def keep_in_host_memory(network: Any, dtype: torch.dtype) -> None:
    """Move a network's large frozen tables that are used only for lookups off its GPU, if Triton is available.

    A table stays on the GPU if host memory for it cannot be pinned.

    Args:
        network: transformers model with its adapter, on its device.
        dtype: dtype of its embeddings.
    """
    for module in host_tables(network, dtype).values():
        table = module.weight.detach()
        if has_triton(table.device.type) and not module.weight.requires_grad:
            place = pinned(torch.empty_like, table, device="cpu")
            if place is not None:
                hold_in_host_memory(network, module, place.copy_(table), table.device)


def hold_in_host_memory(network: nn.Module, module: nn.Embedding, table: Tensor, device: torch.device) -> None:
    """Make an embedding look up its rows in a tensor that is not a parameter and is not moved with the module.

    Args:
        network: network of the module, which is replaced.
        module: the embedding.
        table: (entries, dim).
        device: device of the result, independent of the token IDs' device: Llama 4 moves the IDs to the device of
            ``weight``, which is now the host.
    """
    del module._parameters["weight"]
    place = take_place(network, module, _HostTable, nn.Embedding)
    place.weight, place.rows_device = table, device


class _HostTable(nn.Embedding):
    rows_device: torch.device

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) to (…, dim)."""
        if self.rows_device.type != "cuda":
            return functional.embedding(ids, self.weight)
        from adaptkit.training.fast import gpu_layers

        return gpu_layers.look_up(self.weight, ids.to(self.rows_device))
