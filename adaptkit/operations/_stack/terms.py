"""The weighted changes of several adapters, matched module by module; refuses what cannot be stacked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaptkit.checkpoint.adapter import Adapter, require_plain
from adaptkit.checkpoint.manifest import Target
from adaptkit.checkpoint.vocabulary import is_head
from adaptkit.errors import AdapterError, NonFiniteError
from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._companions import refuse_compensation
from adaptkit.operations._terms import KEPT_KEYS

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Stackable:
    """The changes of several adapters.

    Attributes:
        modules: maps dotted path to the weighted changes in the order of the adapters, of rank 0 if one has none.
        embeddings: which of the modules are embeddings.
        partial: number of modules that only some adapters change.
        config: keys of the result's configuration.
        base_names: names of the base in the adapters' configurations, each once.
        targets: for the result's manifest; empty unless every adapter has a manifest.
    """

    modules: Mapping[str, tuple[LowRank, ...]]
    embeddings: frozenset[str]
    partial: int
    config: Mapping[str, Any]
    base_names: tuple[str, ...]
    targets: tuple[Target, ...]


def stackable(adapters: Sequence[Adapter], weights: Sequence[float]) -> Stackable:
    """Match the changes of several adapters by module.

    Args:
        adapters: in order.
        weights: one each, multiplied into the changes.

    Raises:
        AdapterError: an adapter contains more than low-rank changes, or the adapters do not fit together.
        NonFiniteError: a weighted change is too large for float32.
    """
    for adapter in adapters:
        _check_supported(adapter)
        _check_compatible(adapter, adapters[0])
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = {name: _changes(name, adapters, weights, name in embeddings) for name in names}
    agreed = {key: _agreed(adapters, key) for key in KEPT_KEYS}
    return Stackable(
        modules=modules,
        embeddings=embeddings,
        partial=sum(any(name not in adapter.modules for adapter in adapters) for name in names),
        config={
            "fan_in_fan_out": any(one.fan_in_fan_out for one in adapters),
            "task_type": _agreed(adapters, "task_type"),
        }
        | {key: value for key, value in agreed.items() if value},
        base_names=tuple(sorted({str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters})),
        targets=_targets(adapters),
    )


def _check_supported(adapter: Adapter) -> None:
    require_plain(adapter, "stack")
    refuse_compensation(adapter, "whose correction must not be added twice", "merge it into the 16-bit base instead")


def _check_compatible(adapter: Adapter, first: Adapter) -> None:
    plain = first if adapter.fan_in_fan_out else adapter
    # peft writes the value of the last layer that it adapted: for a base with Conv1D, false if that was the head.
    if adapter.fan_in_fan_out != first.fan_in_fan_out and not any(map(is_head, plain.modules)):
        raise AdapterError(
            f"{adapter.root} and {first.root} are for bases that store weights differently (fan_in_fan_out)",
            hint="stack adapters of the same base",
        )
    tied, expected = (bool(found.config.get("ensure_weight_tying")) for found in (adapter, first))
    if tied != expected and (adapter.embeddings or first.embeddings):
        raise AdapterError(
            f"{adapter.root} and {first.root}: only one of them changes the tied head together with the embedding "
            "(ensure_weight_tying)",
            hint="merge one adapter after the other instead",
        )


def _changes(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], is_embedding: bool
) -> tuple[LowRank, ...]:
    """Return each adapter's weighted change of one module, of rank 0 if it has none."""
    known = next(adapter for adapter in adapters if name in adapter.modules)
    shape = known.modules[name].shape
    none = LowRank.of_tensors(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0), 1.0)
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        term = adapter.modules.get(name, none)
        if term.shape != shape:
            raise AdapterError(
                f"{name}: shape {list(shape)} in {known.root}, but {list(term.shape)} in {adapter.root}",
                hint="stack adapters of the same base",
            )
        if name in adapter.modules and (name in adapter.embeddings) != is_embedding:
            raise AdapterError(
                f"{name}: an embedding in one adapter, but a linear layer in {adapter.root}",
                hint="stack adapters of the same base",
            )
        weighted = term.weighted(weight)
        if not lora.norm(weighted) <= _FLOAT32_MAX:  # also true if it is NaN
            raise NonFiniteError(
                f"{name}: the change of {adapter.root}, times {weight:g}, is too large for float32",
                hint="use a smaller --weight",
            )
        found.append(weighted)
    return tuple(found)


def _agreed(adapters: Sequence[Adapter], key: str) -> Any:
    """Return the value that all configurations have for a key; None if they differ."""
    values = [adapter.config.get(key) for adapter in adapters]
    return values[0] if all(value == values[0] for value in values) else None


def _targets(adapters: Sequence[Adapter]) -> tuple[Target, ...]:
    """Combine the adapters' targets by module; empty if an adapter has no manifest."""
    if any(adapter.manifest is None for adapter in adapters):
        return ()
    found: dict[str, list[Target]] = {}
    for adapter in adapters:
        for target in adapter.manifest.targets if adapter.manifest else ():
            found.setdefault(target.module, []).append(target)
    return tuple(
        replace(
            targets[0],
            base_xxh3_128=_only(target.base_xxh3_128 for target in targets),
            quantized_root=_only(target.quantized_root for target in targets),
        )
        for targets in found.values()
    )


def _only(values: Iterable[str | None]) -> str | None:
    """Return the only known value; None if there is none, or they differ, as for two quantizations of a base."""
    known = set(values) - {None}
    return known.pop() if len(known) == 1 else None
