"""What can be checked about adapters before a base is read: their weights, the base that they expect, companions."""

import sys
from collections.abc import Iterator, Sequence

from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.manifest import tensors_root
from adaptkit.errors import AdapterError, BaseMismatchError, UsageError
from adaptkit.wording import counted, first_few


def expected_fingerprints(
    adapters: Sequence[Adapter], hint: str = "merge each into its own base, or add --allow-base-mismatch"
) -> dict[str, tuple[str, str]]:
    """Return the fingerprints of the base's weights that the adapters' manifests record.

    Args:
        adapters: in order.
        hint: of the error if they disagree.

    Returns:
        Maps module, or name of a tensor that is not a module's weight, to (fingerprint, adapter that records it).

    Raises:
        BaseMismatchError: two adapters were trained on different bases.
    """
    expected: dict[str, tuple[str, str]] = {}
    for adapter in adapters:
        for module, digest in (adapter.manifest.base_fingerprints() if adapter.manifest else {}).items():
            known, by = expected.setdefault(module, (digest, str(adapter.root)))
            if known != digest:
                raise BaseMismatchError(
                    f"{by} and {adapter.root} were trained on different bases: {module} differs", hint=hint
                )
    return expected


def weights_of(adapters: Sequence[object], weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return one weight per adapter, each 1 if no weights are given.

    Raises:
        UsageError: there is no adapter, the number of weights differs, or a weight is not finite.
    """
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one adapter folder")
    weights = weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(
            f"{counted(len(weights), 'weight')} for {counted(len(adapters), 'adapter')}",
            hint="give as many --weight as adapters",
        )
    for weight in weights:
        if not abs(weight) <= sys.float_info.max:
            raise UsageError(
                f"weights: must be finite numbers, found {weight}", hint="give each --weight a number such as 0.5"
            )
    return weights


def given_again(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield a note on each adapter that is given several times, also in different folders: its changes add up."""
    found: dict[tuple[str, str], list[str]] = {}
    for adapter in adapters:
        found.setdefault((tensors_root(adapter.records), adapter_identity(adapter)), []).append(str(adapter.root))
    for roots in found.values():
        if len(roots) > 1:
            others = list(dict.fromkeys(roots))[1:]
            also = f", also as {first_few(others)}" if others else ""
            yield f"{roots[0]}: given {len(roots)} times{also}; it counts each time"


def refuse_compensation(adapter: Adapter, why: str, instead: str) -> None:
    """Reject a companion adapter, which offsets part of what quantization loses, or one that was trained from it.

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
