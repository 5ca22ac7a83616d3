"""Adapters of single experts, which peft 0.21.2 stacks because transformers 5 stores experts in stacks.

Gate and up share one stack, ``gate_up_proj``. peft gives each stack the rank and alpha of the whole configuration, and
loads a stack only if every expert has its matrices.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from adaptkit.checkpoint.adapter_config import writes_transposed_experts
from adaptkit.models.peft_names import DOWNS, GATES, STACKED, UPS, mistaken_for_experts
from adaptkit.operations._roles import expert_count
from adaptkit.operations.targets import _peft_config, _scalings
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._peft_tensors import DROPS
from adaptkit.operations.targets._target import Finding, error_about, some

ONE_EXPERT = re.compile(r"(?P<stack>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<part>\w+)")
"""Module path of a single expert's matrix."""


def swapped(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find stacks in which current peft swaps input and output, since an older release wrote them.

    Args:
        files: the adapter's files.
        base: its model code decides for releases before 0.19.0; without it only stacks of 0.19.0 are found.
    """
    network = base.network if base else None
    modules = dict(network.named_modules()) if network is not None else {}

    def is_transposed(pair: Pair) -> bool:
        module = modules.get(pair.module.replace(".base_layer", ""))
        return module is None or bool(getattr(module, "is_transposed", False))

    stacked = (pair for pair in files.pairs if pair.stacked)
    found = [pair.module for pair in stacked if writes_transposed_experts(files.config, is_transposed(pair))]
    yield from error_about(
        found,
        f"stack of experts in the layout of peft {files.config.get('peft_version') or '0.17'}",
        "current peft swaps input and output: it fails, or computes wrong results if the matrices are square",
        files.merge(),
    )


def single(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find single experts that peft fails on, scales differently, or drops.

    Args:
        files: the adapter's files.
        base: without it the model is assumed to store experts in stacks.
    """
    found = [(pair, match) for pair in files.pairs if (match := ONE_EXPERT.fullmatch(pair.module))]
    modules = [pair.module for pair, _ in found]
    if not found or not _has_stacks(base, modules):
        return
    family = base.model_type if base else None
    if files.config.get("use_rslora"):
        yield Finding(
            "error",
            f"use_rslora in adapter_config.json, with one pair of matrices per expert: {some(modules)}",
            "peft doubles alpha and rank when it stacks them, so the scaling is too large by a factor of √2",
            _scalings.flat_change(files),
        )
    elif family is not None and family not in STACKED:
        effect = f"peft does not stack them for {family}: it fails, or silently drops them"
        yield Finding("error", f"{some(modules)}: one pair of matrices per expert", effect, files.merge())
    pattern = files.config.get("target_modules")
    if isinstance(pattern, str) and pattern != _peft_config.SHORTHAND:
        paths = {f"{match['stack']}.{match['part']}" for _, match in found}
        unnamed = [path for path in paths if not _peft_config.is_module({"target_modules": pattern}, path)]
        if unnamed:
            yield Finding(
                "error",
                f"the pattern in target_modules in adapter_config.json does not match {some(unnamed)}",
                "peft looks for the stack under that name, and fails or drops the tensors",
                "name the modules in a list, such as ['down_proj', 'gate_proj', 'up_proj']",
            )
    uneven = [pair.module for pair, _ in found if _is_uneven(files, pair)]
    if uneven:
        yield Finding(
            "error",
            f"rank or alpha of {some(uneven)} differs from r or lora_alpha in adapter_config.json",
            "peft gives all experts the same rank and alpha: it fails, or scales them wrongly",
            files.merge(),
        )
    numbers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for _, match in found:
        numbers[match["stack"], match["part"]].add(int(match["number"]))
    yield from _parts(files, numbers)
    count = (expert_count(base.config) if base else None) or 1 + max(max(there) for there in numbers.values())
    lacking = [f"{stack} ({part})" for (stack, part), there in numbers.items() if len(there) < count]
    yield from error_about(
        lacking, f"not all of {count} experts have a pair of matrices", "peft fails: size mismatch", files.merge()
    )


def beside(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find modules that are not experts but are named like their matrices: peft takes them for parts of stacks."""
    family = (base.model_type if base else None) or ""
    modules = [pair.module for pair in files.pairs if not pair.stacked and not ONE_EXPERT.fullmatch(pair.module)]
    taken = mistaken_for_experts(family, modules)
    yield from error_about(
        taken,
        f"not an expert, but named like the experts of {family}",
        f"peft stacks everything with such a name; {DROPS}",
        files.merge(),
    )


def _parts(files: AdapterFiles, numbers: defaultdict[tuple[str, str], set[int]]) -> Iterator[Finding]:
    """Find experts with only gate or only up, and experts with both if the file has no ``down_proj`` at all."""
    halves = {
        stack: [any(s == stack and part in names for s, part in numbers) for names in (GATES, UPS)]
        for stack, _ in numbers
    }
    alone = [stack for stack, there in halves.items() if len(set(there)) > 1]
    yield from error_about(
        alone,
        "only one of gate and up of the experts",
        "peft fails, since the model stores both in one matrix",
        files.merge(),
    )
    both = [stack for stack, there in halves.items() if all(there)]
    if both and not any(part in DOWNS for _, part in numbers):
        yield Finding("error", f"{some(both)}: gate and up of the experts, but no down", DROPS, files.merge())


def _has_stacks(base: BaseShapes | None, modules: list[str]) -> bool:
    """Return whether the model stacks experts that the file has one by one; True if that is unknown."""
    return base is None or not any(f"{module}.weight" in base.tensors for module in modules)


def _is_uneven(files: AdapterFiles, pair: Pair) -> bool:
    return bool(pair.asked != files.config.get("r") or pair.alpha != files.config.get("lora_alpha"))
