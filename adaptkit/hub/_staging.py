"""What is to be published, and the private copy that it is sent from."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.layout import CARD_NAME, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import IntegrityError, UnsafeInputError
from adaptkit.hub._remote import GITATTRIBUTES, Content
from adaptkit.hub.secrets import holds_token


@dataclass(frozen=True)
class Artifact:
    """Everything that a branch is to hold.

    Attributes:
        root: the folder that it comes from.
        manifest: as published.
        contents: the files of the manifest, the manifest, and its signature if there is one.
    """

    root: Path
    manifest: Manifest
    contents: tuple[Content, ...]


def has_card(manifest: Manifest) -> bool:
    """Whether an artifact brings its own card."""
    return CARD_NAME.casefold() in {record.path.casefold() for record in manifest.files}


def gather(root: Path, manifest: Manifest, card: str | None = None) -> Artifact:
    """List what a branch is to hold.

    Args:
        root: the artifact's folder, which stays as it is.
        manifest: its manifest.
        card: to add to it; None for an artifact that has one.
    """
    contents = [Content(record, resolve_inside(root, record.path)) for record in manifest.files]
    if card is not None:
        contents.append(in_memory(CARD_NAME, card.encode()))
        manifest = replace(manifest, files=tuple(content.record for content in contents))
    contents.append(in_memory(MANIFEST_NAME, manifest.to_bytes()))
    return Artifact(root, manifest, tuple(contents))


def refuse_secrets(artifact: Artifact) -> None:
    """Refuse an artifact with a file that is hidden, as ``.env`` is, or that holds a token; weights are no text.

    Raises:
        UnsafeInputError: names the file, and shows nothing of it.
    """
    for content in artifact.contents:
        path = content.record.path
        if any(part.startswith(".") for part in path.split("/")) and path != GITATTRIBUTES:
            raise UnsafeInputError(
                f"{artifact.root}: {path} is a hidden file, which no artifact may contain", hint=_NOT_PUBLIC
            )
        if _is_secret(content):
            raise UnsafeInputError(f"{artifact.root}: {path} contains what looks like a Hub token", hint=_NOT_PUBLIC)


def _is_secret(content: Content) -> bool:
    if isinstance(content.source, bytes) or not content.record.path.endswith(".safetensors"):
        return holds_token(content.source)
    with content.source.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return holds_token(content.source, min(8 + header_bytes, content.record.size))


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
            f"{artifact.root}: {problem} while it was being published",
            hint="run the same command again when nothing writes to that folder",
        )
    return replace(content, source=copy)


def in_memory(name: str, content: bytes) -> Content:
    """A file that is in no folder."""
    return Content(FileRecord(name, len(content), sha256(content).hexdigest()), content)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DiskError(
            f"the temporary copy to publish needs {needed_bytes:,} bytes, but only {free_bytes:,} are free", hint=_SPACE
        )


_SPACE = "set TMPDIR to a folder on a disk with more space"
_NOT_PUBLIC = "remove it from the inputs and make the artifact again; if it was a valid token, revoke it"
