"""Modules that peft 0.21.2 takes for others while it loads an adapter.

It changes the names in the adapter's files as transformers 5 changes those of older checkpoints.
"""

from collections.abc import Iterable
from typing import Any

GATES, UPS, DOWNS = {"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}
"""What experts call their matrices."""
_AS_MIXTRAL = {"minimax", "minimax_m2", "mixtral"}
_AS_QWEN2_MOE = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
    "sarvam_mla", "solar_open",
}  # fmt: skip
STACKED = _AS_MIXTRAL | _AS_QWEN2_MOE
"""Model types whose experts peft makes stacks of, by the names of their matrices (qwen2_moe itself is not one)."""


def taken_for_experts(model_type: str, modules: Iterable[str]) -> list[str]:
    """The modules that are no experts and are called as these are: peft takes their targets for the stacks'.

    Args:
        model_type: of the configuration.
        modules: dotted paths, of none that is one of several experts.
    """
    names = GATES | UPS | DOWNS if model_type in STACKED else set()
    return [module for module in modules if module.rpartition(".")[2] in names]


def renamed_in_peft(network: Any, modules: Iterable[str]) -> dict[str, str]:
    """The modules of an adapter that peft takes for others, and what it calls them.

    It gives the names in an adapter's file to transformers' rules for names of older checkpoints, of which some match
    the model's own, too: Laguna's ``mlp.shared_expert.``, a regular expression, is in ``mlp.shared_experts.``

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
    return {name: other for name, other in found.items() if not name.endswith(other)}  # it takes back a lost prefix
