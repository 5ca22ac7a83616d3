"""Values of a recipe, as the options that commands use: dataclasses, checked by name and by type."""

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from adaptkit.checkpoint.document import Document, Keys
from adaptkit.discovery import closest
from adaptkit.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Place:
    """Where in a document something stands, for messages."""

    document: Document
    keys: Keys = ()

    def at(self, *keys: str | int) -> "Place":
        """A place further in."""
        return Place(self.document, (*self.keys, *keys))

    def error(self, problem: str, hint: str = "") -> ConfigError:
        """What is wrong here."""
        return ConfigError(f"{self.document.where(*self.keys)}: {problem}", hint=hint)


def nearest(name: str, known: Iterable[str], otherwise: str = "known") -> str:
    """A hint for a name that is not known."""
    listed = sorted(known)
    close = closest(name, listed)
    return f"did you mean {close!r}?" if close else f"{otherwise}: {', '.join(listed) or 'none'}"


def check_keys(values: Any, known: Iterable[str], place: Place) -> Mapping[str, Any]:
    """Refuse what is no mapping, and keys that mean nothing.

    Raises:
        ConfigError: names the key, and the nearest known one.
    """
    listed = list(known)
    if not isinstance(values, Mapping):
        raise place.error(f"is {_shown(values)}; expected keys and values", hint=f"keys: {', '.join(listed)}")
    for key in values:
        if key not in listed:
            raise place.at(key).error("unknown key", hint=nearest(key, listed))
    return values


def build(kind: type[Any], values: Mapping[str, Any], place: Place) -> Any:
    """Make a dataclass from a recipe's values.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, one that the dataclass refuses, or one that is missing.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    check_keys(values, known, place)
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise place.error(f"{field.name} is missing", hint=f"{field.name}: {_expected(hints[field.name])}")
    found = {name: _convert(value, hints[name], place.at(name)) for name, value in values.items()}
    try:
        return kind(**found)
    except UsageError as error:
        named = next((name for name in found if error.message.startswith(f"{name}:")), None)
        problem = error.message if named is None else error.message.removeprefix(f"{named}:").strip()
        raise (place.at(named) if named else place).error(problem, error.hint) from error


def _convert(value: Any, hint: Any, place: Place) -> Any:
    """The value in the type that is wanted.

    Raises:
        ConfigError: it has another.
    """
    if get_origin(hint) in (Union, types.UnionType):
        choices = get_args(hint)
        if value is None and type(None) in choices:
            return None
        rest = [choice for choice in choices if choice is not type(None)]
        return _convert(value, next((choice for choice in rest if _fits(value, choice)), rest[0]), place)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, check_keys(value, [field.name for field in fields(hint)], place), place)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, inner[0], place.at(number)) for number, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _convert(item, inner[1], place.at(key)) for key, item in value.items()}
    if origin is None and hint is not None and _fits(value, hint):
        return hint(value) if hint in (Path, float) else value  # 1 is a number too, and manifests tell 1 from 1.0
    advice = f"write it in quotes: '{value}'" if hint is str and isinstance(value, int | float) else ""
    advice = advice or (f"write [{value}]" if origin is tuple and isinstance(value, str | int | float) else "")
    raise place.error(f"is {_shown(value)}; expected {_expected(hint)}", hint=advice)


def _fits(value: Any, hint: Any) -> bool:
    if not isinstance(hint, type) or get_origin(hint) is not None:
        return False
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, str if hint is Path else hint)


def _expected(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_expected(choice) for choice in get_args(hint) if choice is not type(None))
    if get_origin(hint) is tuple:
        return f"a list, each of them {_expected(get_args(hint)[0])}"
    if hint in names:
        return names[hint]
    return "keys and values"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return "empty" if value is None else str(value).lower()
    return repr(value)
