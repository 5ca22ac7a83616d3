"""YAML and JSON files that people write, read strictly, with the line of every key.

Refused are a key that appears twice, of which readers keep one or the other; tags, which may ask for code to run;
aliases, of which a few lines unfold to gigabytes; keys that are no text; files above a megabyte. Unlike YAML 1.1,
``2e-4`` is a number and ``2026-01-31`` is text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adaptkit.errors import DISK_HINTS, ConfigError

_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_LARGEST_BYTES = 1 << 20
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")

Keys = tuple[str | int, ...]
"""Where a value is: the keys, and the positions in lists, that lead to it."""


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Attributes:
        path: of the file.
        values: its keys and values.
        lines: of every value, from 1; empty for JSON.
    """

    path: Path
    values: dict[str, Any]
    lines: Mapping[Keys, int]

    def where(self, *keys: str | int) -> str:
        """A place in the file for people: ``recipe.yaml, line 7: steps.adapter.rank``."""
        known = next((keys[:end] for end in range(len(keys), 0, -1) if keys[:end] in self.lines), ())
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.path}{line}" + (f": {'.'.join(map(str, keys))}" if keys else "")


def read_document(path: Path) -> Document:
    """Read a YAML file, or a JSON file by its suffix, that holds keys and values.

    Raises:
        ConfigError: absent, malformed, a key that appears twice, or no mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_BYTES + 1)
        if len(raw) > _LARGEST_BYTES:
            raise ConfigError(f"{path}: larger than a megabyte", hint="is it the file that you meant?")
        text, lines = raw.decode("utf-8-sig"), dict[Keys, int]()
        values = _read_json(text) if path.suffix == ".json" else _read_yaml(text, lines)
    except OSError as error:
        hint = "check the path: a YAML or JSON file is read here" if isinstance(error, _NOT_THERE) else ""
        raise ConfigError(f"{path}: {error.strerror}", hint or DISK_HINTS.get(error.errno or 0, "")) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: malformed ({' '.join(str(error.problem).split())})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: malformed ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as 'rank: 16'")
    return Document(path, values, lines)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, made strict."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See ``yaml.composer.Composer``."""
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See ``yaml.SafeLoader``."""
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "here"
                problem = f"the key {shown} is no text; write it in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        _unique([(key.value, key.start_mark) for key, _ in node.value])
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in found if tag != _TIMESTAMP]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read_yaml(text: str, lines: dict[Keys, int]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values = loader.construct_document(node)
    finally:
        loader.dispose()
    lines.update(_lines(node, ()))
    return values


def _lines(node: yaml.Node, keys: Keys) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark.line + 1
            yield from _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*keys, number), value.start_mark.line + 1
            yield from _lines(value, (*keys, number))


def _read_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _unique([(key, None) for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _unique(keys: Sequence[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, mark in keys:
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=mark)
        seen.add(key)
