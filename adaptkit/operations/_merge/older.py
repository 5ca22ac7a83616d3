"""What older releases of peft left out of an adapter's file or computed otherwise: merged is not as trained."""

from collections.abc import Iterator, Mapping

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.adapter_config import release
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.networks.addressing import Slice
from adaptkit.operations.targets._target import some


def older(checkpoint: Checkpoint, adapter: Adapter, addresses: Mapping[str, tuple[Slice, ...]]) -> Iterator[str]:
    """A sentence for each such thing.

    Args:
        checkpoint: the base.
        adapter: what is merged into it.
        addresses: where the base keeps the parameters that it changes.
    """
    modules = adapter.modules if adapter.config.get("bias") == "lora_only" else ()
    owners = {m: addresses[f"{m}.weight"][0].name.rpartition(".")[0] for m in modules if f"{m}.weight" in addresses}
    there = (m for m, owner in owners.items() if f"{owner}.bias" in checkpoint.tensors)
    lost = [module for module in there if f"{module}.bias" not in adapter.replaced]
    if lost:
        yield (
            f"{adapter.root}: bias is lora_only, but there is none of {some(lost)}: peft 0.7 to 0.20 left trained "
            "biases out of the file; the base's stay"
        )
    tables = sorted({*adapter.embeddings, *adapter.tokens})
    multiplies = str(checkpoint.config.get("model_type")).startswith("gemma3")
    if tables and multiplies and release(adapter.config) < (18, 0):
        yield (
            f"{adapter.root}: peft up to 0.17 trained {tables[0]} without the √hidden_size by which the model "
            "multiplies it; merge takes it as today's peft does. An alpha_pattern of alpha / √hidden_size makes a "
            "low-rank change what it was"
        )
