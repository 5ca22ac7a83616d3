"""Publish an artifact: one commit that holds exactly what the manifest lists, compared afterwards, then tagged.

1. The folder must be what its manifest says; a stray file, a ``.env`` say, is refused.
2. What the Hub lacks is copied to a private folder and the copy compared with the manifest, so that a file rewritten
   meanwhile cannot be sent under a hash that it no longer has.
3. One commit, which the Hub refuses if the branch has moved since it was looked at. If the answer is lost, the branch
   says whether the commit landed.
4. The commit's tree is compared with the manifest; only then is it tagged.

Each step finds what an earlier run did, so that the same command can be run until it succeeds.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import ConflictError, IntegrityError, NetworkError, UsageError
from adaptkit.hub._errors import hub_errors
from adaptkit.hub._remote import Content, Repository, check_repo_id, client, differences, list_tree, look_up
from adaptkit.hub._staging import Artifact, stage, with_card

_REF = re.compile(r"(?!refs/|-)(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)))[\w./+@-]*[\w+@-]", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PublishOptions:
    """Where in the repository, and what to make if it is absent.

    Attributes:
        branch: to commit to; made from main if absent.
        tag: for the commit.
        private: who may see a repository that is created; an existing public one is then refused.
    """

    branch: str = "main"
    tag: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and (not _REF.fullmatch(name) or _COMMIT.fullmatch(name)):
                raise UsageError(f"{name!r} cannot be the name of a {kind}", hint="try one like v1.0")
        if self.tag == self.branch:
            raise UsageError(f"{self.tag!r} cannot be both branch and tag", hint="choose another --tag")


@dataclass(frozen=True)
class PublishReport:
    """What was published, or would be.

    Attributes:
        repo_id: the repository.
        commit: that holds the artifact, 40 hexadecimal digits; None for a dry run with something to send.
        branch: of the commit.
        tag: of the commit, if asked for.
        files_added: new or changed, sorted.
        files_deleted: that are no part of the artifact, sorted.
        bytes_sent: size of the files added; the Hub may know some of the bytes already.
        already_there: the branch held exactly this artifact, and nothing was sent.
        manifest_sha256: of the published manifest, which lists the generated card too.
        url: of the commit, or of the repository for a dry run.
    """

    repo_id: str
    commit: str | None
    branch: str
    tag: str | None
    files_added: tuple[str, ...]
    files_deleted: tuple[str, ...]
    bytes_sent: int
    already_there: bool
    manifest_sha256: str
    url: str


@dataclass(frozen=True)
class _Target:
    """Where a commit goes: on top of ``head``."""

    api: HfApi
    repo_id: str
    branch: str
    head: str


def publish(
    path: Path,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> PublishReport:
    """Make a branch of a repository hold exactly one artifact.

    Args:
        path: the artifact's folder; nothing in it is changed.
        repo_id: org/name; created if absent.
        options: branch, tag, visibility.
        dry_run: check everything and say what would be sent; write nothing here or there.
        progress: told of bytes checked before anything is sent.

    Raises:
        IntegrityError: the folder, or what arrived on the Hub, is not what the manifest says.
        AuthenticationError: no token, or one that may not do this.
        ConflictError: the branch moved meanwhile, the tag is on another commit, or the repository is not private.
        NetworkError: no answer; run it again.
        UsageError: not a folder, or an unusable name.
    """
    options = options or PublishOptions()
    check_repo_id(repo_id)
    manifest = require_manifest(require_folder(path))
    check_artifact(path, manifest, os.cpu_count() or 1, progress)
    artifact = with_card(path, manifest)
    api = client()
    repository = look_up(api, repo_id)
    if repository is None and not dry_run:
        repository = _create(api, repo_id, options.private)
    head = _head(repository, options, repo_id)
    added, deleted = differences(list_tree(api, repo_id, head) if head else {}, artifact.contents)
    report = PublishReport(
        repo_id=repo_id,
        commit=None if added or deleted else head,
        branch=options.branch,
        tag=options.tag,
        files_added=tuple(added),
        files_deleted=tuple(deleted),
        bytes_sent=sum(content.record.size for content in artifact.contents if content.record.path in added),
        already_there=not added and not deleted,
        manifest_sha256=artifact.manifest.sha256,
        url=f"{api.endpoint}/{repo_id}",
    )
    if repository is not None:
        _check_tag(repository, report)
    if dry_run or repository is None or head is None:
        return report
    commit = _commit(_Target(api, repo_id, options.branch, head), repository, artifact, report)
    if options.tag is not None:
        _tag(api, repo_id, options.tag, commit)
    return replace(report, commit=commit, url=f"{api.endpoint}/{repo_id}/tree/{commit}")


def _create(api: HfApi, repo_id: str, private: bool) -> Repository:
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
    repository = look_up(api, repo_id)
    if repository is None:
        raise NetworkError(f"{repo_id}: created, but the Hub does not find it yet", hint="run the same command again")
    return repository


def _head(repository: Repository | None, options: PublishOptions, repo_id: str) -> str | None:
    """The commit to build on; None if there is no repository yet."""
    if repository is None:
        return None
    if options.private and not repository.private:
        raise ConflictError(
            f"{repo_id}: exists and is public", hint="make it private on the Hub first, or leave out --private"
        )
    if options.branch in repository.tags:
        raise UsageError(f"{repo_id}: {options.branch} is a tag there", hint="choose another --branch")
    head = repository.branches.get(options.branch) or repository.branches.get("main")
    if head is None:
        raise UsageError(f"{repo_id}: has no branch main to begin with", hint="commit something to it once")
    return head


def _check_tag(repository: Repository, report: PublishReport) -> None:
    """A tag that exists may only be on the very commit that is there already; better to know before sending."""
    found = repository.tags.get(report.tag) if report.tag else None
    if report.tag in repository.branches:
        raise UsageError(f"{report.repo_id}: {report.tag} is a branch there", hint="choose another --tag")
    if found is not None and found != report.commit:
        raise ConflictError(
            f"{report.repo_id}: the tag {report.tag} is on {found}, which is not this artifact at the head of "
            f"{report.branch}",
            hint="choose another --tag; a tag that others may rely on is not moved",
        )


def _commit(target: _Target, repository: Repository, artifact: Artifact, report: PublishReport) -> str:
    """Send what is missing, remove what is stale, and compare; returns the commit."""
    if report.already_there:
        _ensure_branch(target, repository)
        return target.head
    with TemporaryDirectory(prefix="adaptkit-publish-") as folder:
        contents = stage(Path(folder), artifact, report.files_added)
        _ensure_branch(target, repository)
        commit = _send(target, contents, report)
        missing, extra = differences(list_tree(target.api, target.repo_id, commit), contents)
    if missing or extra:
        told = [f"{path} is not there as it was sent" for path in missing] + [f"{path} is extra" for path in extra]
        raise IntegrityError(f"{target.repo_id}@{commit}: {'; '.join(told[:5])}", hint="publish it again")
    return commit


def _ensure_branch(target: _Target, repository: Repository) -> None:
    if target.branch not in repository.branches:
        with hub_errors(target.repo_id):
            target.api.create_branch(target.repo_id, branch=target.branch, revision=target.head)


def _send(target: _Target, contents: tuple[Content, ...], report: PublishReport) -> str:
    """Make the commit. The client never repeats this request, so a lost answer is looked for on the branch."""
    sources = {content.record.path: content.source for content in contents}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    with hub_errors(target.repo_id):
        operations += [CommitOperationAdd(path, sources[path]) for path in report.files_added]
        operations += [CommitOperationDelete(path, is_folder=False) for path in report.files_deleted]
    try:
        with hub_errors(target.repo_id):
            made = target.api.create_commit(
                target.repo_id,
                operations,
                commit_message=f"Publish {report.manifest_sha256}",
                revision=target.branch,
                parent_commit=target.head,
            )
        return str(made.oid)
    except NetworkError:
        landed = _landed(target, contents)
        if landed is None:
            raise
        return landed


def _landed(target: _Target, contents: tuple[Content, ...]) -> str | None:
    """The branch's head, if it holds exactly what was to be sent."""
    try:
        repository = look_up(target.api, target.repo_id)
        head = repository.branches.get(target.branch) if repository else None
        if head is None or head == target.head:
            return None
        return head if differences(list_tree(target.api, target.repo_id, head), contents) == ([], []) else None
    except NetworkError:
        return None


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit. The client's own ``exist_ok`` would silently leave a tag on another commit."""
    try:
        with hub_errors(repo_id):
            api.create_tag(repo_id, tag=tag, revision=commit)
    except (ConflictError, NetworkError):
        repository = look_up(api, repo_id)
        found = repository.tags.get(tag) if repository else None
        if found is None:
            raise
        if found != commit:
            raise ConflictError(
                f"{repo_id}: {commit} is published, but the tag {tag} is on {found}", hint="choose another --tag"
            ) from None
