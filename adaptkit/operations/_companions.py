"""Refusals of companion adapters, which offset part of what quantization loses, where that cannot be kept."""

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.errors import AdapterError


def refuse_compensation(adapter: Adapter, why: str, instead: str) -> None:
    """Reject a companion adapter, or one that was trained from it.

    Args:
        adapter: the adapter to check.
        why: what would happen to the correction of the base, for the message.
        instead: what to do with a trained adapter, for the hint.

    Raises:
        AdapterError: says which of both it is.
    """
    if adapter.only_compensates:
        raise AdapterError(
            f"{adapter.root}: is a companion adapter, {why}, and was not trained",
            hint=f"train it first: {training_of(adapter)}",
        )
    if adapter.compensation:
        raise AdapterError(f"{adapter.root}: was trained from a companion adapter, {why}", hint=instead)


def training_of(adapter: Adapter) -> str:
    """Return the command that trains a companion adapter, for hints."""
    return f"adaptkit train --base QUANTIZED --init {adapter.root} --data FILE -o OUT"
