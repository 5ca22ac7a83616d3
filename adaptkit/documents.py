"""Strict readers for JSON, and for YAML and JSON files that people write, with the line of every key.

Rejected are duplicate keys (readers differ on which one counts), in JSON NaN and numbers too large for a float, and in
what people write tags (which may run code), aliases (a few lines can expand to gigabytes), keys that are not text,
escapes of characters that no path has, and files above one MiB.

Unlike in YAML 1.1, ``2e-4`` is a number, while ``010`` (8 in YAML 1.1), ``12:30`` (750) and ``2026-01-31`` (a date) are
text. ``yes``, ``no``, ``on`` and ``off`` (booleans in YAML 1.1) must be quoted if they are values.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adaptkit.discovery import closest
from adaptkit.errors import DISK_HINTS, CheckpointError, ConfigError

REPAIR = "correct the file, or download or copy it again"
"""The hint for a malformed file."""
_LARGEST_BYTES = 1 << 20
_FORM = "check the path: expected a YAML or JSON file of settings"
_LINE = "correct this line of the file"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][\d_]*|0b[01_]{1,99}|0x[\da-fA-F_]{1,99})", "-+0123456789"),  # longer ones cannot be printed
    "float": (
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""The types that an unquoted scalar can have besides text: its pattern, and the characters that it can begin with."""
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")
"""Characters that escapes can write, but that are in no path, and in no text that can be encoded."""
_WORDS = {"yes", "no", "on", "off"}
_TAG = "tag:yaml.org,2002:"

Keys = tuple[str | int, ...]
"""The path to a value: keys, and positions in lists."""


@dataclass(frozen=True)
class Document:
    """The content of a file; ``lines`` maps the path of every value to its line, from 1, and is empty for JSON."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Keys, int]

    def where(self, *keys: str | int) -> str:
        """Describe a place in the file for messages: ``recipe.yaml, line 7: steps.adapter.rank``."""
        known = next((keys[:end] for end in range(len(keys), 0, -1) if keys[:end] in self.lines), ())
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.path}{line}" + (f": {'.'.join(map(str, keys))}" if keys else "")


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
        raise place.error(f"is {shown(values)}; expected keys and values", hint=f"known keys: {', '.join(listed)}")
    for key in values:
        if key not in listed:
            meant = (also or {}).get(key)
            raise place.at(key).error("unknown key", hint=nearest(meant if meant in listed else key, listed))
    return values


def shown(value: Any) -> str:
    """Describe a value; one that is not a text or number only by its kind, since it may be a secret."""
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or isinstance(value, bool):
        return "empty" if value is None else str(value).lower()
    return repr(value)[:60] if isinstance(value, str | int | float) else f"of type {type(value).__name__}"


def strict_json(text: bytes, where: str, infinities: bool = False) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; duplicate keys, NaN, infinities and other top-level values are a CheckpointError.

    With ``infinities`` the words Infinity and -Infinity are accepted, which Python writes and reads, but never 1e999.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: the key {twice!r} appears twice", hint=REPAIR)
        return found

    def constant(word: str) -> float:
        if infinities and word != "NaN":
            return float(word)
        raise CheckpointError(f"{where}: {word} is not valid JSON", hint=REPAIR)

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise CheckpointError(f"{where}: {number} is too large for a float", hint=REPAIR)
        return float(number)

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})", hint=REPAIR) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}", hint=REPAIR)
    return value


def read_document(path: Path) -> Document:
    """Read a YAML file, or a JSON file if the suffix is ``.json``, that holds a mapping; a ConfigError otherwise."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_BYTES + 1)
        if len(raw) > _LARGEST_BYTES:
            raise ConfigError(f"{path}: larger than a megabyte", hint=_FORM)
        text, lines = raw.decode("utf-8-sig"), dict[Keys, int]()
        values = strict_json(text.encode(), str(path)) if path.suffix == ".json" else _read_yaml(text, lines)
        texts = list(_texts(values))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        hint = _FORM if missing else DISK_HINTS.get(error.errno or 0, "")
        raise ConfigError(f"{path}: {error.strerror}", hint) from error
    except CheckpointError as error:
        raise ConfigError(error.message, error.hint) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: malformed ({' '.join(str(error.problem).split())})", hint=_LINE) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: malformed ({' '.join(str(error).split())})", hint=_FORM) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as 'rank: 16'", hint=_FORM)
    document = Document(path, values, lines)
    for keys, text in texts:
        if _IMPOSSIBLE.search(text):
            raise ConfigError(f"{document.where(*keys)}: contains U+0000 or an unpaired surrogate", hint=_LINE)
    return document


def _texts(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield every text of a document, also keys, with its path."""
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(key, keys)
            yield from _texts(part, (*keys, key))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, made strict."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See ``yaml.composer.Composer``."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        is_plain = isinstance(event, yaml.ScalarEvent) and event.style is None
        problem = ""
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases are not supported"
        elif event.tag is not None:
            problem = "tags are not supported"
        elif is_plain and index is not None and event.value.lower() in _WORDS:  # a key has no index
            word = event.value
            problem = f"some readers take {word} for true or false: write one of these, or '{word}' in quotes"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See ``yaml.SafeLoader``."""
        seen: set[str] = set()
        for key, _ in node.value:
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "here"
            is_text = shown != "here" and key.tag == f"{_TAG}str"
            if not is_text or key.value in seen:
                problem = f"the key {shown} " + ("appears twice" if is_text else "is not text; write it in quotes")
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, how) for tag, how in found if tag.removeprefix(_TAG) not in (*_SCALARS, "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"({_pattern})$"), list(_first))


def _read_yaml(text: str, lines: dict[Keys, int]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values = loader.construct_document(node)
        lines.update(_lines(node, ()))
        return values
    finally:
        loader.dispose()


def _lines(node: yaml.Node, keys: Keys) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*keys, number), value.start_mark.line + 1
            yield from _lines(value, (*keys, number))
