"""Where a user's programs keep what they can make again.

$ADAPTKIT_CACHE, or ~/.cache/adaptkit (under $XDG_CACHE_HOME if set); nothing is kept if ADAPTKIT_CACHE is empty
"""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """The folder, which may be emptied anytime and need not exist; None if nothing is to be kept."""
    chosen = os.environ.get("ADAPTKIT_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptkit"
    except RuntimeError:  # nobody's home
        return None
