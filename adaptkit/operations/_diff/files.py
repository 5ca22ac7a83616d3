"""Compare side files: JSON by key, added tokens and chat templates by name, everything else by hash."""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.layout import read_small
from adaptkit.checkpoint.side_files import find_side_files
from adaptkit.data.tokenizer_files import TEMPLATE_KEY, TOKENIZER_CONFIG, is_template, templates_in
from adaptkit.documents import strict_json
from adaptkit.errors import CheckpointError, IntegrityError
from adaptkit.wording import counted

TOKENIZER_NAME = "tokenizer.json"
_MOST_KEYED_BYTES = 4 << 20


@dataclass(frozen=True)
class ValueDifference:
    """A key of a JSON file whose two values differ.

    Attributes:
        file: name of the file.
        key: dotted path of the key.
        first: the first folder's value as JSON; None if the key is absent.
        second: the second folder's value, likewise.
    """

    file: str
    key: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class FileDifference:
    """A file that is not the same in both folders.

    Attributes:
        file: name of the file.
        sha256: hash in each folder; None if the file is absent.
    """

    file: str
    sha256: tuple[str | None, str | None]


@dataclass(frozen=True)
class TemplateDifference:
    """A chat template that differs.

    Attributes:
        name: ``default``, or the template's own name.
        files: file that holds it in each folder; None if it is absent.
        lines: unified diff.
    """

    name: str
    files: tuple[str | None, str | None]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FilesDifference:
    """Side files that differ.

    Attributes:
        compared: number of files in both folders together.
        values: differing keys of JSON files, including the tokenizer's.
        files: files that differ but cannot be compared by key, or that only one folder has.
        templates: differing chat templates, in whatever file they are.
    """

    compared: int
    values: tuple[ValueDifference, ...]
    files: tuple[FileDifference, ...]
    templates: tuple[TemplateDifference, ...]

    @property
    def same(self) -> bool:
        """Return whether nothing differs."""
        return not (self.values or self.files or self.templates)


def differ_in_files_beside(first: Path, second: Path) -> FilesDifference:
    """Compare the side files of two folders, their undo records and their embedded adapters.

    Two JSON objects with equal values count as the same file. Chat templates are compared by name, whichever file they
    are in.
    """
    found = [_items_beside(root) for root in (first, second)]
    templates = _differ_in_templates(*(templates_in(root, _document, _text) for root in (first, second)))
    values: list[ValueDifference] = []
    files: list[FileDifference] = []
    for name in sorted(name for name in {*found[0], *found[1]} if not is_template(name)):
        one, two = (paths.get(name) for paths in found)
        digests = [None if path is None else _sha256(path) for path in (one, two)]
        if digests[0] == digests[1]:
            continue
        documents = [None if path is None else _document(path) for path in (one, two)]
        if name == TOKENIZER_CONFIG and documents[0] and documents[1]:
            documents = _without_templates(documents[0], documents[1], templates_differ=bool(templates))
        if documents[0] is not None and documents[0] == documents[1]:
            continue  # only the formatting differs
        by_key = []
        if documents[0] is not None and documents[1] is not None:
            compare = _differ_in_tokenizers if name == TOKENIZER_NAME else differ_in_values
            by_key = compare(name, documents[0], documents[1])
        values += by_key
        files += [] if by_key else [FileDifference(name, (digests[0], digests[1]))]
    return FilesDifference(sum(map(len, found)), tuple(values), tuple(files), templates)


def differ_in_values(file: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ValueDifference]:
    """Compare two JSON objects key by key, recursing into nested objects; lists are compared whole."""
    return _differing(file, dict(_flat(first)), dict(_flat(second)))


def _without_templates(
    first: dict[str, Any], second: dict[str, Any], templates_differ: bool
) -> list[dict[str, Any] | None]:
    """Remove the chat templates, which are compared separately.

    They stay if both documents have one and that comparison found no difference: a template file overrides the key, so
    only this comparison sees it.
    """
    hidden = not templates_differ and TEMPLATE_KEY in first and TEMPLATE_KEY in second
    return [{k: v for k, v in document.items() if hidden or k != TEMPLATE_KEY} for document in (first, second)]


def _items_beside(root: Path) -> dict[str, Path]:
    """Map names to the paths to compare; the folders of undo records and embedded adapters count as one item each."""
    folders = (undo.ADAPTERS_PREFIX, f"{undo.FOLDER}/")
    return find_side_files(root) | {name: root / name for name in folders if (root / name).is_dir()}


def _sha256(path: Path) -> str:
    """Return the sha256 of a file, or of the names and digests of a folder's files."""
    try:
        if not path.is_dir():
            return file_sha256(path)
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n" for file in inside]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


def _document(path: Path) -> dict[str, Any] | None:
    """Return the JSON object to compare key by key; None for any other file, which is compared by hash."""
    if path.suffix != ".json" or (path.name != TOKENIZER_NAME and path.stat().st_size > _MOST_KEYED_BYTES):
        return None
    try:
        return strict_json(read_small(path), path.name, infinities=True)
    except CheckpointError:  # another tool's file, perhaps a list: compared by hash
        return None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, json.dumps(value, sort_keys=True, ensure_ascii=False)


def _differing(file: str, first: Mapping[str, str], second: Mapping[str, str]) -> list[ValueDifference]:
    keys = sorted({*first, *second})
    return [
        ValueDifference(file, key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)
    ]


def _differ_in_tokenizers(file: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ValueDifference]:
    """Compare two ``tokenizer.json``: added tokens by name, vocabulary and merges by entry counts, the rest by key."""
    return _differing(file, _summarized(first, second), _summarized(second, first))


def _summarized(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in mine:
        if key == "added_tokens" and isinstance(mine[key], list):
            for token in mine[key]:
                content = token.get("content") if isinstance(token, dict) else token
                found[f"added token {content!r}"] = json.dumps(token, sort_keys=True, ensure_ascii=False)
        elif key == "model" and isinstance(mine[key], dict):
            theirs = other.get(key) if isinstance(other.get(key), dict) else {}
            for part, value in mine[key].items():
                if part in ("vocab", "merges"):
                    found[f"model.{part}"] = _counted(value, (theirs or {}).get(part))
                else:
                    found |= dict(_flat(value, f"model.{part}"))
        else:
            found |= dict(_flat(mine[key], key))
    return found


def _counted(mine: Any, other: Any) -> str:
    """Summarize how a vocabulary or list of merges differs from the other one."""
    if mine == other:
        return "the same"
    entries = [_entries(part) for part in (mine, other)]
    summary = f"{counted(len(entries[0]), 'entry')}, {len(entries[0] - entries[1]):,} of them only here"
    if not isinstance(mine, list) or not isinstance(other, list):
        return summary
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=False)))
    return f"{summary}, entry {common:,} is {mine[common] if common < len(mine) else 'absent'!r}"


def _entries(part: Any) -> set[str]:
    items = part.items() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return set(map(repr, items))


def _text(path: Path) -> str:
    try:
        return read_small(path).decode("utf-8", "backslashreplace")
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


def _differ_in_templates(
    first: Mapping[str, tuple[str, str]], second: Mapping[str, tuple[str, str]]
) -> tuple[TemplateDifference, ...]:
    found = []
    for name in sorted({*first, *second}):
        one, two = first.get(name), second.get(name)
        texts = [template[1] if template else "" for template in (one, two)]
        if one is None or two is None or texts[0] != texts[1]:
            old, new = (text.split("\n") for text in texts)  # unlike splitlines(), shows a missing final newline
            lines = difflib.unified_diff(old, new, "first", "second", lineterm="", n=1)
            found.append(TemplateDifference(name, (one and one[0], two and two[0]), tuple(lines)))
    return tuple(found)
