"""Compare two adapters: low-rank changes in factored form, all other tensors as plain tensors."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.checkpoint.adapter import Adapter, TokenRows, read_adapter
from adaptkit.checkpoint.adapter_config import writes_transposed_experts
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME
from adaptkit.checkpoint.manifest import tensors_root
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.operations._diff.files import FilesDifference, ValueDifference, differ_in_files_beside, differ_in_values
from adaptkit.operations._diff.modules import (
    GroupDifference,
    ModuleDifference,
    by_layer,
    by_type,
    differ_in_module,
    grouped_as,
)
from adaptkit.operations._diff.tensors import StoredTensor, TensorDifference, differ_in_files, differ_in_memory
from adaptkit.operations._threads import map_in_threads
from adaptkit.wording import counted

Other = Array | StoredTensor | TokenRows
"""What an adapter may hold besides low-rank changes of modules: in memory, or where it is in its file."""

_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_UNORDERED = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")


@dataclass(frozen=True)
class AdapterDiffReport:
    """Comparison of two adapters; all tensors of both were read.

    Attributes:
        kind: always ``adapter``.
        first: folder of the first adapter.
        second: folder of the second adapter.
        same: whether both change a base bitwise identically and have the same side files.
        tensors_roots: ``tensors_root`` of each, computed from its tensors.
        manifests: sha256 of each manifest; None if there is no manifest.
        total: all modules together.
        layers: modules grouped by layer.
        types: modules grouped by type.
        modules: each module, largest relative difference first.
        only_in_first: modules that only the first adapter changes.
        only_in_second: modules that only the second adapter changes.
        tensors_equal: number of identical tensors that are not low-rank changes, such as DoRA magnitudes, biases and
            replaced tensors.
        tensors: such tensors that differ.
        tensors_only_in_first: such tensors that only the first adapter has.
        tensors_only_in_second: such tensors that only the second adapter has.
        config: configuration keys with different values. They do not affect ``same``: the figures already include
            their effect on the tensors.
        beside: differences in the tokenizer, chat templates and other side files.
        remarks: warnings and further notes for the reader.
    """

    kind: str
    first: str
    second: str
    same: bool
    tensors_roots: tuple[str, str]
    manifests: tuple[str | None, str | None]
    total: GroupDifference
    layers: tuple[GroupDifference, ...] = field(repr=False)
    types: tuple[GroupDifference, ...] = field(repr=False)
    modules: tuple[ModuleDifference, ...] = field(repr=False)
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    tensors_equal: int
    tensors: tuple[TensorDifference, ...] = field(repr=False)
    tensors_only_in_first: tuple[str, ...]
    tensors_only_in_second: tuple[str, ...]
    config: tuple[ValueDifference, ...]
    beside: FilesDifference
    remarks: tuple[str, ...]


def diff_adapters(first: Path, second: Path, *, threads: int) -> AdapterDiffReport:
    """Compare two adapters without materializing any full ΔW.

    Raises:
        AdapterError: one of them is not a readable LoRA adapter.
    """
    one, two = map_in_threads(partial(read_adapter, changed=True), (first, second), threads)
    changes = (_changes_of(one), _changes_of(two))
    names = sorted({*changes[0], *changes[1]})
    modules = list(
        map_in_threads(lambda name: differ_in_module(name, changes[0].get(name), changes[1].get(name)), names, threads)
    )
    alike = changes[0].keys() == changes[1].keys() and all(_is_same(changes[0][n], changes[1][n]) for n in names)
    held = (_others_of(one), _others_of(two))
    shared = sorted(held[0].keys() & held[1].keys())
    tensors = [found for name in shared if (found := _differ_in_other(name, *held[0][name], held[1][name][1]))]
    unmatched = [tuple(sorted(held[i].keys() - held[1 - i].keys())) for i in (0, 1)]
    beside = differ_in_files_beside(first, second)
    orientation_differs = one.fan_in_fan_out != two.fan_in_fan_out or one.embeddings != two.embeddings
    orientation_differs = orientation_differs or (
        _may_orient_stacks_differently(one, two) and any(len(set(s[0].shape)) == 1 for s in one.experts.values())
    )
    return AdapterDiffReport(
        kind="adapter",
        first=str(first),
        second=str(second),
        same=alike and not orientation_differs and not tensors and unmatched == [(), ()] and beside.same,
        tensors_roots=(tensors_root(one.records), tensors_root(two.records)),
        manifests=(one.manifest.sha256 if one.manifest else None, two.manifest.sha256 if two.manifest else None),
        total=grouped_as("all", modules),
        layers=by_layer(modules),
        types=by_type(modules),
        modules=tuple(sorted(modules, key=lambda m: (-m.relative, m.module))),
        only_in_first=tuple(sorted(changes[0].keys() - changes[1].keys())),
        only_in_second=tuple(sorted(changes[1].keys() - changes[0].keys())),
        tensors_equal=len(shared) - len(tensors),
        tensors=tuple(sorted(tensors, key=lambda t: (-(t.relative or 0.0), t.name))),
        tensors_only_in_first=unmatched[0],
        tensors_only_in_second=unmatched[1],
        config=tuple(differ_in_values(ADAPTER_CONFIG_NAME, _config(one), _config(two))),
        beside=beside,
        remarks=tuple(_remarks(one, two)),
    )


def _changes_of(adapter: Adapter) -> dict[str, LowRank]:
    """Return the low-rank changes by dotted path; expert ``i`` of a stacked parameter is ``<parameter>.i``."""
    found = dict(adapter.modules)
    for parameter, terms in adapter.experts.items():
        found |= {f"{parameter}.{number}": term for number, term in enumerate(terms)}
    return found


def _others_of(adapter: Adapter) -> dict[str, tuple[str, Other]]:
    """Map the name of everything else in an adapter to what it is, as the report shows it, and its value."""
    files, digests = adapter.files, adapter.digests
    found: dict[str, tuple[str, Other]] = {}
    for module, magnitude in adapter.magnitudes.items():
        found[f"{module}.lora_magnitude_vector"] = "DoRA magnitude", magnitude
    for module, bias in adapter.biases.items():
        found[f"{module}.lora_B.bias"] = "bias", bias
    for name, key in adapter.replaced.items():
        found[name] = "replaced tensor", StoredTensor(files, key, digests[key][0])
    for name, key in adapter.base_copies.items():
        found[f"{name} of the base"] = "begins with", StoredTensor(files, key, digests[key][0])
    for module, rows in adapter.tokens.items():
        found[f"{module} (trained tokens)"] = "token rows", rows
    for module, term in adapter.compensation.items():
        for half, factor in (("A", term.a), ("B", term.b)):
            found[f"{module}.lora_{half} (compensation)"] = "compensation", factor
    return found


def _differ_in_other(name: str, role: str, one: Other, two: Other) -> TensorDifference | None:
    """Compare two items of the same name; None if they are the same."""
    match one, two:
        case StoredTensor(), StoredTensor():
            return None if one.content == two.content else differ_in_files(name, one, two, role)
        case np.ndarray(), np.ndarray():
            return None if _equal(one, two) else differ_in_memory(name, role, one, two)
        case TokenRows(), TokenRows() if one.indices == two.indices:
            return None if _equal(one.rows, two.rows) else differ_in_memory(name, role, one.rows, two.rows)
        case TokenRows(), TokenRows():
            common = sorted(set(one.indices) & set(two.indices))
            both = [part.rows[[part.indices.index(token) for token in common]] for part in (one, two)]
            remark = f"{len(one.indices):,} and {len(two.indices):,} tokens, {len(common):,} in both"
            return differ_in_memory(name, role, both[0], both[1], remark)
        case _:
            raise TypeError(f"{name}: {type(one).__name__} cannot be compared with {type(two).__name__}")


def _equal(first: Array, second: Array) -> bool:
    return first.dtype == second.dtype and np.array_equal(first, second)


def _is_same(first: LowRank, second: LowRank) -> bool:
    return is_equal(first, second) and (first.a.dtype, first.b.dtype) == (
        second.a.dtype,
        second.b.dtype,
    )


def _config(adapter: Adapter) -> Mapping[str, Any]:
    """Return the configuration with its unordered lists sorted: peft writes sets."""
    return {
        key: sorted(value, key=str) if key in _UNORDERED and isinstance(value, list) else value
        for key, value in adapter.config.items()
    }


def _may_orient_stacks_differently(first: Adapter, second: Adapter) -> bool:
    """Return whether the two peft releases that wrote the adapters may swap input and output of expert stacks."""
    both = bool(first.experts and second.experts)
    return both and writes_transposed_experts(first.config, False) != writes_transposed_experts(second.config, False)


def _remarks(first: Adapter, second: Adapter) -> Iterator[str]:
    for stacked, other in ((first, second), (second, first)):
        single = next((module for module in other.modules if _ONE_EXPERT.search(module)), "")
        if stacked.experts and single:
            yield (
                f"experts are not compared: {stacked.root} changes stacks, such as {min(stacked.experts)}, and the "
                f"other single layers, such as {single}; merge each into the base, and compare the results"
            )
    if _may_orient_stacks_differently(first, second):
        yield (
            "stacks of experts are compared as stored, but the two peft releases that wrote them order input and "
            "output differently unless the model declares its stacks transposed"
        )
    if first.magnitudes or second.magnitudes:
        yield "DoRA: the figures describe Δ only; its magnitudes scale the rows of W + Δ"
    for adapter in (first, second):
        if adapter.manifest is not None and adapter.manifest.tensors_root != tensors_root(adapter.records):
            yield f"{adapter.root}: its tensors do not match its manifest; run adaptkit verify {adapter.root}"
        if problem := adapter.manifest_mismatch():
            yield f"{adapter.root}: {problem} according to its manifest; run adaptkit verify {adapter.root}"
    one, two = (adapter.manifest.base_fingerprints() if adapter.manifest else {} for adapter in (first, second))
    unlike = sorted(module for module in one.keys() & two.keys() if one[module] != two[module])
    if unlike:
        yield f"trained on different bases: {counted(len(unlike), 'module', 'differ')}, such as {unlike[0]}"
