"""How peft 0.21.2 reads ``adapter_config.json``: values that it fails on, and which modules get a LoRA.

Sources: ``LoraConfig.__post_init__``, ``LoraLayer.update_layer`` and ``check_target_module_exists``.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adaptkit.checkpoint.patterns import matches_whole
from adaptkit.operations.targets import _rules
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair
from adaptkit.operations.targets._target import Finding, some

SHORTHAND = "all-linear"
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
_INITIAL = re.compile(r"eva|orthogonal|lora_ga|loftq|pissa|pissa_niter_\d+|(?i:gaussian|olora|mica)")
_BY_LIST = "list the modules in target_modules, or remove this key"
_TRUE = "set it to true, since loading replaces the initial weights"
_NAMES = "set it to a list of names"
_SHARE = "set it to a number from 0 to 1"


def values(files: AdapterFiles) -> Iterator[Finding]:
    """Find values that peft refuses regardless of the tensors."""
    get = files.config.get
    initial, saved, layers = get("init_lora_weights", True), get("modules_to_save"), get("layers_to_transform")
    task, is_pattern, has_bias = get("task_type"), isinstance(get("target_modules"), str), bool(get("lora_bias"))
    with_pattern = "ValueError if target_modules is a pattern"
    begun_with_bias = has_bias and not isinstance(initial, bool) and _is_initial(initial)
    refused = (
        (task is not None and task not in _TASKS, "task_type", "ValueError", f"set it to one of {', '.join(_TASKS)}"),
        (not _is_bias(get("bias", "none")), "bias", "NotImplementedError", "set it to none, all or lora_only"),
        (not _is_initial(initial), "init_lora_weights", "ValueError", _TRUE),
        (initial == "loftq" and not get("loftq_config"), "init_lora_weights", "ValueError without loftq_config", _TRUE),
        (not _is_dropout(get("lora_dropout", 0.0)), "lora_dropout", "ValueError or TypeError", _SHARE),
        (is_pattern and layers is not None, "layers_to_transform", with_pattern, _BY_LIST),
        (is_pattern and get("layers_pattern") is not None, "layers_pattern", with_pattern, _BY_LIST),
        (
            get("layers_pattern") and layers is None,
            "layers_pattern",
            "ValueError without layers_to_transform",
            "remove it",
        ),
        (not _are_patterns([get("exclude_modules")]), "exclude_modules", "re.error", "use a valid regular expression"),
        (not _are_patterns(saved), "modules_to_save", "re.error", "use module names"),
        (isinstance(layers, str), "layers_to_transform", "TypeError", "set it to a list of numbers"),
        (get("rank_pattern", {}) is None, "rank_pattern", "AttributeError", "set it to {}"),
        (get("alpha_pattern", {}) is None, "alpha_pattern", "AttributeError", "set it to {}"),
        (not _are_sortable(get("target_parameters")), "target_parameters", "TypeError", _NAMES),
        (isinstance(saved, str), "modules_to_save", "TypeError", _NAMES),
        (has_bias and get("use_dora"), "lora_bias", "ValueError together with use_dora", "remove one of the two"),
        (begun_with_bias, "init_lora_weights", "ValueError together with lora_bias", _TRUE),
    )
    for applies, key, failure, change in refused:
        if applies:
            found = f"{key} is {get(key)!r} in adapter_config.json"
            yield Finding("error", found, f"peft fails with {failure}", change)


def _is_bias(value: Any) -> bool:
    return isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))


def _is_initial(value: Any) -> bool:
    """Return whether peft accepts ``init_lora_weights``; CorDA fails, since it needs statistics that are not saved."""
    return value is True or not value or (isinstance(value, str) and _INITIAL.fullmatch(value) is not None)


def _are_patterns(names: Any) -> bool:
    """Return whether all strings in a list of patterns compile."""
    try:
        for name in names if isinstance(names, list) else ():
            re.compile(name if isinstance(name, str) else "")
    except re.error:
        return False
    return True


def _are_sortable(names: Any) -> bool:
    """Return whether peft can sort the distinct names in ``target_parameters``; it ignores an empty or false value."""
    if isinstance(names, str):
        return False
    try:
        sorted(set(names or ()))
    except TypeError:
        return False
    return True


def _is_dropout(value: Any) -> bool:
    """Return whether peft accepts a dropout; values up to 0 mean no dropout."""
    return isinstance(value, int | float) and not value > 1


def numbers(files: AdapterFiles) -> Iterator[Finding]:
    """Find unusable ranks and alphas, and alphas that are zero, negative or not finite."""
    rank, alpha = files.config.get("r"), files.config.get("lora_alpha")
    wrong = [pair for pair in files.pairs if not (_rules.is_rank(pair.asked) and _is_number(pair.alpha))]
    plain = _rules.is_rank(rank) and _is_number(alpha)
    if wrong or not plain:
        where = f" (for {some([pair.module for pair in wrong])})" if wrong and plain else ""
        yield Finding(
            "error",
            "adapter_config.json gives no rank or alpha that peft can use (r, lora_alpha, rank_pattern, alpha_pattern)"
            f"{where}: r is {rank!r}, lora_alpha {alpha!r}",
            "peft fails when it builds the modules",
            _rules.way_to_ranks(wrong),
        )
    taken = [pair for pair in files.pairs if _is_number(pair.alpha) and not pair.alpha > 0]
    yield from _unusual_alphas(
        [pair for pair in taken if pair.alpha == 0], "0", "peft loads it, but it changes nothing there"
    )
    below = [pair for pair in taken if pair.alpha < 0]
    yield from _unusual_alphas(below, "negative", "peft loads it, but subtracts what was learned there")
    endless = [pair.module for pair in files.pairs if _is_number(pair.alpha) and not math.isfinite(pair.alpha)]
    if endless:
        yield Finding("error", f"alpha of {some(endless)} is not finite", "peft then computes NaN", _rules.ONE_SAVE)


def _unusual_alphas(pairs: list[Pair], what: str, effect: str) -> Iterator[Finding]:
    if pairs:
        yield Finding(
            "warning",
            f"alpha of {some([pair.module for pair in pairs])} is {what}",
            effect,
            "unless this is intended, set lora_alpha or alpha_pattern to the value used in training",
        )


def _is_number(value: Any) -> bool:
    """Return whether peft can divide a value by a rank; an integer must fit a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Return whether peft creates a LoRA for a module, if the model has it."""
    saved = config.get("modules_to_save")
    around = saved if isinstance(saved, list) else []
    if any(_matches_path(rf"(.*\.)?{name}(\..*)?", module) for name in around):
        return False
    return is_parameter(config, module) or is_module(config, module)


def untargeted(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return the modules that peft creates no LoRA for.

    A module whose whole path is in ``target_modules`` is compared with that entry only, to avoid quadratic time.
    """
    targets = config.get("target_modules")
    whole = {name for name in targets if isinstance(name, str)} if isinstance(targets, list) else set()
    return [m for m in modules if not is_target({**config, "target_modules": [m]} if m in whole else config, m)]


def is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Return whether ``target_parameters`` selects the weight of a module."""
    return _matches(config.get("target_parameters"), f"{module}.weight")


def is_module(config: Mapping[str, Any], module: str) -> bool:
    """Return whether ``target_modules`` selects a module by name."""
    targets: Any = config.get("target_modules")
    if _matches(config.get("exclude_modules"), module) or not _matches(targets, module):
        return False
    return isinstance(targets, str) or module in targets or _is_in_layers(config, module)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Return whether a module is in ``layers_to_transform``; whole paths in ``target_modules`` skip this check."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    number = _layer(config.get("layers_pattern"), module.split("."))
    return number is not None and number in (layers if isinstance(layers, list) else [layers])


def _layer(patterns: Any, segments: list[str]) -> int | None:
    """Return the layer number in a path: the first number after one of the names in ``layers_pattern``.

    Without a pattern it is the first number after at least two other segments.
    """
    places = [place for place, segment in enumerate(segments[:-1]) if segment.isdecimal()]
    if not patterns:
        return next((int(segments[place]) for place in places if place >= 2), None)
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        for place in places:
            if _matches_path(rf"(.*\.)?{pattern}", ".".join(segments[:place])):
                return int(segments[place])
    return None


def _matches(names: Any, module: str) -> bool:
    """Return whether names select a module by peft's rule: a string is a regex for the path, a list has suffixes."""
    if isinstance(names, str):
        return _matches_path(names, module)
    return isinstance(names, list) and any(f".{module}".endswith(f".{name}") for name in names)


def _matches_path(pattern: str, path: str) -> bool:
    try:
        return matches_whole(pattern, path)
    except re.error:
        return False
