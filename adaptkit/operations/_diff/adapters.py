"""Compare two adapters: low-rank changes in factored form, all other tensors as plain tensors."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.adapter_config import writes_transposed_experts
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME
from adaptkit.checkpoint.progress import counted
from adaptkit.numerics.comparison import Overlap, compare
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.spectrum import effective_rank, singular_values, stable_rank
from adaptkit.operations._diff.files import FilesDifference, ValueDifference, differ_in_files_beside, differ_in_values
from adaptkit.operations._diff.groups import (
    GroupDifference,
    ModuleDifference,
    OverlapReport,
    by_layer,
    by_type,
    cosine,
    relative,
    total,
)
from adaptkit.operations._diff.parts import changes_of, differ_in_part, held_by
from adaptkit.operations._diff.tensors import TensorDifference
from adaptkit.operations._threads import map_in_threads

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
    changes = (changes_of(one), changes_of(two))
    names = sorted({*changes[0], *changes[1]})
    modules = list(
        map_in_threads(lambda name: differ_in_module(name, changes[0].get(name), changes[1].get(name)), names, threads)
    )
    alike = changes[0].keys() == changes[1].keys() and all(_is_same(changes[0][n], changes[1][n]) for n in names)
    held = (held_by(one), held_by(two))
    shared = sorted(held[0].keys() & held[1].keys())
    tensors = [found for name in shared if (found := differ_in_part(name, held[0][name], held[1][name]))]
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
        manifests=(_manifest_sha256(one), _manifest_sha256(two)),
        total=total(modules),
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


def differ_in_module(name: str, first: LowRank | None, second: LowRank | None) -> ModuleDifference:
    """Compare two changes of one module; None counts as zero, and changes of different shapes as orthogonal."""
    found = compare(first, second) if first and second and first.shape == second.shape else None
    sigmas = found.sigmas if found else tuple(singular_values(term) if term else None for term in (first, second))
    norms = (_norm(sigmas[0]), _norm(sigmas[1]))
    inner = found.inner if found else 0.0
    distance = _norm(found.difference_sigma) if found else math.hypot(*norms)
    measured = found is not None and found.columns.cosines.numel() > 0
    return ModuleDifference(
        module=name,
        shapes=(first.shape if first else None, second.shape if second else None),
        ranks=(first.rank if first else 0, second.rank if second else 0),
        norms=norms,
        inner=inner,
        difference=distance,
        cosine=cosine(inner, norms),
        relative=relative(distance, norms),
        spectra=(_numbers(sigmas[0]), _numbers(sigmas[1])),
        difference_spectrum=_numbers(found.difference_sigma) if found else (),
        effective_ranks=_both(effective_rank, sigmas),
        stable_ranks=_both(stable_rank, sigmas),
        columns=_overlap(found.columns) if found else None,
        rows=_overlap(found.rows) if found else None,
        sign_agreement=found.sign_agreement if found and measured else None,
        interference=found.interference if found and measured else None,
        interference_share=found.interference_share if found and measured else None,
    )


def _is_same(first: LowRank, second: LowRank) -> bool:
    return is_equal(first, second) and (first.lora_a.dtype, first.lora_b.dtype) == (
        second.lora_a.dtype,
        second.lora_b.dtype,
    )


def _norm(sigma: Tensor | None) -> float:
    return 0.0 if sigma is None else float(sigma.norm())


def _numbers(sigma: Tensor | None) -> tuple[float, ...]:
    return () if sigma is None else tuple(sigma.tolist())


def _both(figure: Callable[[Tensor], float], sigmas: tuple[Tensor | None, ...]) -> tuple[float, float]:
    one, two = (0.0 if sigma is None else figure(sigma) for sigma in sigmas)
    return one, two


def _overlap(overlap: Overlap) -> OverlapReport | None:
    rms, random = overlap.rms, overlap.random
    if rms is None or random is None:
        return None
    return OverlapReport(tuple(overlap.cosines.tolist()), rms, random)


def _manifest_sha256(adapter: Adapter) -> str | None:
    return adapter.manifest.sha256 if adapter.manifest else None


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


def _one_by_one(adapter: Adapter) -> str:
    """Return a module that is a linear layer of a single expert; empty if there is none."""
    return next((module for module in adapter.modules if _ONE_EXPERT.search(module)), "")


def _remarks(first: Adapter, second: Adapter) -> Iterator[str]:
    for stacked, single in ((first, _one_by_one(second)), (second, _one_by_one(first))):
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
    other = sorted(module for module in one.keys() & two.keys() if one[module] != two[module])
    if other:
        yield f"trained on different bases: {counted(len(other), 'module', 'differ')}, such as {other[0]}"
