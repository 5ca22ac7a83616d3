"""Settings: the values of a document, converted to the types that dataclasses declare.

A field's type is int, float, bool, str, Path, another dataclass, ``tuple[type, ...]`` or ``Mapping[str, type]`` of
them, or a union. Lists become tuples, and whole numbers become floats in float fields, since manifests distinguish 1
from 1.0.
"""

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from adaptkit.discovery import closest
from adaptkit.documents import Document, Keys
from adaptkit.errors import ConfigError, UsageError

IN_QUOTES = "write it in quotes"
"""The hint for a number where text is expected; without the number, which is 1.1 where the file has 1.10."""


@dataclass(frozen=True)
class Place:
    """The location of a value, for messages: in a document, or among arguments if ``document`` is None."""

    document: Document | None = None
    keys: Keys = ()

    def at(self, *keys: str | int) -> "Place":
        """Return a nested place."""
        return Place(self.document, (*self.keys, *keys))

    def error(self, problem: str, hint: str = "") -> ConfigError:
        """Return an error whose message begins with this place."""
        where = self.document.where(*self.keys) if self.document else ".".join(map(str, self.keys))
        return ConfigError(f"{where}: {problem}" if where else problem, hint=hint)


def nearest(name: str, known: Iterable[str], otherwise: str = "known") -> str:
    """Return a hint for an unknown name: the most similar known one, or else a list of all."""
    listed = sorted(known)
    close = closest(name, listed)
    return f"did you mean {close!r}?" if close else f"{otherwise}: {', '.join(listed) or 'none'}"


def check_keys(
    values: Any, known: Iterable[str], place: Place, also: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """Return the values if they are a mapping with only known keys; a ConfigError otherwise.

    ``also`` maps what other tools call some of the keys to their names, for the hint.
    """
    listed = list(known)
    if not isinstance(values, Mapping):
        raise place.error(f"is {_shown(values)}; expected keys and values", hint=f"known keys: {', '.join(listed)}")
    for key in values:
        if key not in listed:
            meant = (also or {}).get(key)
            raise place.at(key).error("unknown key", hint=nearest(meant if meant in listed else key, listed))
    return values


def build(kind: type[Any], values: Mapping[str, Any], place: Place, overrides: Mapping[str, Any] | None = None) -> Any:
    """Make a dataclass from a document's values.

    Args:
        kind: the dataclass; its attribute ``other_names``, if there is one, is ``also`` of ``check_keys``.
        values: by field.
        place: the location of ``values``.
        overrides: arguments that override ``values``; errors about them name no place.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, one that the dataclass rejects, or a missing one.
        UsageError: the dataclass rejects one of ``overrides``.
    """
    hints, overrides = get_type_hints(kind), dict(overrides or {})
    check_keys(values, [field.name for field in fields(kind)], place, getattr(kind, "other_names", None))
    found = {name: convert(value, hints[name], place.at(name)) for name, value in values.items()} | overrides
    for field in fields(kind):
        if field.name not in found and field.default is MISSING and field.default_factory is MISSING:
            raise place.error(f"{field.name} is missing", hint=f"add {field.name}: {_expected(hints[field.name])}")
    try:
        return kind(**found)
    except UsageError as error:
        named = next((name for name in found if error.message.startswith(f"{name}:")), None)
        if named in overrides or (overrides and not values):
            raise
        problem = error.message if named is None else error.message.removeprefix(f"{named}:").strip()
        raise (place.at(named) if named else place).error(problem, error.hint) from error


def declared(hint: Any) -> Any:
    """Return a field's type without ``| None``."""
    rest = _choices(hint)
    return rest[0] if len(rest) == 1 else hint


def convert(value: Any, hint: Any, place: Place) -> Any:
    """Return the value converted to a type; a ConfigError if it does not have this type."""
    if value is None and type(None) in get_args(hint):
        return None
    hint = next((choice for choice in _choices(hint) if _fits(value, choice)), _choices(hint)[0])
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, place)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, inner[0], place.at(number)) for number, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {convert(key, str, place): convert(item, inner[1], place.at(key)) for key, item in value.items()}
    if _fits(value, hint):
        return hint(fspath(value) if isinstance(value, PathLike) else value)
    advice = "write true or false" if hint is bool else ""
    if isinstance(value, str | int | float):
        advice = f"write [{value}]" if origin is tuple else advice
        advice = IN_QUOTES if hint is str else advice
    raise place.error(f"is {_shown(value)}; expected {_expected(hint)}", hint=advice)


def _choices(hint: Any) -> list[Any]:
    """Return the types of a union but None; any other type is its only choice."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    return [choice for choice in get_args(hint) if choice is not type(None)] if is_union else [hint]


def _fits(value: Any, hint: Any) -> bool:
    if not isinstance(hint, type) or get_origin(hint) is not None:
        return False
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        try:
            return isinstance(value, Real) and math.isfinite(float(value))
        except OverflowError:  # a whole number too large for a float
            return False
    if hint is int:
        return isinstance(value, Integral)
    return isinstance(value, str | PathLike if hint in (str, Path) else hint)


def _expected(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    origin, inner, choices = get_origin(hint), get_args(hint), _choices(hint)
    if choices != [hint]:
        return " or ".join(map(_expected, choices))
    if origin is tuple:
        return f"a list, each item {_expected(inner[0])}"
    return f"names, each with {_expected(inner[1])}" if inner else names.get(hint, "keys and values")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or isinstance(value, bool):
        return "empty" if value is None else str(value).lower()
    return repr(value)
