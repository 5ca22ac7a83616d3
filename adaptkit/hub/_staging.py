"""What is to be published, and the private copy that it is sent from."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from adaptkit.checkpoint.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.layout import CONFIG_NAME, read_json, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import IntegrityError
from adaptkit.hub._remote import Content
from adaptkit.hub.card import CARD_NAME, make_card


@dataclass(frozen=True)
class Artifact:
    """Everything that a branch is to hold.

    Attributes:
        root: the folder that it comes from.
        manifest: as published.
        contents: the files of the manifest, and the manifest.
    """

    root: Path
    manifest: Manifest
    contents: tuple[Content, ...]


def with_card(root: Path, manifest: Manifest) -> Artifact:
    """Add a model card to an artifact that has none; in memory, the folder stays as it is."""
    contents = [Content(record, resolve_inside(root, record.path)) for record in manifest.files]
    names = {record.path.casefold() for record in manifest.files}
    if CARD_NAME.casefold() not in names:
        config_name = ADAPTER_CONFIG_NAME if manifest.kind == "adapter" else CONFIG_NAME
        config = read_json(root / config_name) if config_name in names else {}
        card = _in_memory(CARD_NAME, make_card(manifest, config).encode())
        contents.append(card)
        manifest = replace(manifest, files=(*manifest.files, card.record))
    contents.append(_in_memory(MANIFEST_NAME, manifest.to_bytes()))
    return Artifact(root, manifest, tuple(contents))


def stage(folder: Path, artifact: Artifact, names: Collection[str]) -> tuple[Content, ...]:
    """Copy files that are to be sent, and compare the copies with their records.

    Args:
        folder: empty and nobody else's.
        artifact: where from.
        names: paths of the files.

    Returns:
        The artifact's contents, those in ``names`` with their bytes in the folder or in memory.

    Raises:
        IntegrityError: a file changed while it was copied.
        DiskError: there is no space for the copy.
    """
    wanted = [content for content in artifact.contents if content.record.path in names]
    _check_space(folder, sum(content.record.size for content in wanted if isinstance(content.source, Path)))
    return tuple(_copied(folder, artifact, item) if item in wanted else item for item in artifact.contents)


def _copied(folder: Path, artifact: Artifact, content: Content) -> Content:
    if isinstance(content.source, bytes):
        return content
    copy = resolve_inside(folder, content.record.path)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content.source, copy)  # never a link: whoever writes to the original must not reach the copy
    except OSError as error:
        raise DiskError(f"{content.record.path}: cannot be copied: {error.strerror}", hint=_SPACE) from error
    problem = file_problem(folder, content.record)
    if problem:
        raise IntegrityError(
            f"{artifact.root}: {problem} while it was being published", hint="publish it when nothing writes to it"
        )
    return replace(content, source=copy)


def _in_memory(name: str, content: bytes) -> Content:
    return Content(FileRecord(name, len(content), sha256(content).hexdigest()), content)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DiskError(f"the copy to publish from needs {needed_bytes} bytes, and {free_bytes} are free", hint=_SPACE)


_SPACE = "let TMPDIR name a folder on a disk with more space"
