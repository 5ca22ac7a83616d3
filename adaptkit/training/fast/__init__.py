"""Everything that makes a network faster or smaller, and that no result needs; entered by ``accelerate``.

    attention        on a CPU in blocks, by compiled kernels; on a GPU torch's, also for packed rows and shared heads
    products         layers that read the same input; casts, decoding and gradients by few launches
    norms_and_gates  norms and gates that are not saved
    last_products    the last product of a layer, which is not recomputed
    gpu_entropy      the loss, over logits that become their gradient, on a GPU
    tables           large embeddings, in host memory, on a GPU

``docs/figures.md`` has what each buys. Nothing outside of this room imports its modules.
"""

from typing import Any

import torch

from adaptkit.training.fast.attention import use_own_attention
from adaptkit.training.fast.last_products import find_last_products
from adaptkit.training.fast.norms_and_gates import replace_norms_and_gates
from adaptkit.training.fast.products import join_products
from adaptkit.training.fast.tables import keep_in_host_memory
from adaptkit.training.network.loss import OutputLayer
from adaptkit.training.triton_needs import has_triton

PARTS = ("attention", "tables", "last_products", "norms_and_gates", "products", "entropy")
_OF_TRAINING = frozenset({"last_products", "norms_and_gates"})


def accelerate(
    network: Any,
    dtype: torch.dtype,
    device: torch.device,
    output: OutputLayer | None = None,
    trains: bool = True,
    is_sharded: bool = False,
    without: frozenset[str] = frozenset(),
) -> None:
    """Replace operations of a network with its adapter by faster ones, which give the same results up to rounding.

    Call it before layers are checkpointed or sharded.

    Args:
        network: transformers model, whose linear layers are replaced; modified in place.
        dtype: compute dtype.
        device: device that it will run on; the network may still be on the host, or consist of fake tensors.
        output: its output layer.
        trains: whether it will be trained.
        is_sharded: whether its frozen weights will be sharded across processes; no table is moved to host memory then.
        without: names of ``PARTS`` to leave out, to measure what each buys.
    """
    on_gpu = device.type == "cuda"
    parts = set(PARTS) - without - (frozenset() if trains else _OF_TRAINING)
    if "attention" in parts:
        use_own_attention(network)
    if "tables" in parts and on_gpu and not is_sharded:
        keep_in_host_memory(network, dtype)
    last_products = find_last_products(network) if "last_products" in parts else frozenset()
    if "norms_and_gates" in parts:
        replace_norms_and_gates(network, on_gpu)
    if "products" in parts:
        join_products(network, last_products, dtype, on_gpu)
    if "entropy" in parts and has_triton(device.type) and output is not None:
        from adaptkit.training.fast import gpu_entropy

        output.cross_entropy = gpu_entropy.cross_entropy
