"""Settings: the fields of a frozen dataclass are a command's options, the keys of its file, and Python's arguments.

    @dataclass(frozen=True)
    class ResizeOptions(Settings):
        rank: int | None = setting("Rank of every module that has a larger one.", None, at_least=1)

        def validate(self) -> None: ...        refuses settings that contradict each other

``cli.options`` makes the options of the command line from the fields, and ``read_settings`` reads a mapping of a YAML
or JSON document, such as a step of a recipe; both end here, so all three have one set of names, limits and errors.

A field's type is int, float, bool, str, Path, another class of settings, ``tuple[type, ...]`` or ``Mapping[str, type]``
of them, a union, or any other class. Lists become tuples, whole numbers become floats in float fields, since manifests
distinguish 1 from 1.0, and numpy's scalars and arrays become Python's.
"""

import math
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from adaptkit.documents import Place, check_keys, shown
from adaptkit.errors import ConfigError, UsageError

IN_QUOTES = "write it in quotes"
"""The hint for a number where text is expected; without the number, which is 1.1 where the file has 1.10."""

Kind = TypeVar("Kind", bound="Settings")


@dataclass(frozen=True)
class Setting:
    """What a field of a class of settings says of itself.

    Attributes:
        help: one-sentence description.
        at_least: smallest allowed value.
        above: exclusive lower limit.
        at_most: largest allowed value.
        below: exclusive upper limit.
        choices: the only allowed values.
        flag: name of the option on the command line, such as ``--pr``; empty for the field's name with dashes.
        metavar: what the help of the command line calls the value.
        is_size: whether it is a number of bytes, written as ``5GB`` on the command line.
        section: heading in the help for this setting and those after it; empty continues the previous section.
        hidden: whether the help leaves it out.
        after: setting that this one follows, if a class inherits both; empty: the order of the fields.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    flag: str = ""
    metavar: str = ""
    is_size: bool = False
    section: str = ""
    hidden: bool = False
    after: str = ""

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is allowed; NaN and infinity never are."""
        if isinstance(value, Mapping | tuple):
            return all(map(self.allows, value.values() if isinstance(value, Mapping) else value))
        if isinstance(value, str):
            return self.choices is None or value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return bool(
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and abs(value) < float("inf")
        )

    def range(self) -> str:
        """Return the allowed values as a phrase."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {_written(bound)}" for word, bound in bounds if bound is not None) or "finite"


def _written(bound: float) -> str:
    if not isinstance(bound, int) or bound < 10**9:
        return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
    return f"2^{bound.bit_length()} - 1" if bound == 2 ** bound.bit_length() - 1 else f"{bound:g}"


def setting(help: str, default: Any = MISSING, **attributes: Any) -> Any:
    """Return a field that is a setting.

    Args:
        help: one-sentence description.
        default: default value; MISSING makes the setting required.
        attributes: further attributes of ``Setting``.
    """
    metadata = {"setting": Setting(help, **attributes)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the dataclasses of settings; making one converts and checks every field.

    Raises:
        ConfigError: a value has the wrong type or is not allowed, or two settings contradict each other; the message
            begins with the setting's name.
    """

    other_names: ClassVar[Mapping[str, str]] = {}
    """Maps what other tools call some of the settings to their names here, for hints."""
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        """Append the settings of the class to its docstring, for ``help``."""
        found = {
            name: part
            for base in cls.__mro__[:0:-1]
            for name, part in getattr(base, "__dataclass_fields__", {}).items()
        }
        found |= {name: part for name, part in vars(cls).items() if isinstance(part, Field)}
        own = {name: part.metadata["setting"] for name, part in found.items() if "setting" in part.metadata}
        texts = (f"{name}: {rule.help}" for name, rule in own.items())
        lines = (textwrap.fill(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8) for text in texts)
        cls.__doc__ = "\n".join((f"{cls.__doc__}\n\nAttributes:", *lines)) if own else cls.__doc__

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for each in fields(self):
            name, rule, value = each.name, each.metadata.get("setting"), getattr(self, each.name)
            if get_origin(_choices(hints[name])[0]) is tuple and isinstance(value, str | PathLike):
                value = (value,)  # in a file, it must be a list
            value = _converted(value, each, hints, Place())
            object.__setattr__(self, name, value)
            if rule is not None and not rule.allows(value):
                refuse(self, name, f"{'values must be' if isinstance(value, Mapping) else 'must be'} {rule.range()}")
        self.validate()

    def validate(self) -> None:
        """Refuse settings that contradict each other, each of which is of its type and within its limits.

        Raises:
            UsageError: the message begins with the name of one.
        """


def settings(kind: type) -> dict[str, tuple[Field[Any], Setting]]:
    """Return the field and ``Setting`` of each setting of a class, by name, in order."""
    own = {each.name: (each, each.metadata["setting"]) for each in fields(kind) if "setting" in each.metadata}
    ordered = [name for name, (_, rule) in own.items() if rule.after not in own]
    for name, (_, rule) in own.items():
        if rule.after in own:
            ordered.insert(ordered.index(rule.after) + 1, name)
    return {name: own[name] for name in ordered}


def refuse(config: Settings, name: str, problem: str) -> NoReturn:
    """Raise the error for a value that is not allowed.

    Args:
        config: has the setting.
        name: of the setting.
        problem: what the value must be.

    Raises:
        ConfigError: always.
    """
    _, rule = settings(type(config))[name]
    value = getattr(config, name)
    shown = ", ".join(f"{key}={item!r}" for key, item in value.items()) if isinstance(value, Mapping) else repr(value)
    called = name.rstrip("_")  # as in lambda_
    raise ConfigError(f"{called}: {problem}, found {shown}", hint=f"{called}: {rule.help}")


def read_settings(
    kind: type[Kind], values: Mapping[str, Any], place: Place, overrides: Mapping[str, Any] | None = None
) -> Kind:
    """Make settings from a document's values.

    Args:
        kind: their class.
        values: by name.
        place: the location of ``values``.
        overrides: arguments that override ``values``; errors about them name no place.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, one that the class rejects, or a missing one.
        UsageError: the class rejects one of ``overrides``.
    """
    hints, overrides = _hints(kind), dict(overrides or {})
    check_keys(values, [each.name for each in fields(kind)], place, kind.other_names)
    given = {
        each.name: _converted(values[each.name], each, hints, place) for each in fields(kind) if each.name in values
    }
    given |= overrides
    for each in fields(kind):
        if each.name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise place.error(f"{each.name} is missing", hint=f"add {each.name}: {_expected(hints[each.name])}")
    try:
        return kind(**given)
    except UsageError as error:
        named = next((name for name in given if error.message.startswith(f"{name}:")), None)
        if named in overrides or (overrides and not values):
            raise
        problem = error.message if named is None else error.message.removeprefix(f"{named}:").strip()
        raise (place.at(named) if named else place).error(problem, error.hint) from error


def _converted(value: Any, field: Field[Any], hints: Mapping[str, Any], place: Place) -> Any:
    try:
        return convert(value, hints[field.name], place.at(field.name.rstrip("_")))
    except ConfigError as error:
        if not error.hint and "setting" in field.metadata:
            error.advise(f"{field.name}: {field.metadata['setting'].help}")
        raise


def declared(hint: Any) -> Any:
    """Return a field's type without ``| None``."""
    rest = _choices(hint)
    return rest[0] if len(rest) == 1 else hint


def convert(value: Any, hint: Any, place: Place) -> Any:
    """Return the value converted to a type; a ConfigError if it does not have this type."""
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if value is None and type(None) in get_args(hint):
        return None
    hint = next((choice for choice in _choices(hint) if _fits(value, choice)), _choices(hint)[0])
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Settings) and isinstance(value, Mapping):
        return read_settings(hint, value, place)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, inner[0], place.at(number)) for number, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {convert(key, str, place): convert(item, inner[1], place.at(key)) for key, item in value.items()}
    if _fits(value, hint):
        plain = fspath(value) if isinstance(value, PathLike) else value
        return hint(plain) if hint in _EXPECTED else value
    advice = "write true or false" if hint is bool else ""
    if isinstance(value, str | int | float) and place.document:
        advice = f"write [{value}]" if origin is tuple else IN_QUOTES if hint is str else advice
    said = shown(value) if hint in _EXPECTED or origin is not None else f"of type {type(value).__name__}"
    raise place.error(f"is {said}; expected {_expected(hint)}", hint=advice)


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _choices(hint: Any) -> list[Any]:
    """Return the types of a union but None; any other type is its only choice."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    return [choice for choice in get_args(hint) if choice is not type(None)] if is_union else [hint]


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _fits(value: Any, hint: Any) -> bool:
    if not isinstance(hint, type) or get_origin(hint) is not None:
        return False
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint in (int, float):
        try:
            is_finite = isinstance(value, Real) and math.isfinite(float(value))
        except OverflowError:  # a whole number too large for a float
            return hint is int
        return is_finite and (hint is float or isinstance(value, Integral) or float(value).is_integer())
    if hint is Path:
        return isinstance(value, str | PathLike) and fspath(value) != ""
    return isinstance(value, str | PathLike if hint is str else hint)


def _expected(hint: Any) -> str:
    origin, inner, choices = get_origin(hint), get_args(hint), _choices(hint)
    if choices != [hint]:
        return " or ".join(map(_expected, choices))
    if origin is tuple:
        return f"a list, each item {_expected(inner[0])}"
    if inner:
        return f"names, each with {_expected(inner[1])}"
    return _EXPECTED.get(hint) or ("keys and values" if issubclass(hint, Settings) else hint.__name__)
