"""Links from a folder to files elsewhere, which may be secrets."""

import os
import re
from pathlib import Path

from adaptkit.errors import UnsafeInputError

_BLOB = re.compile(r"[0-9a-f]{30,64}|[A-Z0-9]+-s\d+--[0-9a-f]{30,64}(\.\w+)*")
"""The name of a file in a cache whose names are hashes (huggingface_hub's, DVC's, git-annex's), to which folders link.
"""


def refuse_foreign_link(root: Path, path: Path) -> None:
    """Reject a file to copy if it is a link to a file outside its folder, which may be a secret of the user's.

    Raises:
        UnsafeInputError: it is such a link, and leads neither into a cache nor to the file of that name beside weights.
    """
    own, found = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if own.parent.name == "snapshots":  # of a repository in the cache, whose files may have other names on a mirror
        own = own.parents[1]
    is_of_a_checkpoint = found.name == path.name and any(found.parent.glob("*.safetensors"))
    if not (found.is_relative_to(own) or _BLOB.fullmatch(found.name) or is_of_a_checkpoint):
        raise UnsafeInputError(
            f"{path}: leads to {found}, outside its folder", hint="put a copy in its place if you trust this link"
        )
