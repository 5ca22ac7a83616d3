"""Values in ``adapter_config.json`` that peft 0.21.2 fails on, in ``LoraConfig`` or when it builds the modules."""

import math
import re
from collections.abc import Iterator
from typing import Any

from adaptkit.operations.targets._adapter_features import way_to_ranks
from adaptkit.operations.targets._adapter_files import AdapterFiles, is_rank
from adaptkit.operations.targets._target import Sighting, seen, some

_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
_INITIAL = re.compile(r"eva|orthogonal|lora_ga|loftq|pissa|pissa_niter_\d+|(?i:gaussian|olora|mica)")


def of_values(files: AdapterFiles) -> Iterator[Sighting]:
    """Find values that ``LoraConfig`` or ``LoraLayer`` refuse regardless of the tensors."""
    get = files.config.get
    start, saved, layers = get("init_lora_weights", True), get("modules_to_save"), get("layers_to_transform")
    bias, dropout, has_bias = str(get("bias", "none")), get("lora_dropout", 0.0), bool(get("lora_bias"))
    is_pattern, layer_names = isinstance(get("target_modules"), str), get("layers_pattern")
    is_start = start is True or not start or (isinstance(start, str) and _INITIAL.fullmatch(start) is not None)
    is_dropout = isinstance(dropout, int | float) and not dropout > 1  # values up to 0 mean none
    begins_otherwise = is_start and isinstance(start, str) and bool(start)
    by_pattern, by_list = (
        "ValueError if target_modules is a pattern",
        "list the modules in target_modules, or remove it",
    )
    true, names = "set it to true, since loading replaces the initial weights", "set it to a list of names"
    refused = (
        ("task_type", get("task_type") not in (None, *_TASKS), "ValueError", f"set it to one of {', '.join(_TASKS)}"),
        ("bias", not re.fullmatch("none|all|.*_only", bias), "NotImplementedError", "set it to none, all or lora_only"),
        ("init_lora_weights", not is_start, "ValueError", true),
        ("init_lora_weights", start == "loftq" and not get("loftq_config"), "ValueError without loftq_config", true),
        ("init_lora_weights", has_bias and begins_otherwise, "ValueError together with lora_bias", true),
        ("lora_bias", has_bias and get("use_dora"), "ValueError together with use_dora", "remove one of the two"),
        ("lora_dropout", not is_dropout, "ValueError or TypeError", "set it to a number from 0 to 1"),
        ("layers_to_transform", is_pattern and layers is not None, by_pattern, by_list),
        ("layers_to_transform", isinstance(layers, str), "TypeError", "set it to a list of numbers"),
        ("layers_pattern", is_pattern and layer_names is not None, by_pattern, by_list),
        ("layers_pattern", layer_names and layers is None, "ValueError without layers_to_transform", "remove it"),
        ("exclude_modules", not _are_patterns([get("exclude_modules")]), "re.error", "use a valid regular expression"),
        ("modules_to_save", not _are_patterns(saved), "re.error", "use module names"),
        ("modules_to_save", isinstance(saved, str), "TypeError", names),
        ("rank_pattern", get("rank_pattern", {}) is None, "AttributeError", "set it to {}"),
        ("alpha_pattern", get("alpha_pattern", {}) is None, "AttributeError", "set it to {}"),
        ("target_parameters", not _are_sortable(get("target_parameters")), "TypeError", names),
    )
    for key, is_refused, failure, way in refused:
        if is_refused:
            found = f"{key} is {get(key)!r} in adapter_config.json"
            yield Sighting("refused value", found, {"failure": failure, "way": way})


def _are_patterns(names: Any) -> bool:
    """Return whether all strings in a list of patterns compile."""
    try:
        return all(re.compile(name) for name in names if isinstance(name, str)) if isinstance(names, list) else True
    except re.error:
        return False


def _are_sortable(names: Any) -> bool:
    """Return whether peft can sort the distinct names in ``target_parameters``; it ignores an empty or false value."""
    try:
        return not isinstance(names, str) and sorted(set(names or ())) is not None
    except TypeError:
        return False


def of_numbers(files: AdapterFiles) -> Iterator[Sighting]:
    """Find ranks and alphas that peft cannot use, and alphas that are zero, negative or not finite."""
    rank, alpha = files.config.get("r"), files.config.get("lora_alpha")
    wrong = [pair for pair in files.pairs if not (is_rank(pair.asked) and _is_number(pair.alpha))]
    is_plain = is_rank(rank) and _is_number(alpha)
    if wrong or not is_plain:
        of = f" (for {some([pair.module for pair in wrong])})" if wrong and is_plain else ""
        what = (
            "adapter_config.json gives no rank or alpha that peft can use (r, lora_alpha, rank_pattern, alpha_pattern)"
        )
        values = {"valid": way_to_ranks(wrong)}
        yield Sighting("unusable numbers", f"{what}{of}: r is {rank!r}, lora_alpha {alpha!r}", values)
    alphas = {pair.module: pair.alpha for pair in files.pairs if _is_number(pair.alpha)}
    zero, below = ([m for m, value in alphas.items() if is_it(value)] for is_it in ((0.0).__eq__, (0.0).__gt__))
    yield from seen("alpha of zero", zero, "alpha of {} is 0")
    yield from seen("alpha below zero", below, "alpha of {} is negative")
    endless = [module for module, value in alphas.items() if not math.isfinite(value)]
    yield from seen("alpha not finite", endless, "alpha of {} is not finite")


def _is_number(value: Any) -> bool:
    """Return whether peft can divide a value by a rank; an integer must fit a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300)
