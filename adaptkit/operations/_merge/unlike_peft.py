"""Notes on where the merge differs from what peft trained or would merge itself."""

from collections.abc import Iterator, Mapping, Sequence

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.adapter_config import release
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.models.addressing import Slice
from adaptkit.operations.targets import _peft_selection
from adaptkit.operations.targets._target import some


def trained_differently(
    checkpoint: Checkpoint, adapter: Adapter, addresses: Mapping[str, tuple[Slice, ...]]
) -> Iterator[str]:
    """Yield a note on what older peft releases left out of the adapter's file, or computed differently in training."""
    modules = adapter.modules if adapter.config.get("bias") == "lora_only" else ()
    owners = {m: addresses[f"{m}.weight"][0].name.rpartition(".")[0] for m in modules if f"{m}.weight" in addresses}
    there = (m for m, owner in owners.items() if f"{owner}.bias" in checkpoint.tensors)
    lost = [module for module in there if f"{module}.bias" not in adapter.replaced]
    if lost:
        yield (
            f"{adapter.root}: bias is lora_only, but the file has no bias of {some(lost)}: peft 0.7 to 0.20 did not "
            "save trained biases; the base's are kept"
        )
    tables = sorted({*adapter.embeddings, *adapter.tokens})
    multiplies = str(checkpoint.config.get("model_type")).startswith("gemma3")
    if tables and multiplies and release(adapter.config) < (18, 0):
        yield (
            f"{adapter.root}: peft up to 0.17 trained {tables[0]} without the factor √hidden_size that the model "
            "applies to it; merge applies the factor, as current peft does. To restore a low-rank change as it was "
            "trained, set its alpha_pattern to alpha / √hidden_size"
        )


def untargeted(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield a note on modules that an adapter holds but its configuration does not select: peft ignores them."""
    for adapter in adapters:
        config = adapter.config
        if config.get("target_modules") in (None, _peft_selection.SHORTHAND) or adapter.ties_weights:
            continue  # peft selects by architecture, or adds tied modules
        found = _peft_selection.untargeted(config, adapter.modules)
        if found:
            yield (
                f"{adapter.root}: adapter_config.json does not select {some(found)}, which peft would therefore "
                "ignore; it is in the file and is merged"
            )
