"""Write an adapter folder as PEFT and vLLM read it; see ``_adapter_parts`` for the tensors' names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptkit.checkpoint._adapter_parts import TokenRows
from adaptkit.checkpoint.adapter_config import PREFIX, stack_order
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME as CONFIG_NAME
from adaptkit.checkpoint.layout import ADAPTER_WEIGHTS_NAME as WEIGHTS_NAME
from adaptkit.errors import NonFiniteError
from adaptkit.numerics.dtypes import Array, cast
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank, transposed
from adaptkit.numerics.scaling import scaling


def write_adapter(
    output: Output,
    modules: Mapping[str, LowRank],
    base_name: str,
    embeddings: frozenset[str] = frozenset(),
    saved: Mapping[str, Array] | None = None,
    *,
    magnitudes: Mapping[str, Array] | None = None,
    lora_biases: Mapping[str, Array] | None = None,
    tokens: Mapping[str, TokenRows] | None = None,
    experts: Mapping[str, tuple[LowRank, ...]] | None = None,
    copies: Mapping[str, Array] | None = None,
    **config: Any,
) -> None:
    """Write configuration and weights of a LoRA adapter, as PEFT and vLLM read them.

    Args:
        output: the folder being written; file and tensor records are added to it.
        modules: maps a module's dotted path to its change; stored in float32.
        base_name: value of ``base_model_name_or_path``.
        embeddings: which of the modules are embeddings, whose changes are (entries, dim).
        saved: maps a base tensor's name to its replacement, which is stored unchanged. The bias of a module in
            ``modules`` becomes peft's ``base_layer.bias``; pass ``bias="all"`` if there are biases.
        magnitudes: maps every module, or none, to DoRA's row norms.
        lora_biases: maps every module, or none, to the unscaled bias of B.
        tokens: maps a module to the replaced rows of its weight.
        experts: maps a stacked parameter's path to the change of each expert's matrix.
        copies: maps names to the base tensors that changes are added to; peft uses them instead of the base's.
        config: keys of ``adapter_config.json`` to add or override; ``target_modules`` defaults to the full paths of
            all modules.

    Raises:
        NonFiniteError: a value is NaN or too large for float32; names the tensor.
    """
    experts, tokens = experts or {}, tokens or {}
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        **_ranks({**modules, **{name: one[0] for name, one in experts.items()}}, config.get("use_rslora", False)),
        "target_modules": sorted(modules),
        "use_rslora": False,
        "use_dora": bool(magnitudes),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    } | config
    if lora_biases:
        document["lora_bias"] = True
    if experts:
        document["target_parameters"] = sorted(experts)
    if tokens:
        document["trainable_token_indices"] = {path: list(chosen.indices) for path, chosen in tokens.items()}
    output.write_json(CONFIG_NAME, document)
    tensors: dict[str, Array] = {}
    for module, term in modules.items():
        is_table = module in embeddings
        halves = transposed(term) if is_table else term
        names = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        for name, half in zip(names, (halves.a, halves.b), strict=True):
            tensors[f"{module}.{name}"] = _float32(half)
    for name, array in (saved or {}).items():
        module, _, kind = name.rpartition(".")
        wrapped = kind == "bias" and module in modules
        tensors[f"{module}.base_layer.bias" if wrapped else name] = array
    for name, array in (copies or {}).items():
        module, _, kind = name.rpartition(".")
        tensors[f"{module}.base_layer.{kind}"] = array
    for module, magnitude in (magnitudes or {}).items():
        tensors[f"{module}.lora_magnitude_vector"] = _float32(magnitude)
    for module, bias in (lora_biases or {}).items():
        tensors[f"{module}.lora_B.bias"] = _float32(bias)
    for module, chosen in tokens.items():
        tensors[f"{module}.token_adapter.trainable_tokens_delta"] = _float32(chosen.rows)
    tensors |= _stacked(experts)
    for name, array in tensors.items():
        if not all_finite(array):
            raise NonFiniteError(
                f"{PREFIX}{name}: holds NaN, or numbers too large for float32",
                hint="if you gave the adapters weights, use smaller ones",
            )
    output.write_tensors(WEIGHTS_NAME, {f"{PREFIX}{name}": array for name, array in tensors.items()})


def _float32(array: Array) -> Array:
    return cast(array, np.float32)


def _ranks(terms: Mapping[str, LowRank], rslora: bool) -> dict[str, Any]:
    """Return the rank and alpha keys: the most common values as defaults, patterns for modules that differ."""
    ranks = {name: term.rank for name, term in terms.items()}
    alphas = {name: _alpha(term, rslora) for name, term in terms.items()}
    rank, alpha = (_most_common(ranks), _most_common(alphas)) if terms else (8, 8)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}$": other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {f"^{re.escape(name)}$": other for name, other in alphas.items() if other != alpha},
    }


def _alpha(term: LowRank, rslora: bool) -> float:
    """Return the alpha that yields a change's scaling: rounded to 6 decimals if the scaling is then bit-identical."""
    exact = term.scaling * (math.sqrt(term.rank) if rslora else term.rank)
    short = round(exact, 6)
    return short if scaling(short, term.rank, rslora) == term.scaling else exact


def _stacked(experts: Mapping[str, tuple[LowRank, ...]]) -> dict[str, Array]:
    """Return the tensors of stacked parameters: A's rows are (expert, rank), B's columns (rank, expert).

    The wrapper of a module's last parameter is the outermost one and has the module's own name.
    """
    tensors = {}
    modules: dict[str, list[str]] = {}
    for name in experts:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    for module, leaves in modules.items():
        for depth, leaf in enumerate(reversed(stack_order(leaves))):
            changes = experts[f"{module}.{leaf}"]
            wrapper = f"{module}{'.base_layer' * depth}"
            tensors[f"{wrapper}.lora_A.weight"] = np.concatenate([_float32(change.a) for change in changes])
            lora_b = np.stack([_float32(change.b) for change in changes], axis=2)
            tensors[f"{wrapper}.lora_B.weight"] = lora_b.reshape(len(lora_b), -1)
    return tensors


def _most_common(values: Mapping[str, Any]) -> Any:
    counted = Counter(values.values())
    best = max(sorted(counted), key=counted.__getitem__)
    return int(best) if float(best).is_integer() else best
