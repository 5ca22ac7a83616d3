"""Modules that peft 0.21.2 mistakes for others when it loads an adapter.

It renames the tensors of adapters by transformers 5's rules for older checkpoints.
"""

from collections.abc import Iterable
from typing import Any

GATES, UPS, DOWNS = {"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}
"""Names of experts' matrices."""
_AS_MIXTRAL = {"minimax", "minimax_m2", "mixtral"}
_AS_QWEN2_MOE = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
    "sarvam_mla", "solar_open",
}  # fmt: skip
STACKED = _AS_MIXTRAL | _AS_QWEN2_MOE
"""Model types whose experts peft stacks, recognizing them by these names (qwen2_moe itself is not one)."""


def mistaken_for_experts(model_type: str, modules: Iterable[str]) -> list[str]:
    """Return the modules that are not experts but have the name of one: peft mistakes their targets for the stacks'.

    Args:
        model_type: ``model_type`` of the configuration.
        modules: dotted paths of modules that are not experts.
    """
    names = GATES | UPS | DOWNS if model_type in STACKED else set()
    return [module for module in modules if module.rpartition(".")[2] in names]


def renamed_in_peft(network: Any, modules: Iterable[str]) -> dict[str, str]:
    """Map the modules of an adapter that peft renames to the names that it gives them.

    It applies transformers' rules for names of older checkpoints to an adapter's file, and some rules match current
    names, too: Laguna's ``mlp.shared_expert.``, a regular expression, matches ``mlp.shared_experts``.

    Args:
        network: transformers' model.
        modules: dotted paths in it.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if get_checkpoint_conversion_mapping(network.config.model_type) is None:
        return {}
    renamings = [entry for entry in get_model_conversion_mapping(network) if isinstance(entry, WeightRenaming)]
    half = ".lora_A.default.weight"
    found = {name: rename_source_key(f"{name}{half}", renamings, [])[0].removesuffix(half) for name in modules}
    return {name: other for name, other in found.items() if not name.endswith(other)}  # peft restores a lost prefix
