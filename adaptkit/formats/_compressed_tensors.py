"""The ``quantization_config`` of compressed-tensors, which servers read; its files know no keys but these.

    {"quant_method": "compressed-tensors", "format": F, "quantization_status": "compressed", "kv_cache_scheme": null,
     "ignore": ["lm_head", "re:..."], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...},
                                                                    "input_activations": {...} or null}}}

Source: ``QuantizationConfig`` of compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

METHOD = "compressed-tensors"
_EXPERTS = ".experts"


def config_block(
    form: str, weights: dict[str, Any], kept: list[str], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the ``quantization_config``.

    Args:
        form: compressed-tensors' name of the layout.
        weights: what it says of weights.
        kept: paths of the modules that stay in 16 bits; one of a layer's experts stands for all of these.
        inputs: what it says of inputs; None if products have 16 bits.
    """
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    experts = [rf"re:{re.escape(path)}\..*" for path in kept if path.endswith(_EXPERTS)]
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": [*kept, *experts],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def stated_weights(block: Mapping[str, Any], form: str) -> tuple[dict[str, Any], list[str]] | None:
    """Return what a ``quantization_config`` says of weights, and the paths that it ignores.

    None if it is another method's, of another layout, or has more than one group.
    """
    groups = block.get("config_groups")
    if block.get("quant_method") != METHOD or not isinstance(groups, dict) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights, ignored = group.get("weights") if isinstance(group, dict) else None, block.get("ignore")
    if not isinstance(weights, dict) or form not in (block.get("format"), group.get("format")):
        return None
    paths = [path for path in ignored if isinstance(path, str)] if isinstance(ignored, list) else []
    return weights, [path for path in paths if not path.startswith("re:")]


def inputs_of(kind: str, strategy: str = "token", group: int | None = None) -> dict[str, Any]:
    """Return what a ``quantization_config`` says of inputs that are rounded to 8 bits while the model runs."""
    found = {"dynamic": True, "num_bits": 8, "strategy": strategy, "symmetric": True, "type": kind}
    return found if group is None else found | {"group_size": group}
