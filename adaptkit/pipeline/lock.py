"""``recipe.lock``: records by hash what a recipe's sources and steps were when it was run.

    schema    2
    tool      {name, version}
    name      of the release
    sources   name -> {path | repo, revision, commit} and {sha256 | manifest_sha256, tensors_root | files: their sha256}
    steps     name -> {recipe: the step as written, key, outputs: {name: manifest_sha256}}

JSON with sorted keys, without times, absolute paths or other values specific to a run: the same inputs give the same
bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import adaptkit
from adaptkit.checkpoint.integrity import first_problems
from adaptkit.checkpoint.layout import read_json, read_small, write_json
from adaptkit.checkpoint.place import require_writable_parent
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import CheckpointError, DriftError, UsageError
from adaptkit.hub.names import is_commit
from adaptkit.pipeline.recipe import Recipe, Source

SCHEMA = 2
_ABSENT: Any = object()


def lock_path(recipe: Path) -> Path:
    """Return the path of a recipe's lock: the recipe's with the suffix ``.lock``.

    Raises:
        UsageError: the recipe itself has this suffix.
    """
    lock = recipe.with_suffix(".lock")
    if lock == recipe:
        raise UsageError(
            f"{recipe}: its lock would have the same name", hint="rename the recipe so that it ends in .yaml"
        )
    return lock


class Lock:
    """The lock of this run, which is filled while it runs; with ``--locked``, it must equal the existing lock.

    Args:
        recipe: being run.
        enforced: whether any difference from the existing lock is an error.

    Raises:
        UsageError: the lock is enforced, but missing or malformed; or its path is taken by a file that is
            not a lock, or cannot be written.
        DriftError: the lock is enforced, but belongs to another recipe.
    """

    def __init__(self, recipe: Recipe, enforced: bool) -> None:
        self._path = lock_path(recipe.path)
        self._before = _read(self._path, enforced)
        if self._before is None:
            _require_ours(self._path)
            real = Path(os.path.realpath(self._path))
            require_writable_parent(real, "copy the recipe and its files to a folder that you may write to")
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
        """Return the commit that the existing lock names for a repository; None if it has none for this revision."""
        entry = (self._before or {}).get("sources", {}).get(source.name, {})
        is_same = all(entry.get(key) == value for key, value in source.entry().items())
        commit = entry.get("commit")
        return commit if is_same and isinstance(commit, str) and is_commit(commit) else None

    def files(self, source: Source) -> set[str]:
        """Return the files that the existing lock lists for a repository at its commit; empty if it lists none."""
        entry = (self._before or {}).get("sources", {}).get(source.name, {})
        files = entry.get("files") if self.commit(source) is not None else None
        return set(files) if isinstance(files, dict) else set()

    def add(self, found: Any, *keys: str) -> None:
        """Record a value at the path ``keys``.

        Raises:
            DriftError: the enforced lock has another value there.
        """
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = found
        if self._expected is not None:
            expected: Any = self._expected
            for key in keys:
                expected = expected.get(key, _ABSENT) if isinstance(expected, Mapping) else _ABSENT
            self._require_equal(expected, found, keys)

    def require_whole(self) -> None:
        """Check that this lock equals the enforced one, after all steps; finds entries that no step added.

        Raises:
            DriftError: names the differences.
        """
        self._require_equal(self._expected, _json(self.content))

    def write(self) -> bool:
        """Write the lock, and return whether its content changed."""
        content = write_json(self.content)
        try:
            if self._path.read_bytes() == content:
                return False
        except OSError:
            pass
        replace_file(Path(os.path.realpath(self._path)), content)  # a link stays one
        return True

    def _check_recipe(self, recipe: Recipe, expected: Mapping[str, Any]) -> None:
        """Compare the recipe with the enforced lock, as far as possible before sources are read."""
        found = {
            "name": recipe.name,
            "tool": self.content["tool"],
            "sources": {name: source.entry() for name, source in recipe.sources.items()},
            "steps": {name: {"recipe": _json(step.entry)} for name, step in recipe.steps.items()},
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
        self._require_equal(known, found)

    def _require_equal(self, expected: Any, found: Any, keys: tuple[str, ...] = ()) -> None:
        if differences := list(_differences(expected, found, keys)):
            raise DriftError(
                f"{self._path}: {first_problems(differences)}",
                hint="run without --locked to accept this, and review what changes in the lock",
            )


def _require_ours(path: Path) -> None:
    """Reject a file that is not a lock of adaptkit; accept an empty file, and one with git's conflict markers."""
    try:
        content = read_small(path) if path.exists() else b""
        found = json.loads(content) if content.strip() and b"<<<<<<<" not in content else {}
    except OSError:
        return  # writing the lock will report the error
    except (CheckpointError, ValueError, RecursionError):
        found = None
    if found not in ([], {}) and not (isinstance(found, dict) and {"schema", "tool", "sources", "steps"} & set(found)):
        raise UsageError(f"{path}: is not a lock of adaptkit", hint="rename the recipe, or move that file")


def _read(path: Path, required: bool) -> dict[str, Any] | None:
    """Read a lock. If it is missing or malformed, return None, or raise UsageError if it is required."""
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
        hint = f"restore it, or move it and {again}"
        raise UsageError(f"{path}: is not a lock of adaptkit ({error})", hint=hint) from error
    return lock


def _json(value: Any) -> Any:
    """Return the value as it is after being written to JSON and read back."""
    return json.loads(write_json(value))


def _differences(expected: Any, found: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Describe each difference in words: its path, the value found, and the lock's value."""
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
