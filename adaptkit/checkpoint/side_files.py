"""The side files of a checkpoint: what is beside its weights and belongs to them, see ``layout``."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.layout import CONFIG_NAME, INDEX_NAME, NOT_SIDE_PREFIXES, read_small
from adaptkit.errors import CheckpointError, UnsafeInputError

_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""Prefixes of the names of licence files."""
TEMPLATES_FOLDER = "additional_chat_templates"
CODE_SUFFIX = ".py"
READ_SUFFIXES = {".safetensors", *_SIDE_SUFFIXES}
"""Operations read only files with these suffixes and ``side_files`` from a checkpoint's or an adapter's folder.

``adopt`` also reads a model card.
"""
_NAMES_CODE = b'"auto_map"'
_BLOB = re.compile(r"[0-9a-f]{30,64}|[A-Z0-9]+-s\d+--[0-9a-f]{30,64}(\.\w+)*")
"""The name of a file in a cache whose names are hashes (huggingface_hub's, DVC's, git-annex's), to which folders link.
"""


def side_files(root: Path, wanted: Callable[[str], bool] = bool) -> dict[str, Path]:
    """List those of ``find_side_files`` whose names are wanted (by default all), to copy them; all must be files."""
    found = {name: path for name, path in find_side_files(root, lambda p: not p.is_dir()).items() if wanted(name)}
    for path in found.values():
        refuse_foreign_link(root, path)
        check_regular(path)
    return found


def find_side_files(root: Path, is_file: Callable[[Path], bool] = Path.is_file) -> dict[str, Path]:
    """List the files beside the weights: configurations, tokenizer, chat templates, licence, model code.

    Excludes ``config.json`` and index files, which are written together with the weights.

    Returns:
        Maps each name, relative to the folder, to its path; sorted.
    """
    present = [path for path in root.iterdir() if is_file(path)]
    suffixes = {*_SIDE_SUFFIXES, *([CODE_SUFFIX] if _names_code(present) else [])}
    found = {
        path.name: path
        for path in present
        if (path.suffix in suffixes or path.name.startswith(LICENCES))
        and not path.name.startswith(NOT_SIDE_PREFIXES)
        and not path.name.endswith(".index.json")
        and path.name != CONFIG_NAME
    }
    templates = (root / TEMPLATES_FOLDER).glob("*.jinja")
    found |= {f"{TEMPLATES_FOLDER}/{path.name}": path for path in templates if is_file(path)}
    return dict(sorted(found.items()))


def _names_code(files: Iterable[Path]) -> bool:
    """Return whether a configuration among the files has an ``auto_map``, which names classes in .py files."""
    if not any(path.suffix == CODE_SUFFIX for path in files):
        return False
    return any(_NAMES_CODE in read_small(path) for path in files if path.name.endswith("config.json"))


def check_side_files(root: Path) -> None:
    """Reject side files whose names differ only in case, since not every file system can hold both."""
    refuse_foreign_link(root, root / CONFIG_NAME)
    seen: dict[str, str] = {}
    for name in (CONFIG_NAME, INDEX_NAME, *side_files(root)):
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise CheckpointError(
                f"{root}: {other} and {name} differ only in case, so an artifact cannot contain both",
                hint="rename or remove one of them",
            )


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
