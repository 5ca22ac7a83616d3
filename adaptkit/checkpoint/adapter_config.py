"""What ``adapter_config.json`` may say, and what it says of one module."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME
from adaptkit.checkpoint.mlx import way_from_mlx
from adaptkit.checkpoint.patterns import FirstMatch, matches_behind_dot, matches_whole
from adaptkit.errors import AdapterError
from adaptkit.numerics.scaling import scaling

_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config",
    "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_NEVER_MERGED = ("use_qalora", "alora_invocation_tokens", "arrow_config", "layer_replication")
"""Of these, what peft has no merged weights of; in replicated layers one weight would be changed several times."""
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Keys that say nothing about the change, or only what the tensors show anyway."""
_USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
_FINISHED = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
"""How A and B began; ``init_lora_weights`` says whether that matters."""
KNOWN_KEYS = {*_UNSUPPORTED, *_HARMLESS, *_USED, *_FINISHED, "runtime_config"}
"""The keys of peft 0.21's LoraConfig."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initial adapters that peft balances by changing the base; a converted one says ``init_lora_weights: true``."""
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Those of peft 0.21 that do not."""
WEIGHTS_BESIDE = ("non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin", "vit.safetensors")
"""Where trainers put what they trained besides an adapter: LLaVA's and those after it, LongLoRA, ms-swift."""
_ONE_SAVE = "check that adapter_config.json and adapter_model.safetensors are complete and were saved together"
_SAVED = "modules_to_save"
_HEADS_OF_CLASSIFIERS = {"classifier", "score", "qa_outputs"}
_TIED_BY_PEFT = ("embed_tokens", "lm_head")
_BIASES = ("none", "all", "lora_only")
_EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""The order in which modules of experts define their parameters, and so in which peft wraps them."""


def is_adapter(root: Path) -> bool:
    """Whether a folder looks like an adapter."""
    return (root / ADAPTER_CONFIG_NAME).is_file()


def weights_beside(root: Path) -> str:
    """The name of a file beside an adapter that holds the rest of what was trained; empty if there is none."""
    return next((name for name in WEIGHTS_BESIDE if (root / name).exists()), "")


def check_config(root: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose configuration says anything that this package does not understand.

    Raises:
        AdapterError: names the key.
    """
    kind, way = config.get("peft_type"), way_from_mlx(root, config)
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
            way = (
                "run it with peft, which cannot merge it either"
                if key in _NEVER_MERGED
                else "run or merge it with peft"
            )
            raise AdapterError(f"{root}: uses {key}, which is not supported", hint=way)
    unknown = {key for key, value in config.items() if value} - _HARMLESS - _USED - _FINISHED
    if unknown:
        raise AdapterError(
            f"{root}: adapter_config.json has the unknown key {min(unknown)!r}",
            hint="remove the key if it changes nothing, or merge the adapter with the tool that wrote it",
        )
    begun: Any = config.get("init_lora_weights")
    if changes_base(begun):
        raise AdapterError(
            f"{root}: initialized with {begun}, which changes the base's weights: it does not fit the original base",
            hint=without_changed_base(begun),
        )
    if changes_base(begun) is None:
        raise AdapterError(
            f"{root}: unknown init_lora_weights {begun!r}, which may have changed the base's weights",
            hint="set it to true if it did not, or merge the adapter with the tool that wrote it",
        )
    if config.get("bias", "none") not in _BIASES:
        raise AdapterError(f"{root}: bias is {config['bias']!r}; expected one of {', '.join(_BIASES)}", hint=_ONE_SAVE)
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError(
            f"{root}: use_dora and lora_bias are both set, which is not defined", hint="train it with one of them"
        )
    for key in (_SAVED, "target_parameters"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise AdapterError(f"{root}: {key} is {value!r}; expected a list of names", hint=_ONE_SAVE)


def changes_base(begun: Any) -> bool | None:
    """Whether peft changed the base where ``init_lora_weights`` says this; None if it is not known."""
    if not isinstance(begun, str) or not begun or begun.lower() in _LEAVES_BASE:
        return False
    return True if begun.lower().startswith(_CHANGES_BASE) else None


def without_changed_base(begun: str) -> str:
    """What to do with an adapter for which peft changed the base; it converts all but LoftQ's."""
    if begun.lower().startswith("loftq"):
        return "merge it with peft, which changes the base in the same way again"
    return "save it again with peft's path_initial_model_for_weight_conversion, which converts it to the original base"


class Scalings:
    """What a configuration says of rank and scaling, of one module after the other.

    Args:
        root: the adapter's folder, for messages.
        config: ``adapter_config.json``.
        age: the rule by which its patterns are taken, if not by that of the release that wrote them.
    """

    def __init__(self, root: Path, config: Mapping[str, Any], age: str | None = None) -> None:
        self._root, self._config = root, config
        self._ranks = FirstMatch(config.get("rank_pattern") or {})
        self._alphas = FirstMatch(config.get("alpha_pattern") or {})
        self._age = age_of_patterns(config) if age is None else age

    def of(self, module: str) -> tuple[int, float]:
        """The rank that the configuration gives a module (or parameter), and what its B A is multiplied by.

        Raises:
            AdapterError: either is no positive number, or a pattern is malformed.
        """
        try:
            rank, alpha = self._numbers(module)
        except (re.error, AttributeError, TypeError) as error:
            told = error if isinstance(error, re.error) else "expected patterns, each with a number"
            raise AdapterError(
                f"{self._root}: rank_pattern or alpha_pattern is malformed ({told})", hint=_ONE_SAVE
            ) from error
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
            raise AdapterError(
                f"{self._root}: {module}: lora_alpha is {repr(alpha)[:40]}; expected a positive number", hint=_ONE_SAVE
            )
        usable = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= sys.maxsize
        return (rank, scaling(float(alpha), rank, bool(self._config.get("use_rslora")))) if usable else (0, 0.0)

    def _numbers(self, module: str) -> tuple[Any, Any]:
        """Rank and alpha by the rule of the release of peft that wrote the patterns."""
        rank, alpha = self._config.get("r"), self._config.get("lora_alpha")
        if not self._age:
            return self._ranks.value(module, rank), self._alphas.value(module, alpha)
        ranks, alphas = (self._config.get(f"{key}_pattern") or {} for key in ("rank", "alpha"))
        both = [*ranks, *alphas] if self._age == "joint" else None
        of_rank, of_alpha = (
            next((pattern for pattern in both or patterns if matches_behind_dot(pattern, module)), module)
            for patterns in (ranks, alphas)
        )
        return ranks.get(of_rank, rank), alphas.get(of_alpha, alpha)


def release(config: Mapping[str, Any]) -> tuple[int, int]:
    """The release of peft that wrote a configuration: of 0.19.1, (19, 1). What no peft wrote means what today's does.

    Up to 0.17 it is not named, but every release writes all the keys that it knows, and some brought new ones. Of those
    that wrote the same keys, or mean the same, this is the last.
    """
    version = re.match(r"0\.(\d+)\.(\d+)", str(config.get("peft_version")))
    if version:
        return int(version[1]), int(version[2])
    if config.get("peft_version") or "layers_pattern" not in config or "ensure_weight_tying" in config:
        return sys.maxsize, 0
    return (17, 0) if "trainable_token_indices" in config else (14, 0) if "lora_bias" in config else (13, 0)


def age_of_patterns(config: Mapping[str, Any]) -> str:
    r"""The rule by which a configuration's patterns for rank and alpha are meant; empty for today's, and without any.

    Up to 0.14 peft matched ``.*\.{pattern}$``, which is not ``(.*\.)?({pattern})$``, and looked up a module that no
    pattern matched among them by its name (``behind dots``). Up to 0.13 one pattern was taken for both, the first of
    those for ranks, then of those for alphas; what had no such pattern was the default (``joint``).
    """
    if not (config.get("rank_pattern") or config.get("alpha_pattern")) or release(config) >= (15, 0):
        return ""
    return "behind dots" if release(config) >= (14, 0) else "joint"


def turns_stacks(config: Mapping[str, Any], is_transposed: bool) -> bool:
    """Whether A of a stack of experts is as wide as their matrices (out, in) are high, and B as high as they are wide.

    So peft wrote them up to 0.18 where the model's code does not say that its stacks are transposed, and 0.19.0 in any
    case; where matrices are square, shapes do not tell.

    Args:
        config: ``adapter_config.json``.
        is_transposed: what the running model's module of experts says of itself.
    """
    return release(config) == (19, 0) or (release(config) < (19, 0) and not is_transposed)


def expert_parameters(root: Path, config: Mapping[str, Any], module: str, is_stack: bool) -> list[str]:
    """The stacked parameters of a module that ``target_parameters`` names, innermost wrapper first.

    Args:
        root: the adapter's folder, for messages.
        config: ``adapter_config.json``.
        module: dotted path.
        is_stack: whether a parameter ``weight`` is one, as JetMoE's experts are, and not a linear layer's.

    Raises:
        AdapterError: their order cannot be known.
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
    """The stacked parameters of a module in the order in which peft wraps them, innermost first."""
    return sorted(leaves, key=lambda leaf: _EXPERT_ORDER.index(leaf) if leaf in _EXPERT_ORDER else 0)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``modules_to_save`` names a module or one around it, by the end of its path as peft does."""
    parts, ends = module.split("."), tuple(_saved(config))
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return bool(ends) and any(path.endswith(ends) for path in around)


def unused_saved(config: Mapping[str, Any], modules: Sequence[str]) -> str:
    """A name in ``modules_to_save`` of which nothing is there; empty if there is none.

    Heads of classifiers do not count: peft lists every name that one could have.
    """
    for name in _saved(config):
        if name not in _HEADS_OF_CLASSIFIERS and not any(is_saved({_SAVED: [name]}, module) for module in modules):
            return name
    return ""


def names_tied(root: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``modules_to_save`` or ``target_modules`` names an embedding or head as peft ties it.

    Up to 0.18 it tied what is saved whole, and nothing else.

    Raises:
        AdapterError: ``target_modules`` is a pattern that cannot be matched.
    """
    targets = (config.get("target_modules") if release(config) >= (19, 0) else None) or []
    names = [*_saved(config), *(targets if isinstance(targets, list) else [])]
    if any(name.rpartition(".")[2] in _TIED_BY_PEFT for name in names if isinstance(name, str)):
        return True
    try:
        return isinstance(targets, str) and any(matches_whole(targets, name) for name in _TIED_BY_PEFT)
    except re.error as error:
        raise AdapterError(f"{root}: target_modules is malformed ({error})", hint=_ONE_SAVE) from error


def untrained_tokens(config: Mapping[str, Any], modules: Sequence[str]) -> str:
    """A name in ``trainable_token_indices`` of which nothing is there; empty if there is none.

    One with the same list as another may be missing: the two are tied.
    """
    given = config.get("trainable_token_indices")
    if not given:
        return ""
    if not isinstance(given, dict):
        return "" if modules else "an embedding"
    there = {name for name in given if any(f".{module}".endswith(f".{name}") for module in modules)}
    return next((n for n, rows in given.items() if n not in there and rows not in [given[t] for t in there]), "")


def token_indices(root: Path, config: Mapping[str, Any], module: str, key: str) -> tuple[int, ...]:
    """Which rows of a module's weight ``trainable_token_indices`` names.

    Raises:
        AdapterError: none, or something that is no list of different positive numbers.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        names = [name for name in given if f".{module}".endswith(f".{name}")]
        given = given[max(names, key=len)] if names else None
    fits = isinstance(given, list) and all(type(index) is int and index >= 0 for index in given)
    if not fits or not given or len(set(given)) != len(given):
        raise AdapterError(f"{root}: trainable_token_indices does not say which rows {key!r} replaces", hint=_ONE_SAVE)
    return tuple(given)


def _saved(config: Mapping[str, Any]) -> list[str]:
    return config.get(_SAVED) or []
