"""What adapters say of themselves before anything is read of a base: their weights, and which base they expect."""

import sys
from collections.abc import Sequence

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.progress import counted
from adaptkit.errors import BaseMismatchError, UsageError

KEPT_KEYS = ("revision", "ensure_weight_tying")
"""What the configuration of an adapter that is made of others says as theirs do, if they agree, beside what it must."""


def expected_fingerprints(
    adapters: Sequence[Adapter], hint: str = "merge each into its own base, or add --allow-base-mismatch"
) -> dict[str, tuple[str, str]]:
    """The fingerprints of the base's weights according to the adapters' manifests.

    Args:
        adapters: in order.
        hint: what to do where they disagree.

    Returns:
        Module, or tensor that is no module's weight -> (fingerprint, folder of the adapter that says so).

    Raises:
        BaseMismatchError: two adapters were trained on different bases.
    """
    expected: dict[str, tuple[str, str]] = {}
    for adapter in adapters:
        for target in adapter.manifest.targets if adapter.manifest else ():
            if target.base_xxh3_128 is None:
                continue
            known, by = expected.setdefault(target.module, (target.base_xxh3_128, str(adapter.root)))
            if known != target.base_xxh3_128:
                raise BaseMismatchError(
                    f"{by} and {adapter.root} were trained on different bases: {target.module} differs", hint=hint
                )
    return expected


def weights_of(adapters: Sequence[Adapter], weights: tuple[float, ...]) -> tuple[float, ...]:
    """One finite weight for each of at least one adapter: 1 if none is given.

    Raises:
        UsageError: says which it is.
    """
    if not adapters:
        raise UsageError("no adapter given", hint="give at least one adapter folder")
    weights = weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(
            f"{counted(len(weights), 'weight')} for {counted(len(adapters), 'adapter')}",
            hint="give one --weight per adapter",
        )
    for weight in weights:
        if not abs(weight) <= sys.float_info.max:
            raise UsageError(
                f"weights: must be finite numbers, found {weight}", hint="give each --weight a number such as 0.5"
            )
    return weights
