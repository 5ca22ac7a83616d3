"""Validate ``adapter_config.json``, and look up its settings for a module."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.foreign import mlx_hint, weights_beside
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME, is_adapter
from adaptkit.checkpoint.patterns import FirstMatch, matches_whole
from adaptkit.errors import AdapterError
from adaptkit.numerics.scaling import scaling

PREFIX = "base_model.model."
"""What peft puts before the names of modules in ``adapter_model.safetensors``."""
ATTENTION = re.compile(r"(.+)\.base_layer\.out_proj")
"""The module of the second of two pairs that peft makes for one ``torch.nn.MultiheadAttention``."""
KOHYA = re.compile(r"\.lora_(?:down|up)\.weight$")
"""kohya's trainers name A and B like this; they store one scalar ``alpha`` per module beside them."""
_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config",
    "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_NEVER_MERGED = ("use_qalora", "alora_invocation_tokens", "arrow_config", "layer_replication")
"""Those that peft cannot merge either; with replicated layers one weight would be changed several times."""
_IGNORED_KEYS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Keys that do not affect the changes, or only repeat what the tensors show."""
_USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
_INIT_KEYS = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
"""Settings for the initialization of A and B; ``init_lora_weights`` tells whether it changed the base."""
KNOWN_KEYS = {*_UNSUPPORTED, *_IGNORED_KEYS, *_USED, *_INIT_KEYS, "runtime_config"}
"""The keys of peft 0.21's LoraConfig."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations for which peft changes the base; a converted adapter has ``init_lora_weights: true`` instead."""
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations of peft 0.21 that leave the base unchanged."""
ONE_SAVE = "check that adapter_config.json and adapter_model.safetensors are complete and were saved together"
RANK_ZERO = "make it again with a rank of at least 1 in every module (mergekit-extract-lora: without --sv-epsilon)"
"""The hint for A and B without rows and columns, which peft rejects, too."""
AS_MEANT = "merge it with the peft release that wrote it; or, if they mean the same today, set peft_version to 0.15.0"
"""The hint for patterns that older releases matched differently."""
_CONVERTED = "pissa_converted"
"""Subfolder in which LLaMA-Factory saves a PiSSA adapter once more, converted."""
_SAVED = "modules_to_save"
_HEADS_OF_CLASSIFIERS = {"classifier", "score", "qa_outputs"}
_TIED_BY_PEFT = ("embed_tokens", "lm_head")
_BIASES = ("none", "all", "lora_only")
_EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""The order in which experts modules define their parameters, which is the order in which peft wraps them."""


def check_config(root: Path, config: Mapping[str, Any]) -> None:
    """Reject an adapter whose configuration contains anything that this package does not support."""
    kind, way = config.get("peft_type"), mlx_hint(root, config)
    if kind is None:
        what = "an MLX adapter" if way else "not a peft adapter"
        raise AdapterError(
            f"{root}: {what}: {ADAPTER_CONFIG_NAME} has no peft_type",
            hint=way or "merge it with the tool that wrote it, or convert it to peft's format first",
        )
    if kind != "LORA":
        raise AdapterError(f"{root}: unsupported kind of adapter: {kind}", hint="use an adapter of peft_type LORA")
    if beside := weights_beside(root):
        raise AdapterError(
            f"{root}: {beside} contains further trained weights, which adaptkit does not read",
            hint="merge it with the tool that wrote it; or, for the adapter alone, copy the folder without that file",
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            way = "run or merge it with peft"
            if key in _NEVER_MERGED:
                way = "run it with peft, which cannot merge it either"
            if key == "use_qalora":
                way = f"set it to false if the base was not quantized with GPTQ, since peft then ignores it; or {way}"
            raise AdapterError(f"{root}: uses {key}, which is not supported", hint=way)
    unknown = {key for key, value in config.items() if value} - _IGNORED_KEYS - _USED - _INIT_KEYS
    if unknown:
        raise AdapterError(
            f"{root}: adapter_config.json has the unknown key {min(unknown)!r}",
            hint="remove the key if it changes nothing, or merge the adapter with the tool that wrote it",
        )
    begun: Any = config.get("init_lora_weights")
    if changes_base(begun):
        raise AdapterError(
            f"{root}: initialized with {begun}, which changes the base's weights: it does not fit the original base",
            hint=without_changed_base(root, begun),
        )
    if changes_base(begun) is None:
        raise AdapterError(
            f"{root}: unknown init_lora_weights {begun!r}, which may have changed the base's weights",
            hint="set it to true if it did not, or merge the adapter with the tool that wrote it",
        )
    if has_older_patterns(config):
        raise AdapterError(
            f"{root}: peft up to 0.14 matched its rank_pattern and alpha_pattern in another way than peft does today",
            hint=AS_MEANT,
        )
    if config.get("bias", "none") not in _BIASES:
        raise AdapterError(f"{root}: bias is {config['bias']!r}; expected one of {', '.join(_BIASES)}", hint=ONE_SAVE)
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError(
            f"{root}: use_dora and lora_bias are both set, which is not defined", hint="train it with one of them"
        )
    for key in (_SAVED, "target_parameters"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise AdapterError(f"{root}: {key} is {value!r}; expected a list of names", hint=ONE_SAVE)


def changes_base(begun: Any) -> bool | None:
    """Return whether peft changed the base, given the value of ``init_lora_weights``; None if that is not known."""
    if not isinstance(begun, str) or not begun or begun.lower() in _LEAVES_BASE:
        return False
    return True if begun.lower().startswith(_CHANGES_BASE) else None


def without_changed_base(root: Path, begun: str) -> str:
    """Return the hint for an adapter for which peft changed the base; peft can convert all of these but LoftQ's."""
    if is_adapter(root / _CONVERTED):
        return f"use {root / _CONVERTED}, which was converted to the original base"
    if begun.lower().startswith("loftq"):
        return "merge it with peft, which changes the base in the same way again"
    return "save it again with peft's path_initial_model_for_weight_conversion, which converts it to the original base"


class Scalings:
    """Looks up the rank and scaling of modules."""

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        self._root, self._config = root, config
        self._ranks = FirstMatch(config.get("rank_pattern") or {})
        self._alphas = FirstMatch(config.get("alpha_pattern") or {})

    def of(self, module: str) -> tuple[int, float]:
        """Return the rank of a module (or parameter) and the scaling of its B A; (0, 0.0) if the rank is invalid."""
        try:
            rank = self._ranks.value(module, self._config.get("r"))
            alpha = self._alphas.value(module, self._config.get("lora_alpha"))
        except (re.error, AttributeError, TypeError) as error:
            detail = error if isinstance(error, re.error) else "expected patterns, each with a number"
            raise AdapterError(
                f"{self._root}: rank_pattern or alpha_pattern is malformed ({detail})", hint=ONE_SAVE
            ) from error
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
            raise AdapterError(
                f"{self._root}: {module}: lora_alpha is {repr(alpha)[:40]}; expected a positive number", hint=ONE_SAVE
            )
        usable = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= sys.maxsize
        return (rank, scaling(float(alpha), rank, bool(self._config.get("use_rslora")))) if usable else (0, 0.0)


def release(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the peft release that wrote a configuration, (19, 1) for 0.19.1; (sys.maxsize, 0) if unknown.

    Releases up to 0.17 do not record their version, but every release writes all keys that it knows, so new keys date
    it. Among releases that write the same keys or behave the same, this returns the last.
    """
    version = re.match(r"0\.(\d+)\.(\d+)", str(config.get("peft_version")))
    if version:
        return int(version[1]), int(version[2])
    if config.get("peft_version") or "layers_pattern" not in config or "ensure_weight_tying" in config:
        return sys.maxsize, 0
    return (17, 0) if "trainable_token_indices" in config else (14, 0)


def has_older_patterns(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter has patterns, and is of a peft release that matched them differently from today's."""
    return release(config) < (15, 0) and bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def writes_transposed_experts(config: Mapping[str, Any], is_transposed: bool) -> bool:
    """Return whether peft wrote the changes of stacked experts transposed: A (r, out) and B (in, r).

    peft up to 0.18 did so unless the running model's experts module says ``is_transposed``; 0.19.0 always did. Needed
    for square matrices, where the shapes do not tell.
    """
    return release(config) == (19, 0) or (release(config) < (19, 0) and not is_transposed)


def expert_parameters(root: Path, config: Mapping[str, Any], module: str, is_stack: bool) -> list[str]:
    """Return the stacked parameters of a module that ``target_parameters`` names, innermost wrapper first.

    ``is_stack``: whether a parameter named ``weight`` is a stack of experts (as in JetMoE), not a linear layer's.
    """
    leaves = set()
    for target in config.get("target_parameters") or []:
        owner, _, leaf = target.rpartition(".")
        is_meant = f".{module}".endswith(f".{owner}") if owner else module.endswith("experts")
        if (is_stack or leaf != "weight") and is_meant:
            leaves.add(leaf)
    if len(leaves) > 1 and not leaves <= set(_EXPERT_ORDER):
        raise AdapterError(
            f"{root}: {module}: cannot tell which tensors belong to which of {', '.join(sorted(leaves))}",
            hint="merge the adapter with peft",
        )
    return stack_order(leaves)


def stack_order(leaves: Iterable[str]) -> list[str]:
    """Return a module's stacked parameters in the order in which peft wraps them, innermost first."""
    return sorted(leaves, key=lambda leaf: _EXPERT_ORDER.index(leaf) if leaf in _EXPERT_ORDER else 0)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Return whether ``modules_to_save`` matches the end of a module's path or of an enclosing module's, as in peft."""
    parts, ends = module.split("."), tuple(_saved(config))
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return bool(ends) and any(path.endswith(ends) for path in around)


def unused_saved(config: Mapping[str, Any], modules: Sequence[str]) -> str:
    """Return a name in ``modules_to_save`` that matches none of the modules; empty if all match.

    Classifier heads are ignored, since peft lists every name that one might have.
    """
    for name in _saved(config):
        if name not in _HEADS_OF_CLASSIFIERS and not any(is_saved({_SAVED: [name]}, module) for module in modules):
            return name
    return ""


def names_tied(root: Path, config: Mapping[str, Any]) -> bool:
    """Return whether ``modules_to_save`` or, for peft from 0.19, ``target_modules`` names what peft ties."""
    targets = (config.get("target_modules") if release(config) >= (19, 0) else None) or []
    names = [*_saved(config), *(targets if isinstance(targets, list) else [])]
    if any(name.rpartition(".")[2] in _TIED_BY_PEFT for name in names if isinstance(name, str)):
        return True
    try:
        return isinstance(targets, str) and any(matches_whole(targets, name) for name in _TIED_BY_PEFT)
    except re.error as error:
        raise AdapterError(f"{root}: target_modules is malformed ({error})", hint=ONE_SAVE) from error


def is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Return whether ``target_parameters`` names the weight of a module.

    peft then matches rank and alpha patterns with ``<module>.weight``, and BA has the orientation of the stored weight.
    """
    return any(f".{module}.weight".endswith(f".{name}") for name in config.get("target_parameters") or ())


def token_indices(config: Mapping[str, Any], module: str) -> Any:
    """Return what ``trainable_token_indices`` gives for a module, valid or not; None if it gives nothing."""
    given = config.get("trainable_token_indices")
    if not isinstance(given, dict):
        return given
    names = [name for name in given if f".{module}".endswith(f".{name}")]
    return given[max(names, key=len)] if names else None


def _saved(config: Mapping[str, Any]) -> list[str]:
    return config.get(_SAVED) or []
