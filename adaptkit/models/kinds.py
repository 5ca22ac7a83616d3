"""The purpose of a module, by its dotted path and the model's architecture."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MOE = ("keep", "quantize")
"""What quantizing may do with experts."""

_FUSED = re.compile(r"(?<=\.)(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3|q_a_proj|kv_a_proj_with_mqa)$")
"""Of one parent: q, k and v; gate and up; the first products of latent attention."""
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
_INDEXER = re.compile(r"(^|\.)indexer\.")
_KERNEL_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_STEP_MODELS = {"falcon_mamba", "jamba", "mamba"}
_SHARED = {"zamba": ".shared_transf.", "zamba2": ".shared_transformer."}


def fused_name(path: str) -> str:
    """Return a name that a module shares with those that servers fuse into one, by its dotted path."""
    return _FUSED.sub("fused", path)


def is_router(path: str) -> bool:
    """Whether a module, by its dotted path, chooses among experts or weights their outputs."""
    return bool(_ROUTER.search(path))


def is_indexer(path: str) -> bool:
    """Whether a module, by its dotted path, selects what sparse attention reads; no gradient reaches it."""
    return bool(_INDEXER.search(path))


def is_expert(path: str, module: nn.Module) -> bool:
    """Whether a stack of matrices in a module is one of experts, by the module's dotted path and class name."""
    return "expert" in f"{path} {type(module).__name__}".lower()


def multiplies_groups(module: Any) -> bool:
    """Whether a module of stacked experts multiplies tokens, sorted by expert, with its stacks by ``grouped_mm``."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return hasattr(module, "is_transposed") and implementation == "grouped_mm"


def is_read_by_kernels(model_type: str, path: str) -> bool:
    """Whether kernels read a linear layer's weight without calling the layer, so that its adapter may be bypassed.

    That is Mamba's output projection; peft refuses an adapter there (``_check_lora_target_modules_mamba``).
    """
    return model_type in _KERNEL_MODELS and path.rpartition(".")[2] == "out_proj"


def is_never_called(model_type: str, path: str) -> bool:
    """Whether an architecture multiplies by a linear layer's weight itself, so that peft's adapter has no effect.

    That is the layer that computes Mamba's step sizes.
    """
    return model_type in _STEP_MODELS and path.rpartition(".")[2] == "dt_proj"


def is_shared_by_layers(model_type: Any, path: str) -> bool:
    """Whether several layers share one weight, while peft gives each of them its own adapter.

    That is Zamba's attention and the MLP after it.
    """
    return _SHARED.get(str(model_type), "\0") in path
