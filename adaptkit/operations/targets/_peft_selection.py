"""Which modules peft 0.21.2 adapts, by ``adapter_config.json``; see its ``check_target_module_exists``."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adaptkit.checkpoint.patterns import matches_whole

SHORTHAND = "all-linear"


def untargeted(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return the modules that peft creates no LoRA for.

    A module whose whole path is in ``target_modules`` is compared with that entry only, to avoid quadratic time.
    """
    targets = config.get("target_modules")
    whole = {name for name in targets if isinstance(name, str)} if isinstance(targets, list) else set()
    return [m for m in modules if not is_target({**config, "target_modules": [m]} if m in whole else config, m)]


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Return whether peft creates a LoRA for a module, if the model has it."""
    saved = config.get("modules_to_save")
    around = saved if isinstance(saved, list) else []
    if any(_matches_path(rf"(.*\.)?{name}(\..*)?", module) for name in around):
        return False
    return is_parameter(config, module) or is_module(config, module)


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
