"""References and files of a repository on the Hub, and their comparison with an artifact.

A tree lists every file with its git sha1; for a large file, that is the sha1 of an LFS pointer, and the tree also has
the content's sha256.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.manifest import FileRecord
from adaptkit.errors import ConflictError, NetworkError, UnsafeInputError, UsageError
from adaptkit.hub.client import SILENCE_S, Hub
from adaptkit.hub.names import is_commit

GITATTRIBUTES = ".gitattributes"
"""A file that the Hub puts into every repository; not part of an artifact unless its manifest lists it."""

FileTree = Mapping[str, RepoFile]
"""The files of a commit, by path."""


@dataclass(frozen=True)
class Content:
    """A file of an artifact: its record, and its path or bytes."""

    record: FileRecord
    source: Path | bytes


@dataclass(frozen=True)
class Repository:
    """A snapshot of a repository's references: name -> commit."""

    repo_id: str
    branches: Mapping[str, str]
    tags: Mapping[str, str]
    private: bool

    def head(self, branch: str, private: bool) -> str:
        """Return the commit to build on: the branch's head, or main's if the branch is absent.

        Args:
            branch: branch to commit to.
            private: whether the repository must be private.

        Raises:
            ConflictError: it must be private but is public.
            UsageError: ``branch`` names a tag, or there is no main.
        """
        if private and not self.private:
            raise ConflictError(
                f"{self.repo_id}: exists and is public", hint="make it private on the Hub first, or leave out --private"
            )
        if branch in self.tags:
            raise UsageError(f"{self.repo_id}: {branch} already names a tag", hint="choose another --branch")
        head = self.branches.get(branch) or self.branches.get("main")
        if head is None:
            raise UsageError(
                f"{self.repo_id}: has no branch main to start from", hint="create main with a first commit"
            )
        return head

    def check_tag(self, tag: str, branch: str, commit: str | None) -> None:
        """Refuse, before anything is sent, a tag that exists on another commit.

        Args:
            tag: the wanted tag.
            branch: branch of the commit, for the message.
            commit: the commit to tag; None if it is yet to be made.

        Raises:
            ConflictError: the tag is on another commit.
            UsageError: ``tag`` names a branch.
        """
        tagged = self.tags.get(tag)
        if tag in self.branches:
            raise UsageError(f"{self.repo_id}: {tag} already names a branch", hint="choose another --tag")
        if tagged is not None and tagged != commit:
            raise ConflictError(
                f"{self.repo_id}: the tag {tag} is on {tagged}, but this artifact would be another commit of {branch}",
                hint="choose another --tag: an existing tag is not moved",
            )


def commit_of(hub: Hub, repo_id: str, revision: str | None, what: str = "") -> str:
    """Ask the Hub for the commit of a revision.

    Args:
        hub: the Hub client.
        repo_id: org/name.
        revision: branch, tag or commit, or None for main.
        what: what is looked up, for error messages; the repository and its revision if empty.

    Raises:
        ConflictError: the revision names both a branch and a tag, of different commits.
        UsageError, AuthenticationError, NetworkError: there is no such revision, or the Hub refused or did not answer.
    """
    if revision and not is_commit(revision):
        refs = hub.ask(what or repo_id, lambda api: api.list_repo_refs(repo_id))
        named = {ref.target_commit for ref in (*refs.branches, *refs.tags) if ref.name == revision}
        if len(named) > 1:
            raise ConflictError(
                f"{repo_id}: {revision} is both a branch and a tag, of different commits",
                hint=f"use the commit instead: {' or '.join(sorted(named))}",
            )
    what = what or (f"{repo_id}@{revision}" if revision else repo_id)
    commit = str(hub.model_info(what, repo_id, revision).sha)
    if not is_commit(commit) or (is_commit(revision or "") and commit != revision):
        raise NetworkError(f"{what}: the Hub answered with the wrong commit {commit!r}", hint="try again later")
    return commit


def look_up(hub: Hub, repo_id: str) -> Repository | None:
    """Read a repository's references; return None if there is no such repository."""

    def read(api: HfApi) -> Repository | None:
        try:
            info = api.model_info(repo_id, timeout=SILENCE_S)
            refs = api.list_repo_refs(repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # 401 or 403: it may exist
                raise
            return None
        return Repository(
            repo_id,
            branches={ref.name: ref.target_commit for ref in refs.branches},
            tags={ref.name: ref.target_commit for ref in refs.tags},
            private=bool(info.private),
        )

    return hub.ask(repo_id, read)


def list_tree(hub: Hub, repo_id: str, commit: str, what: str = "") -> dict[str, RepoFile]:
    """List the files of a commit by path.

    Args:
        hub: the Hub client.
        repo_id: org/name.
        commit: the commit.
        what: what is listed, for error messages; the repository if empty.

    Raises:
        NetworkError: the Hub did not answer, or with a malformed tree.
        UnsafeInputError: a path is invalid.
    """
    entries = hub.once(what or repo_id, lambda api: [*api.list_repo_tree(repo_id, recursive=True, revision=commit)])
    tree = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    for path, file in tree.items():
        if not _is_path(path):
            raise UnsafeInputError(f"{repo_id}: the Hub lists the invalid path {path!r}", hint="do not trust it")
        if type(file.size) is not int:
            raise NetworkError(
                f"{repo_id}: the Hub gives the invalid size {file.size!r} for {path}", hint="try again later"
            )
    return tree


def _is_path(path: object) -> bool:
    """Return whether a path is possible in git and stays inside its folder on every operating system."""
    return (
        isinstance(path, str)
        and path.isprintable()
        and "\\" not in path
        and not {"", ".", "..", ".git"} & set(path.split("/"))
    )


def differences(tree: FileTree, contents: Iterable[Content]) -> tuple[list[str], list[str]]:
    """Compare a tree with the files that it should have.

    Returns:
        The paths to add or replace, and the paths to delete; both sorted.
    """
    wanted = {content.record.path: content for content in contents}
    add = [path for path, content in wanted.items() if path not in tree or not _matches(tree[path], content)]
    return sorted(add), sorted(set(tree) - set(wanted) - {GITATTRIBUTES})


def _matches(remote: RepoFile, content: Content) -> bool:
    """Return whether the Hub has the bytes of a record; for a file in git, its content must still be as recorded."""
    if remote.lfs is not None:
        return bool(remote.size == content.record.size and remote.lfs.sha256 == content.record.sha256)
    if remote.size != content.record.size:
        return False
    data = content.source if isinstance(content.source, bytes) else content.source.read_bytes()
    return git_sha1(data) == remote.blob_id and hashlib.sha256(data).hexdigest() == content.record.sha256


def is_intact(remote: RepoFile, path: Path) -> bool:
    """Return whether a downloaded file has exactly the bytes that the Hub lists."""
    if path.stat().st_size != remote.size:
        return False
    return bool(
        git_sha1(path.read_bytes()) == remote.blob_id if remote.lfs is None else file_sha256(path) == remote.lfs.sha256
    )


def git_sha1(content: bytes) -> str:
    """Return the git blob sha1 of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
