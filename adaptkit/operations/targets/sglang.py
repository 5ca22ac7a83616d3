"""SGLang 0.5.23 (November 2026): its LoRA code.

``sglang/srt/lora/lora_config.py`` and ``lora.py`` read the configuration and sort tensors by substrings of their names,
``lora_manager.py`` refuses adapters, ``mem_pool.py`` copies tensors into buffers that all have the configuration's
rank, and ``utils.py`` has the names of modules. Sources after that release also read ``rank_pattern`` and
``alpha_pattern``.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from adaptkit.checkpoint.layout import read_small
from adaptkit.errors import CheckpointError
from adaptkit.models.peft_names import GATES, UPS
from adaptkit.operations.targets import _checkpoint_rules, _rules, _scalings
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._rules import VARIANTS
from adaptkit.operations.targets._target import Finding, Target, error_about, some

_ADDED = "added_tokens.json"
_LAYER = re.compile(r"layers\.\d+\.")
_TABLES = ("embed_tokens", "lm_head")
_ALL = ("all", "all-linear")
_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "gate_proj": "gate_up"} | {
    "up_proj": "gate_up",
    "gate_up_proj": "gate_up",
}
"""Projections that SGLang fuses into one matrix, and the name of that matrix."""


def _adapter(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    yield from _rules.weights(files, "SGLang")
    yield from _configuration(files)
    yield from _scalings.reinterpreted_patterns(files, "SGLang")
    yield from _scaling(files)
    yield from _names(files)
    yield from _rules.halves(files, "SGLang fails, or silently leaves the module unchanged")
    yield from _rules.other_layers(files, "SGLang")
    yield from _rules.ranks(files, "SGLang fails when it copies the tensors into buffers of the configuration's rank")
    yield from _fused(files, base)
    yield from _experts(files)
    yield from _beside(files)
    yield from _added_tokens(files, base)
    yield from _rules.on_base(
        files,
        base,
        "SGLang drops the tensors with a warning, or fails at the first request",
        "SGLang fails when it copies the tensors into its buffers",
    )
    yield from _rules.tables(
        files, base, "error", "SGLang fails when it copies the tensors into buffers of the base's size", files.merge()
    )


def _configuration(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    yield from _rules.kind(files, "SGLang rejects every type but LORA")
    targets = config.get("target_modules")
    if not isinstance(targets, list) and targets not in _ALL:
        modules = sorted({pair.module.rpartition(".")[2] for pair in files.pairs})
        yield Finding(
            "error",
            f"target_modules is {targets!r} in adapter_config.json",
            "SGLang accepts a list of names or 'all-linear', and fails on anything else",
            f"set it to {json.dumps(modules)}" if modules else files.merge(),
        )
    elif isinstance(targets, list):
        last = [str(name).rpartition(".")[2] for name in targets]
        known = {_TOGETHER.get(name, name) for name in last}
        modules = [pair.module for pair in files.pairs if _LAYER.search(f"{pair.module}.") and not pair.stacked]
        leaves = {module: module.rpartition(".")[2] for module in modules if ".experts." not in module}
        unnamed = [module for module, leaf in leaves.items() if _TOGETHER.get(leaf, leaf) not in known]
        if unnamed:
            yield Finding(
                "error",
                f"target_modules in adapter_config.json does not name {some(unnamed)}",
                "SGLang fails at the first request",
                "add it to target_modules",
            )
    yield from _rules.numbers(files, "SGLang fails when it computes alpha / r, or uses the wrong scaling")
    yield from _rules.variants(files, ("use_dora",), "SGLang rejects {what}", files.merge())
    rest = {key for key in VARIANTS if key not in ("use_dora", "lora_bias")}
    yield from _rules.variants(
        files, rest, "SGLang does not support {what} and computes plain LoRA", files.merge_elsewhere()
    )
    yield from _rules.begun(files, "SGLang ignores this, and applies the adapter to a base that it does not fit")
    yield from _rules.unknown_keys(files, "SGLang ignores unknown keys")


def _scaling(files: AdapterFiles) -> Iterator[Finding]:
    rank = files.config.get("r")
    flat = _scalings.flat_scaling(files.config.get("lora_alpha"), rank)
    if flat is None:
        return
    wrong = _scalings.scaled_wrongly(files, {pair.module: flat for pair in files.pairs})
    if wrong:
        _, meant, used = wrong[0]
        why = "use_rslora" if files.config.get("use_rslora") else "alpha_pattern or rank_pattern"
        yield Finding(
            "error",
            f"{why} in adapter_config.json scales {some([name for name, _, _ in wrong])} by {meant:g}",
            f"SGLang silently scales everything by lora_alpha / r = {used:g}",
            _scalings.flat_change(files),
        )
    other = [pair.module for pair in files.pairs if pair.rank and pair.rank == pair.asked and pair.rank != rank]
    if other:
        yield Finding(
            "error",
            f"rank_pattern in adapter_config.json gives {some(other)} a rank other than r = {rank}",
            "SGLang fails at the first request: its buffers have one rank for all modules",
            files.merge(),
        )


def _names(files: AdapterFiles) -> Iterator[Finding]:
    stray = files.named("bias", "bias of B", *(() if files.config.get("use_dora") else ("magnitude",)))
    yield from error_about(
        stray,
        "",
        "SGLang treats every tensor that is not lora_A as lora_B, and fails on the shape or computes wrong results",
        files.merge(),
    )
    whole = files.named("weight", "token rows")
    yield from error_about(
        whole,
        "",
        "SGLang does not support tensors that replace the base's: it silently drops those of embeddings and heads, "
        "and fails on others",
        files.merge(),
    )
    pairs = [half.name for pair in files.pairs for half in (pair.a, pair.b) if half]
    lost = [name for name in pairs if not _LAYER.search(name) and not any(table in name for table in _TABLES)]
    lost += _unnamed_tables(files)
    yield from error_about(
        lost,
        "",
        "SGLang silently drops it: it looks for layers.N. in names, and for embed_tokens and lm_head if "
        "target_modules has them",
        files.merge(),
    )
    other = files.named("other")
    yield from error_about(
        other, "", "SGLang sorts tensors by parts of their names, and cannot place this one", files.merge()
    )


def _unnamed_tables(files: AdapterFiles) -> list[str]:
    targets = files.config.get("target_modules")
    if not isinstance(targets, list):
        return []
    last = {str(name).rpartition(".")[2] for name in targets}
    return [
        half.name
        for pair in files.pairs
        for half in (pair.a, pair.b)
        if half and any(table in pair.module and table not in last for table in _TABLES)
    ]


def _fused(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find projections that SGLang fuses into one matrix, adapted without the others that it then requires."""
    blocks: dict[str, set[str]] = defaultdict(set)
    for pair in files.pairs:
        block, _, leaf = pair.module.rpartition(".")
        if _LAYER.search(f"{pair.module}."):  # single experts too: SGLang renames their w1 and w3
            blocks[block].add("gate_proj" if leaf in GATES else "up_proj" if leaf in UPS else leaf)
    for needed, has in (("v_proj", {"q_proj"}), ("q_proj", {"k_proj", "v_proj"}), ("gate_proj", {"up_proj"})):
        alone = [block for block, leaves in blocks.items() if leaves & has and needed not in leaves]
        if base is not None:
            names = GATES if needed == "gate_proj" else {needed}
            alone = [block for block in alone if any(base.shape(f"{block}.{name}") for name in names)]
        if alone:
            sure = needed != "gate_proj" or base is not None  # layers without a gate need only up_proj
            yield Finding(
                "error" if sure else "warning",
                f"{some(alone)}: {' or '.join(sorted(has))} without {needed}",
                "SGLang stores them in one matrix, and fails when it joins them"
                + ("" if sure else " if the model has one"),
                files.merge(),
            )


def _experts(files: AdapterFiles) -> Iterator[Finding]:
    stacked = _rules.experts(files)
    yield from error_about(
        stacked,
        "stack of experts (target_parameters)",
        "SGLang does not support such names: it needs one pair of matrices per expert, or three-dimensional tensors",
        files.merge(),
    )
    single = _rules.single_experts(files)
    if single:
        yield Finding(
            "warning",
            f"{some(single)}: one pair of matrices per expert",
            "SGLang adapts experts only if both gate_up_proj and down_proj are among its target modules",
            "serve it with --lora-target-modules all",
        )


def _beside(files: AdapterFiles) -> Iterator[Finding]:
    if files.beside and files.keys:
        yield Finding(
            "error",
            f"{some(files.beside)} beside adapter_model.safetensors",
            "SGLang loads every *.safetensors file in the folder as part of the adapter",
            f"load a copy of the folder without {some(files.beside)}",
        )


def _added_tokens(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    tokens = _read_added(files.root / _ADDED)
    size = base.vocabulary if base else None
    added = [token for token, number in tokens.items() if size is None or number >= size]
    if added:
        yield Finding(
            "warning" if size is None else "error",
            f"{_ADDED}: {some(added)}",
            "SGLang rejects adapters that add tokens to the vocabulary"
            + ("" if size else "; tokens that the base already has are fine (give --base to find out)"),
            files.merge() if size else f"remove {_ADDED} if the base has these tokens; otherwise {files.merge()}",
        )


def _read_added(path: Path) -> dict[str, int]:
    """Map added tokens to their indices; empty if there is no such file, or if SGLang ignores it too."""
    try:
        found = json.loads(read_small(path))
    except (CheckpointError, OSError, ValueError, RecursionError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {token: number for token, number in pairs if isinstance(number, int)}


def _checkpoint(files: CheckpointFiles) -> Iterator[Finding]:
    yield from _checkpoint_rules.quantization(files, "SGLang")
    if files.quantization == "bitsandbytes":
        yield Finding(
            "warning",
            "quant_method is bitsandbytes in config.json",
            "SGLang loads it with its bitsandbytes loader, on one GPU only: it rejects tensor parallelism",
            "serve it with --load-format bitsandbytes",
        )
        yield from _checkpoint_rules.storage(files, "SGLang")
    yield from _checkpoint_rules.stacks(files, "SGLang does not support such stacks")
    yield from _checkpoint_rules.beside(files, "SGLang")
    yield from _checkpoint_rules.model(
        files, "SGLang silently computes with uninitialized memory", "SGLang fails: the shapes differ"
    )
    yield from _checkpoint_rules.tokenizer(
        files, "SGLang can load one from another folder", "serve it with --tokenizer-path FOLDER"
    )


TARGET = Target("SGLang 0.5.23", _adapter, _checkpoint)
