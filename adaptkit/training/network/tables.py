"""Frozen tables of embeddings in pinned host memory, from which a GPU reads the rows of a batch by itself.

A lookup of 2048 tokens moves 16 MiB of Llama 3 8B's table over the bus, half a millisecond, and a gigabyte of the
device's memory is free for activations.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.networks.tables import host_tables
from adaptkit.numerics.kernels import has_triton
from adaptkit.training.network.pinned import pinned


def keep_in_host_memory(network: Any, dtype: torch.dtype) -> None:
    """Move the large tables that a network only looks up, and does not train, off its GPU, where Triton is there.

    Where so much host memory cannot be pinned, a table stays.

    Args:
        network: with its adapter, on its device.
        dtype: that its embeddings are held in.
    """
    for module in host_tables(network, dtype).values():
        table = module.weight.detach()
        if has_triton(table.device.type) and not module.weight.requires_grad:
            place = pinned(torch.empty_like, table, device="cpu")
            if place is not None:
                hold_in_host_memory(module, place.copy_(table), table.device)


def hold_in_host_memory(module: nn.Embedding, table: Tensor, device: torch.device) -> None:
    """Make an embedding look its rows up in a tensor, which is none of its parameters and stays where it is.

    Args:
        module: to change.
        table: (entries, dim).
        device: that rows go to, wherever the tokens are: Llama 4 sends them to where it believes the table to be.
    """
    del module._parameters["weight"]
    module.weight = table
    kind, name = type(module), type(module).__name__
    # It takes the place of torch's own lookup, below whatever a model's class does with the rows.
    module.__class__ = type(name, (_HostTable,) if kind is nn.Embedding else (kind, _HostTable), {})
    cast(_HostTable, module).rows_device = device


class _HostTable(nn.Embedding):
    rows_device: torch.device

    def forward(self, ids: Tensor) -> Tensor:
        """(…) to (…, dim)."""
        if self.rows_device.type != "cuda":
            return functional.embedding(ids, self.weight)
        from adaptkit.numerics.kernels import _gpu_layers

        return _gpu_layers.look_up(self.weight, ids.to(self.rows_device))
