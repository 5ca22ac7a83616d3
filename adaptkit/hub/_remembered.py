"""Cache of results that take seconds to compute, in the user's cache folder, which may be emptied at any time.

answers/<sha256 of the question>.json

The folder is $ADAPTKIT_CACHE, or else ~/.cache/adaptkit (under $XDG_CACHE_HOME if set). If ADAPTKIT_CACHE is set but
empty, nothing is cached.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import read_small, resolve_inside
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import AdaptkitError


class CachedAnswer:
    """The cache entry of one question.

    Args:
        question: everything that the answer depends on, as JSON; None disables the cache.

    Attributes:
        name: relative path of the entry's file, derived from the question.
    """

    def __init__(self, question: Any) -> None:
        folder = _cache_folder() if question is not None else None
        text = json.dumps(question, sort_keys=True)
        self.name = f"answers/{hashlib.sha256(text.encode()).hexdigest()}.json"
        self._path: Path | None = None
        with contextlib.suppress(AdaptkitError):  # the path has a link to something other than a file
            self._path = resolve_inside(folder, self.name) if folder else None

    def read(self) -> dict[str, Any] | None:
        """Return the answer; None if it is not cached or cannot be read."""
        if self._path is None:
            return None
        try:
            answer = json.loads(read_small(self._path))
        except (OSError, ValueError, RecursionError, AdaptkitError):
            return None
        return answer if isinstance(answer, dict) else None

    def keep(self, answer: Mapping[str, Any]) -> None:
        """Store the answer atomically; does nothing if it cannot be written."""
        if self._path is not None:
            with contextlib.suppress(OSError, AdaptkitError):
                replace_file(self._path, json.dumps(answer).encode())


def _cache_folder() -> Path | None:
    """Return the cache folder, which may not exist; None if nothing is to be cached."""
    chosen = os.environ.get("ADAPTKIT_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptkit"
    except RuntimeError:  # the user has no home folder
        return None
