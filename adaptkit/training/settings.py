"""Settings: fields of a frozen dataclass that are both keys of a configuration file and command-line options.

    @dataclass(frozen=True)
    class Config:
        rank: int = setting("Rank of the adapter's matrices.", 16, at_least=1)

A field's type is one of int, float, str, bool, ``tuple[str, ...]``, ``Mapping[str, float]`` or ``Mapping[str, str |
int | float | bool]``, each with ``| None`` if it may be unset. Tuples and mappings are repeatable options
(``NAME=NUMBER`` or ``NAME=VALUE`` for a mapping) on the command line.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from os import PathLike
from typing import Any, NoReturn, TypeVar, get_origin

from adaptkit.errors import ConfigError
from adaptkit.settings import Place, convert

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Setting:
    """Metadata of a field that is a setting.

    Attributes:
        help: one-sentence description.
        at_least: smallest allowed value.
        above: exclusive lower limit.
        at_most: largest allowed value.
        below: exclusive upper limit.
        choices: the only allowed values.
        section: heading in the help for this setting and those after it; None continues the previous section.
        hidden: whether the help leaves it out.
        after: setting that this one follows, if a class inherits both; None: the order of the fields.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    section: str | None = None
    hidden: bool = False
    after: str | None = None

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is allowed; NaN and infinity never are."""
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
        """Return the allowed values as a phrase; empty if all are allowed."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {_written(bound)}" for word, bound in bounds if bound is not None)


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) and bound < 10**9 else f"{bound:g}"


def setting(help: str, default: Any = MISSING, **limits: Any) -> Any:
    """Return a dataclass field that is a setting.

    Args:
        help: one-sentence description.
        default: default value; MISSING makes the setting required.
        limits: further attributes of ``Setting``.
    """
    return field(default=default, metadata={"setting": Setting(help, **limits)})


def settings(kind: type) -> dict[str, tuple[Field[Any], Setting]]:
    """Return the field and ``Setting`` of each setting of a dataclass, by name, in order."""
    found = {each.name: (each, each.metadata["setting"]) for each in fields(kind) if "setting" in each.metadata}
    ordered = [name for name, (_, rule) in found.items() if rule.after not in found]
    for name, (_, rule) in found.items():
        if rule.after in found:
            ordered.insert(ordered.index(rule.after) + 1, name)
    return {name: found[name] for name in ordered}


def documented(kind: type[Kind]) -> type[Kind]:
    """Append the text of each setting to the docstring of a dataclass, for ``help``."""
    texts = (f"{name}: {rule.help}" for name, (_, rule) in settings(kind).items())
    lines = (textwrap.fill(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8) for text in texts)
    kind.__doc__ = "\n".join((f"{kind.__doc__}\n\nAttributes:", *lines))
    return kind


def check(config: Any) -> None:
    """Convert the values of a dataclass of settings to the types of their fields, and check their limits.

    A single string or path is accepted for a sequence, as elsewhere in the API; in a file, it must be a list.

    Raises:
        ConfigError: a value is not allowed; names the setting.
    """
    for name, (found, rule) in settings(type(config)).items():
        given = getattr(config, name)
        value = (given,) if get_origin(found.type) is tuple and isinstance(given, str | PathLike) else given
        object.__setattr__(config, name, convert(value, found.type, Place(keys=(name,))))
        value = getattr(config, name)
        if not rule.allows(value):
            refuse(config, name, f"{'values must be' if isinstance(value, Mapping) else 'must be'} {rule.range()}")


def refuse(config: Any, name: str, problem: str) -> NoReturn:
    """Raise the error for a value that is not allowed.

    Args:
        config: dataclass with the setting.
        name: name of the setting.
        problem: what the value must be.

    Raises:
        ConfigError: always.
    """
    _, rule = settings(type(config))[name]
    found = getattr(config, name)
    shown = ", ".join(f"{key}={item!r}" for key, item in found.items()) if isinstance(found, Mapping) else repr(found)
    raise ConfigError(f"{name}: {problem}, found {shown}", hint=f"{name}: {rule.help}")
