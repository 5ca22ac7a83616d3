"""``recipe.lock``: what a recipe's sources and steps were, by hash, when it was run.

    schema    1
    tool      {name, version}
    name      of the release
    sources   name -> {path | repo, revision, commit} and {sha256 | manifest_sha256, tensors_root | files, tensors_root}
    steps     name -> {recipe: as it is written, key, outputs: {name: manifest_sha256}}

JSON with sorted keys, without times, paths of this machine and what only this run knows: the same inputs give the same
bytes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import adaptkit
from adaptkit.checkpoint.layout import read_json, read_small, write_json
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import CheckpointError, DriftError, UsageError
from adaptkit.hub.sources import is_commit
from adaptkit.pipeline.recipe import Recipe, Source

SCHEMA = 1
_SHOWN = 5
_ABSENT: Any = object()


def lock_path(recipe: Path) -> Path:
    """Where a recipe's lock lies.

    Raises:
        UsageError: where the recipe does.
    """
    lock = recipe.with_suffix(".lock")
    if lock == recipe:
        raise UsageError(
            f"{recipe}: its lock would have the same name", hint="rename the recipe so that it ends in .yaml"
        )
    return lock


class Lock:
    """The lock of this run, which grows with it; and, with ``--locked``, the one that it has to be.

    Args:
        recipe: being run.
        enforced: the lock that is there is what this one has to be.

    Raises:
        UsageError: it is enforced, and absent or malformed; or its place is taken by what is no lock.
        DriftError: it is enforced, and of another recipe.
    """

    def __init__(self, recipe: Recipe, enforced: bool) -> None:
        self._path = lock_path(recipe.path)
        self._before = _read(self._path, enforced)
        if self._before is None:
            _require_ours(self._path)
        self._expected = self._before if enforced else None
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "name": recipe.name,
            "tool": {"name": "adaptkit", "version": adaptkit.__version__},
            "sources": {},
            "steps": {},
        }
        if self._expected is not None:
            self._check_recipe(recipe, self._expected)

    def commit(self, source: Source) -> str | None:
        """The commit that the lock that is there names for a repository."""
        entry = (self._before or {}).get("sources", {}).get(source.name, {})
        is_same = all(entry.get(key) == value for key, value in source.written().items())
        commit = entry.get("commit")
        return commit if is_same and isinstance(commit, str) and is_commit(commit) else None

    def files(self, source: Source) -> set[str]:
        """The files that the lock that is there names for a repository at its commit."""
        entry = (self._before or {}).get("sources", {}).get(source.name, {})
        files = entry.get("files") if self.commit(source) is not None else None
        return set(files) if isinstance(files, dict) else set()

    def add(self, found: Any, *keys: str) -> None:
        """Note what was found.

        Raises:
            DriftError: the lock says otherwise.
        """
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = found
        expected: Any = self._expected
        for key in keys:
            expected = expected.get(key, _ABSENT) if isinstance(expected, Mapping) else _ABSENT
        if self._expected is not None:
            self._refuse(list(_differences(expected, found, keys)))

    def require_whole(self) -> None:
        """Refuse an enforced lock that says more than all steps found.

        Raises:
            DriftError: names what.
        """
        self._refuse(list(_differences(self._expected, _json(self.content), ())))

    def write(self) -> bool:
        """Write the lock; returns whether that changed it."""
        content = write_json(self.content)
        try:
            if self._path.read_bytes() == content:
                return False
        except OSError:
            pass
        replace_file(self._path, content)
        return True

    def _check_recipe(self, recipe: Recipe, expected: Mapping[str, Any]) -> None:
        """Compare what is known before anything is read."""
        found = {
            "name": recipe.name,
            "tool": self.content["tool"],
            "sources": {name: source.written() for name, source in recipe.sources.items()},
            "steps": {name: {"recipe": _json(step.written)} for name, step in recipe.steps.items()},
        }
        known = {
            "name": expected["name"],
            "tool": expected["tool"],
            "sources": {
                name: {key: entry[key] for key in ("path", "repo", "revision") if key in entry}
                for name, entry in expected["sources"].items()
            },
            "steps": {name: {"recipe": entry.get("recipe")} for name, entry in expected["steps"].items()},
        }
        self._refuse(list(_differences(known, found, ())))

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise DriftError(
                f"{self._path}: {'; '.join(differences[:_SHOWN])}{more}",
                hint="run without --locked to accept this, and review what changes in the lock",
            )


def _require_ours(path: Path) -> None:
    """Refuse to replace what is another program's, but not a lock that two versions were merged into."""
    try:
        content = read_small(path) if path.exists() else b""
        found = json.loads(content) if content.strip() and b"<<<<<<<" not in content else {}
    except OSError:
        return  # writing it says what is wrong
    except (CheckpointError, ValueError, RecursionError):
        found = None
    if found not in ([], {}) and not (isinstance(found, dict) and {"schema", "tool", "sources", "steps"} & set(found)):
        raise UsageError(f"{path}: is not a lock of adaptkit", hint="rename the recipe, or move that file")


def _read(path: Path, required: bool) -> dict[str, Any] | None:
    """Read a lock; one that is of no use is None, unless it is required."""
    again = "run without --locked to write it"
    try:
        lock = read_json(path)
        shapes = (("name", str), ("tool", dict), ("sources", dict), ("steps", dict))
        if lock.get("schema") != SCHEMA:
            raise CheckpointError(f"unknown schema {lock.get('schema')!r}")
        wrong = next((name for name, kind in shapes if not isinstance(lock.get(name), kind)), None)
        if wrong is not None:
            raise CheckpointError(f"{wrong} is {lock.get(wrong)!r}")
        if not all(isinstance(entry, dict) for part in ("sources", "steps") for entry in lock[part].values()):
            raise CheckpointError("a source or step is not an object")
    except (CheckpointError, OSError) as error:
        if not required:
            return None
        if not path.exists():
            raise UsageError(f"{path}: lock not found", hint=again) from error
        raise UsageError(f"{path}: is not a lock of adaptkit ({error})", hint=again) from error
    return lock


def _json(value: Any) -> Any:
    """As it is after it was written and read."""
    return json.loads(write_json(value))


def _differences(expected: Any, found: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """What differs, in words: the place, what is there, and what the lock has."""
    where = ".".join(key for key in keys if key != "recipe")
    if expected is _ABSENT:
        yield f"{where} is not in the lock"
    elif found is _ABSENT:
        yield f"{where} is in the lock, but not here"
    elif isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted({*expected, *found}):
            yield from _differences(expected.get(key, _ABSENT), found.get(key, _ABSENT), (*keys, key))
    elif expected != found:
        yield f"{where} is {_shown(found)}, but {_shown(expected)} in the lock"


def _shown(value: Any) -> str:
    text = str(value)
    is_hash = len(text) in (40, 64) and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_hash else text if isinstance(value, str) else repr(value)
