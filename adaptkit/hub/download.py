"""Download: an artifact with its manifest, verified before it appears; or any checkpoint into the Hub's cache.

The client compares sizes only. ``pull`` therefore trusts nothing but the manifest's hashes: every file arrives in
``<out>.partial/.download/``, is compared there, and moves beside the others only when it is right.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from adaptkit.checkpoint.integrity import check_tensors, file_problem
from adaptkit.checkpoint.journal import JOURNAL_NAME, Output, check_output
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import IntegrityError, UnsafeInputError, UsageError
from adaptkit.hub._errors import hub_errors
from adaptkit.hub._remote import Content, RemoteFile, check_repo_id, client, list_tree, matches

_DOWNLOADS = ".download"
_SOURCE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./+-]+))?", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE", "NOTICE"]
# Checkpoints lie at the root; below it are other formats' copies of the same weights, as consolidated files are.
_UNWANTED = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class PullReport:
    """What arrived, every byte of it verified.

    Attributes:
        repo_id: the repository.
        commit: it came from, 40 hexadecimal digits.
        output: folder.
        files: besides the manifest.
        bytes: in them.
        kind: of artifact.
        manifest_sha256: names the artifact; compare it with one from a source that you trust.
        tensors_root: binds its tensors.
    """

    repo_id: str
    commit: str
    output: str
    files: int
    bytes: int
    kind: str
    manifest_sha256: str
    tensors_root: str


def pull(
    repo_id: str,
    output: Path,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> PullReport:
    """Download an artifact and verify it before it appears.

    Args:
        repo_id: org/name.
        output: folder to make; a killed run goes on where it stopped.
        revision: branch, tag or commit; main if None.
        force: replace an existing output that adaptkit made.
        progress: told of bytes that arrived and are right.

    Raises:
        IntegrityError: there is no manifest, or something is not what it says.
        UnsafeInputError: the manifest names files that no artifact has.
        OutputExistsError: the output exists.
        AuthenticationError, NetworkError, UsageError: the Hub refused, did not answer, or has no such revision.
    """
    check_repo_id(repo_id)
    check_output(output, force)
    api = client()
    with hub_errors(f"{repo_id}@{revision}" if revision else repo_id):
        commit = str(api.model_info(repo_id, revision=revision).sha)
    tree = list_tree(api, repo_id, commit)
    manifest = _fetch_manifest(api, repo_id, commit, tree)
    _check_records(manifest, repo_id)
    _check_tree(manifest, tree, repo_id)
    with Output(output, [repo_id, commit, manifest.sha256], force) as out:
        _fetch_files(out, api, repo_id, commit, manifest, progress)
        check_tensors(out.folder, manifest)
        out.publish(manifest)
    return PullReport(
        repo_id=repo_id,
        commit=commit,
        output=str(output),
        files=len(manifest.files),
        bytes=sum(record.size for record in manifest.files),
        kind=manifest.kind,
        manifest_sha256=manifest.sha256,
        tensors_root=manifest.tensors_root,
    )


def resolve_source(text: str) -> Path:
    """Turn what a command line names into a local folder.

    Args:
        text: a local path, or ``org/name[@revision]``, which is downloaded into huggingface_hub's cache. A local path
            that exists goes first.

    Raises:
        UsageError: neither.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    path = Path(text)
    named = _SOURCE.fullmatch(text)
    if os.path.exists(path):  # Path.exists raises where a name is too long
        return path
    if named is None:
        raise UsageError(f"{text}: does not exist", hint="give a local folder, or org/name[@revision] on the Hub")
    with hub_errors(f"{text}: no such folder here, and on the Hub"):
        return Path(
            snapshot_download(
                named[1],
                revision=named[2],
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                library_name="adaptkit",
            )
        )


def resolve_config(text: str) -> Path:
    """As ``resolve_source``, but of a repository only ``config.json`` is downloaded.

    Raises:
        UsageError: neither a local folder nor a repository.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    named = _SOURCE.fullmatch(text)
    if os.path.exists(text) or named is None:
        return resolve_source(text)
    with hub_errors(f"{text}: no such folder here, and on the Hub"):
        return Path(hf_hub_download(named[1], "config.json", revision=named[2], library_name="adaptkit")).parent


def _fetch_manifest(api: HfApi, repo_id: str, commit: str, tree: Mapping[str, RemoteFile]) -> Manifest:
    """Download the manifest, and compare it with the Hub's own hash of it: nothing else vouches for it."""
    if MANIFEST_NAME not in tree:
        raise IntegrityError(
            f"{repo_id}@{commit}: there is no {MANIFEST_NAME}, so nothing says what it should hold",
            hint=f"give {repo_id} itself to the command that reads it, or download it with `hf download {repo_id}`",
        )
    with TemporaryDirectory(prefix="adaptkit-pull-") as folder:
        content = _download(api, repo_id, commit, MANIFEST_NAME, Path(folder)).read_bytes()
    record = FileRecord(MANIFEST_NAME, len(content), sha256(content).hexdigest())
    if not matches(tree[MANIFEST_NAME], Content(record, content)):
        raise IntegrityError(
            f"{repo_id}@{commit}: {MANIFEST_NAME} was damaged on the way", hint="run the same command again"
        )
    return Manifest.from_bytes(content)


def _check_records(manifest: Manifest, repo_id: str) -> None:
    """Refuse what would get in the way of the download itself; ``Manifest`` refuses paths out of the folder."""
    for record in manifest.files:
        if "/" in record.path or record.path in (JOURNAL_NAME, _DOWNLOADS, ".cache"):
            raise UnsafeInputError(
                f"{repo_id}: the manifest lists {record.path!r}, which no artifact has", hint="do not trust it"
            )
        if type(record.size) is not int or record.size < 0:
            raise IntegrityError(f"{repo_id}: the manifest gives {record.path} a size of {record.size!r}")


def _check_tree(manifest: Manifest, tree: Mapping[str, RemoteFile], repo_id: str) -> None:
    """Compare what the Hub says of its files with the manifest, before gigabytes are fetched in vain."""
    for record in manifest.files:
        remote = tree.get(record.path)
        if remote is None:
            raise IntegrityError(f"{repo_id}: {record.path} is in the manifest but not in the repository", hint=_AGAIN)
        if remote.size != record.size or remote.sha256 not in (None, record.sha256):
            raise IntegrityError(f"{repo_id}: {record.path} is not the file that the manifest lists", hint=_AGAIN)


def _fetch_files(out: Output, api: HfApi, repo_id: str, commit: str, manifest: Manifest, progress: Progress) -> None:
    total, done = sum(record.size for record in manifest.files), 0
    for record in manifest.files:
        # An earlier run's file is read again: the journal says that it was right, not that it still is.
        if not (out.finished(record.path) and not file_problem(out.folder, record)):
            arrived = _download(api, repo_id, commit, record.path, out.folder / _DOWNLOADS)
            problem = file_problem(arrived.parent, record)
            if problem:
                arrived.unlink()  # or the next run would find it and believe it
                raise IntegrityError(
                    f"{repo_id}@{commit}: {problem}; it was damaged on the way, or is not what was published",
                    hint="run the same command again",
                )
            os.replace(arrived, out.folder / record.path)
            out.add(record, [tensor for tensor in manifest.tensors if tensor.file == record.path])
        done += record.size
        progress(done, total)


def _download(api: HfApi, repo_id: str, commit: str, name: str, folder: Path) -> Path:
    """Download one file. The shared cache is left out: what is wrong in it would be taken for the Hub's."""
    with hub_errors(f"{repo_id}@{commit}: {name}"):
        return Path(
            hf_hub_download(
                repo_id,
                name,
                revision=commit,
                local_dir=folder,
                cache_dir=folder / ".cache" / "hub",
                endpoint=api.endpoint,
                library_name="adaptkit",
            )
        )


_AGAIN = "ask whoever published it to publish it again"
