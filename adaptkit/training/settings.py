"""Settings: fields of a frozen dataclass that are keys of a configuration file and options of the command line at once.

    @dataclass(frozen=True)
    class Config:
        rank: int = setting("Of the adapter's matrices.", 16, at_least=1)

A field's type is one of int, float, str, bool, ``tuple[str, ...]``, ``Mapping[str, float]`` or ``Mapping[str, str |
float | bool]``, each with ``| None`` if it may be left open. Tuples and mappings are lists and mappings in a file, and
repeatable options (``NAME=NUMBER`` or ``NAME=VALUE`` for a mapping) on the command line.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from adaptkit.checkpoint.document import read_document
from adaptkit.discovery import closest
from adaptkit.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """What a field's metadata says of it.

    Attributes:
        help: a sentence for people.
        at_least: smallest value.
        above: values are larger.
        at_most: largest value.
        below: values are smaller.
        choices: the only values.
        section: heading under which it and what follows stand in the help; None for that of what stands before.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    section: str | None = None

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type can be used; NaN never can."""
        if value is None or isinstance(value, bool):
            return True
        if isinstance(value, Mapping):
            return all(self.allows(item) for item in value.values())
        if isinstance(value, tuple):
            return all(self.allows(item) for item in value)
        if isinstance(value, str):
            return self.choices is None or value in self.choices
        return bool(
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and abs(value) < float("inf")
        )

    def range(self) -> str:
        """What it allows, for people; empty if everything."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return ", ".join(f"{word} {_written(bound)}" for word, bound in bounds if bound is not None)


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) and bound < 10**9 else f"{bound:g}"


def setting(help: str, default: Any = MISSING, **limits: Any) -> Any:
    """A field that is a setting.

    Args:
        help: a sentence for people.
        default: MISSING if it has to be given.
        limits: see ``Setting``.
    """
    return field(default=default, metadata={"setting": Setting(help, **limits)})


def settings(kind: type) -> dict[str, tuple[Field[Any], Setting]]:
    """The settings of a dataclass, by name, in order."""
    return {found.name: (found, found.metadata["setting"]) for found in fields(kind) if "setting" in found.metadata}


def check(config: Any) -> None:
    """Check the values of a dataclass of settings against their limits.

    Raises:
        ConfigError: one cannot be used; names it.
    """
    for name, (_, rule) in settings(type(config)).items():
        if not rule.allows(getattr(config, name)):
            refuse(config, name, rule.range())


def refuse(config: Any, name: str, reason: str = "") -> NoReturn:
    """Say that a setting's value cannot be used.

    Raises:
        ConfigError: always.
    """
    _, rule = settings(type(config))[name]
    hint = f"{name}: {rule.help}" + (f" ({reason})" if reason else "")
    raise ConfigError(f"{name}: {getattr(config, name)!r} cannot be used", hint=hint)


def conflict(name: str, reason: str, hint: str) -> NoReturn:
    """Say that a setting does not go with the others.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"{name}: {reason}", hint=hint)


def as_declared(value: Any, kind: Any) -> Any:
    """A value in its setting's own type: lists are tuples, and 1 is 1.0 where 1.5 may be, since manifests tell them."""
    if "tuple" in str(kind):
        return tuple(value)
    if "Mapping[str, float]" in str(kind) and isinstance(value, Mapping):
        return {key: as_declared(item, float) for key, item in value.items()}
    is_exact = kind in (float, float | None) and type(value) is int and abs(value) <= 1 << 53
    return float(value) if is_exact else value


def check_values(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the names and types of values for a dataclass of settings.

    Args:
        kind: the dataclass.
        values: of a file or the command line.
        where: they came from, for the message.

    Returns:
        The same; lists as tuples.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a required key that is missing.
    """
    known = settings(kind)
    for key, value in values.items():
        if key not in known:
            close = closest(str(key), known)
            hint = f"did you mean {close!r}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
        if not _fits(value, str(known[key][0].type)):
            expected = _name(str(known[key][0].type))
            hint = f"{key}: {known[key][1].help}"
            raise ConfigError(f"{where}: {key} is {_shown(value)}; expected {expected}", hint=hint)
    for key, (found, rule) in known.items():
        if found.default is MISSING and key not in values:
            raise ConfigError(f"{where}: {key} is missing", hint=f"{key}: {rule.help}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of options; see ``checkpoint.document``.

    Raises:
        ConfigError: absent, malformed, a key that appears twice, or no mapping.
    """
    return read_document(path).values


def _shown(value: Any) -> str:
    """The beginning of a value."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)


def _name(annotation: str) -> str:
    """A field's type, for people."""
    names = {"tuple": "a list of texts, numbers in quotes", "Mapping[str, str": "names with values",
             "Mapping": "names with numbers", "bool": "true or false", "int": "a whole number", "float": "a number",
             "str": "a text"}  # fmt: skip
    return next(name for kind, name in names.items() if kind in annotation)


def _fits(value: Any, annotation: str) -> bool:
    if value is None:
        return "None" in annotation
    if "tuple" in annotation:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if "Mapping" in annotation:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _fits(item, annotation.partition(",")[2].partition("]")[0])
            for key, item in value.items()
        )
    if isinstance(value, bool):
        return "bool" in annotation
    kinds = {"int": int, "float": int | float, "str": str}
    return any(isinstance(value, kind) for name, kind in kinds.items() if name in annotation)
