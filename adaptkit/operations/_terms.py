"""What adapters do to a checkpoint: which weight each changes, by what, and which base it expects."""

from collections.abc import Sequence

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.header import FLOATS
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank


def plan_terms(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, list[LowRank]]:
    """Say which weight each adapter changes, and by what; every module of every adapter finds its weight or fails.

    What an adapter began with to make up for the quantization of its base is taken off again: the base here has lost
    nothing.

    Args:
        checkpoint: the base, or what was merged from it.
        adapters: in order.
        weights: one each.

    Returns:
        Tensor name -> its changes in order.

    Raises:
        BaseMismatchError: a module that the checkpoint lacks or ties to another, or a shape that differs.
        UsageError: an adapter does nothing but make up for quantization.
    """
    terms: dict[str, list[LowRank]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.only_compensates:
            raise UsageError(
                f"{adapter.root}: only makes up for what quantization lost, and {checkpoint.root} has lost nothing",
                hint="train it first: adaptkit train --init",
            )
        for module, low_rank in adapter.modules.items():
            name = f"{module}.weight"
            change = lora.transposed(low_rank) if adapter.fan_in_fan_out else low_rank
            if name not in checkpoint.tensors:
                raise BaseMismatchError(
                    f"{adapter.root}: changes {name}, which {checkpoint.root} does not have",
                    hint="this adapter is for another model",
                )
            if module.rpartition(".")[2] == "lm_head" and checkpoint.config.get("tie_word_embeddings"):
                raise BaseMismatchError(
                    f"{adapter.root}: changes {name}, but {checkpoint.root} ties its head to its embedding",
                    hint="readers would ignore the merged head: untie it first",
                )
            spec = checkpoint.spec(name)
            if spec.shape != change.shape or spec.dtype not in FLOATS:
                raise BaseMismatchError(
                    f"{adapter.root}: {name} is {list(change.shape)} for the adapter, but "
                    f"{list(spec.shape)} ({spec.dtype}) in {checkpoint.root}",
                    hint="this adapter is for another model",
                )
            terms.setdefault(name, []).append(change.weighted(weight))
            if module in adapter.compensation:
                begun = adapter.compensation[module]
                begun = lora.transposed(begun) if adapter.fan_in_fan_out else begun
                terms[name].append(begun.weighted(-weight))
    return terms


def expected_fingerprints(adapters: Sequence[Adapter]) -> dict[str, tuple[str, str]]:
    """The fingerprints of the base's weights according to the adapters' manifests.

    Returns:
        Tensor name -> (fingerprint, folder of the adapter that says so).

    Raises:
        BaseMismatchError: two adapters were trained on different bases.
    """
    expected: dict[str, tuple[str, str]] = {}
    for adapter in adapters:
        for target in adapter.manifest.targets if adapter.manifest else ():
            if target.base_xxh3_128 is None:
                continue
            name = f"{target.module}.weight"
            known, by = expected.setdefault(name, (target.base_xxh3_128, str(adapter.root)))
            if known != target.base_xxh3_128:
                raise BaseMismatchError(
                    f"{by} and {adapter.root} were trained on different bases: {name} differs",
                    hint="merge each onto its own base, or say --allow-base-mismatch",
                )
    return expected


def knows_base(adapter: Adapter) -> bool:
    """Whether an adapter's manifest has the fingerprint of every weight that it changes."""
    targets = adapter.manifest.targets if adapter.manifest else ()
    return set(adapter.modules) <= {target.module for target in targets if target.base_xxh3_128 is not None}


def check_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Refuse anything but one finite weight for each of at least one adapter.

    Raises:
        UsageError: says which it is.
    """
    if not adapters:
        raise UsageError("no adapter given")
    if len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters", hint="give one --weight per adapter")
    for weight in weights:
        if not abs(weight) < float("inf"):
            raise UsageError(f"the weight {weight} is not a finite number")
