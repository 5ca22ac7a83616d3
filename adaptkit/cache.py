"""The user's cache folder, for data that can be regenerated.

It is $ADAPTKIT_CACHE, or else ~/.cache/adaptkit (under $XDG_CACHE_HOME if set). If ADAPTKIT_CACHE is set but empty,
nothing is cached.
"""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the cache folder, which may not exist and may be emptied at any time; None if nothing is to be cached."""
    chosen = os.environ.get("ADAPTKIT_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptkit"
    except RuntimeError:  # the user has no home folder
        return None
