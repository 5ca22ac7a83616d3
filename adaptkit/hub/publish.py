"""Publish an artifact as one commit that holds exactly what the manifest lists, verify the commit, then tag it.

1. The folder must match its manifest; stray or hidden files such as ``.env`` are refused, and so are tokens in files.
2. Files that the Hub lacks are copied to a private folder, and the copies are compared with the manifest, so that a
   file rewritten meanwhile is not sent under its old hash.
3. One commit is made, which the Hub refuses if the branch has moved meanwhile; see ``commit`` for lost answers.
4. The commit's tree is compared with the manifest; only then is it tagged.
5. On demand, the commit is downloaded into a fresh folder and every byte is compared.

Each step detects what an earlier run did, so the same command can be repeated until it succeeds.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from adaptkit.arguments import AnyPath, as_path, as_text, check_flags, checked_options, path_hint
from adaptkit.checkpoint.integrity import check_artifact, first_problems
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import SIGNATURE_NAME, require_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import check_signer
from adaptkit.errors import AuthenticationError, ConflictError, IntegrityError, NetworkError, UsageError
from adaptkit.hub.card_facts import with_card
from adaptkit.hub.client import Hub, Note, connect, no_note
from adaptkit.hub.client_errors import LOGIN
from adaptkit.hub.commit import CommitPlace, PublishedCommit, send
from adaptkit.hub.names import check_repo_id
from adaptkit.hub.options import PublishOptions, PullOptions
from adaptkit.hub.pull import pull
from adaptkit.hub.repository import Repository, differences, list_tree, look_up
from adaptkit.hub.secrets import redact
from adaptkit.hub.signature import with_signature
from adaptkit.hub.staging import Artifact, gather, refuse_secrets, stage
from adaptkit.machine import processor_count


@dataclass(frozen=True)
class PublishReport:
    """What was published, or would be.

    Attributes:
        repo_id: the repository.
        commit: the commit that holds the artifact, 40 hexadecimal digits; None for a dry run with files to send.
        branch: branch of the commit, or the target of the pull request.
        tag: tag of the commit, if requested.
        pull_request: number of the pull request that holds the commit, or None.
        files_added: new or changed files, sorted.
        files_deleted: files that do not belong to the artifact, sorted.
        bytes_sent: size of the files added, without a signature that a dry run does not make; the Hub may have some of
            the bytes already.
        already_there: whether the Hub had exactly this artifact, so that nothing was sent.
        signed: whether the commit holds a signature.
        checked: whether the commit was downloaded afterwards and verified.
        manifest_sha256: sha256 of the published manifest, which also lists the generated card.
        url: URL of the commit or pull request; of the repository for a dry run.
    """

    repo_id: str
    commit: str | None
    branch: str
    tag: str | None
    pull_request: int | None
    files_added: tuple[str, ...]
    files_deleted: tuple[str, ...]
    bytes_sent: int
    already_there: bool
    signed: bool
    checked: bool
    manifest_sha256: str
    url: str


def publish(
    path: AnyPath,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> PublishReport:
    """Make a branch of a repository hold exactly one artifact.

    Args:
        path: the artifact's folder; nothing in it is changed.
        repo_id: org/name; created if absent.
        options: branch, tag, visibility, signature.
        dry_run: check everything and report what would be sent, but write nothing, locally or on the Hub.
        progress: called with bytes checked, before sending and during the final download.
        note: called with a one-line message before a wait, and about facts that the card lacks.

    Raises:
        IntegrityError: the folder, or the commit on the Hub, does not match the manifest.
        UnsafeInputError: a file is hidden or holds a token, or the Hub lists invalid paths.
        AuthenticationError: there is no token, or its permissions do not suffice.
        ConflictError: the branch moved meanwhile, the tag is on another commit, or the repository is not private.
        NetworkError: the Hub did not answer; run it again.
        UsageError: the path is not a folder, a name is invalid, or a pull request is wanted in an absent repository.
    """
    check_flags(dry_run=dry_run)
    path = as_path(path, "path")
    options = checked_options(options, PublishOptions)
    check_repo_id(as_text(repo_id, "repo_id"))
    manifest = require_manifest(require_folder(path, path_hint))
    check_artifact(path, manifest, processor_count(), progress)
    refuse_secrets(gather(path, manifest))
    hub = connect(note)
    repository = look_up(hub, repo_id)
    artifact = with_card(hub, path, manifest, options.base_model, options.signer is not None)
    if repository is None and options.pull_request:
        problem = f"{repo_id}: repository not found, so no pull request can be opened"
        raise UsageError(problem, hint="check the name, or leave out --pr")
    if repository is None:
        repository = None if dry_run else _create(hub, repo_id, options)
    head = repository.head(options.branch, options.private) if repository is not None else None
    tree = list_tree(hub, repo_id, head) if head else {}
    keyless = options.signer is not None and options.signer.private_key is None
    planned = {SIGNATURE_NAME} if dry_run and keyless else set()  # keyless signatures are logged publicly
    if not planned:
        artifact = with_signature(hub, repo_id, head, tree, artifact, options.signer)
    added, deleted = differences(tree, artifact.contents)
    added, deleted = sorted(planned.union(added)), sorted(set(deleted) - planned)
    is_there = not added and not deleted
    report = PublishReport(
        repo_id=repo_id,
        commit=head if is_there else None,
        branch=options.branch,
        tag=options.tag,
        pull_request=None,
        files_added=tuple(added),
        files_deleted=tuple(deleted),
        bytes_sent=sum(content.record.size for content in artifact.contents if content.record.path in added),
        already_there=is_there,
        signed=bool(planned) or any(content.record.path == SIGNATURE_NAME for content in artifact.contents),
        checked=False,
        manifest_sha256=artifact.manifest.sha256,
        url=redact(f"{hub.api.endpoint}/{repo_id}"),
    )
    if repository is None or head is None:
        return report
    if options.tag is not None:
        repository.check_tag(options.tag, options.branch, report.commit)
    place = CommitPlace(hub, repo_id, options.branch, head, options.pull_request)
    if dry_run:
        return report
    if options.branch not in repository.branches:
        # The commit names its parent, so a branch created meanwhile does no harm.
        hub.ask(repo_id, lambda api: api.create_branch(repo_id, branch=options.branch, revision=head, exist_ok=True))
    made = PublishedCommit(report.commit) if report.commit else _send(place, artifact, report)
    report = _published(report, made, hub)
    if options.tag is not None and repository.tags.get(options.tag) != made.oid:
        _tag(hub, repo_id, options.tag, made.oid)
    if options.check:
        _check(hub, repo_id, made.oid, artifact, progress)
    return replace(report, checked=options.check)


def check_publishable(repo_id: str, options: PublishOptions, note: Note) -> None:
    """Refuse, before the work of making an artifact, what would fail later whatever the repository holds.

    Raises:
        AuthenticationError: there is no token, it is read-only, or there is no identity to sign with.
        NetworkError: the Hub did not answer; run it again.
        UsageError: the key cannot sign.
    """
    if options.signer is not None:
        check_signer(options.signer)
    if os.environ.get("HF_OIDC_RESOURCE"):
        return  # a CI job's identity has no account to ask about
    account = connect(note).ask(repo_id, lambda api: api.whoami())
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise AuthenticationError(f"{repo_id}: the token is read-only", hint=LOGIN)


def _create(hub: Hub, repo_id: str, options: PublishOptions) -> Repository:
    hub.ask(repo_id, lambda api: api.create_repo(repo_id, private=options.private, exist_ok=True))
    repository = look_up(hub, repo_id)
    if repository is None:
        raise NetworkError(f"{repo_id}: created, but the Hub does not find it yet", hint="run the same command again")
    return repository


def _published(report: PublishReport, made: PublishedCommit, hub: Hub) -> PublishReport:
    page = f"tree/{made.oid}" if made.pull_request is None else f"discussions/{made.pull_request}"
    url = redact(f"{hub.api.endpoint}/{report.repo_id}/{page}")
    return replace(report, commit=made.oid, pull_request=made.pull_request, url=url)


def _send(place: CommitPlace, artifact: Artifact, report: PublishReport) -> PublishedCommit:
    """Commit the differences from a private copy, and compare what the Hub then lists with what was sent."""
    with TemporaryDirectory(prefix="adaptkit-publish-") as folder:
        contents = stage(Path(folder), artifact, report.files_added)
        message = f"Publish {report.manifest_sha256}"
        made = send(place, contents, report.files_added, report.files_deleted, message)
        missing, extra = differences(list_tree(place.hub, place.repo_id, made.oid), contents)
    if missing or extra:
        bad = [f"{path} is not as it was sent" for path in missing] + [f"{path} should not be there" for path in extra]
        raise IntegrityError(f"{place.repo_id}@{made.oid}: {first_problems(bad)}", hint="publish it again")
    return made


def _tag(hub: Hub, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit; not with the client's ``exist_ok``, which would silently accept a tag on another commit."""
    try:
        hub.ask(repo_id, lambda api: api.create_tag(repo_id, tag=tag, revision=commit))
    except (ConflictError, NetworkError):
        repository = look_up(hub, repo_id)
        tagged = repository.tags.get(tag) if repository else None
        if tagged is None:
            raise
        if tagged != commit:
            raise ConflictError(
                f"{repo_id}: published as {commit}, but the tag {tag} is on {tagged}", hint="choose another --tag"
            ) from None


def _check(hub: Hub, repo_id: str, commit: str, artifact: Artifact, progress: Progress) -> None:
    """Download the commit into a fresh folder and compare every byte."""
    expected = PullOptions(revision=commit, manifest_sha256=artifact.manifest.sha256)
    with TemporaryDirectory(prefix="adaptkit-check-") as folder:
        pull(repo_id, Path(folder) / "fresh", expected, progress=progress, note=hub.note)
