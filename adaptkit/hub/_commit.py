"""Making one commit, with retries that cannot commit twice.

The client never repeats the request. This module does so only after it has read the repository again:

    412, or the head moved               another commit was made first, unless the head holds exactly what was sent
    409, 429, 5xx, a lost answer         either the commit is at the branch's head, or the head has not moved; then a
                                         retry can at worst be refused as stale, since each request names its parent
    the same for a pull request          no parent protects it: retry only if the Hub said that it refused the request
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from adaptkit.errors import AdaptkitError, ConflictError, NetworkError
from adaptkit.hub import _client
from adaptkit.hub._client import Hub
from adaptkit.hub._errors import status_of
from adaptkit.hub._remote import Content, Repository, differences, list_tree, look_up

_PULL_REQUESTS = 10
"""Number of latest pull requests that are searched for one that already holds the artifact."""


@dataclass(frozen=True)
class Target:
    """Where a commit goes: onto ``head`` of the branch, or into a pull request against it."""

    hub: Hub
    repo_id: str
    branch: str
    head: str
    pull_request: bool = False


@dataclass(frozen=True)
class Landed:
    """A commit on the Hub, and the number of its pull request; None if it is on a branch."""

    commit: str
    pull_request: int | None = None


def send(
    target: Target, contents: Sequence[Content], added: Sequence[str], deleted: Sequence[str], message: str
) -> Landed:
    """Make the commit exactly once.

    Args:
        target: where the commit goes.
        contents: all files of the commit.
        added: paths of files to send.
        deleted: paths of files to delete.
        message: commit message.

    Raises:
        ConflictError: the branch moved meanwhile.
        NetworkError: the commit was not made, or that cannot be determined; run it again.
        AuthenticationError, UsageError: the Hub refused.
    """
    for wait_s in (*_client.WAITS_S, None):
        try:
            return _commit(target, contents, added, deleted, message)
        except (NetworkError, ConflictError) as error:
            repository = _look_again(target)
            landed = repository and find(target, repository, contents)
            if landed:
                return landed
            if wait_s is None or repository is None or not _may_repeat(target, repository, error):
                raise
            passing = error if isinstance(error, NetworkError) else NetworkError(error.message, error.hint)
            target.hub.wait(passing, wait_s)
    raise AssertionError  # the last round returns or raises


def find(target: Target, repository: Repository, contents: Sequence[Content]) -> Landed | None:
    """Return the commit with exactly these contents: the branch's new head or, if wanted, an open pull request."""
    head = repository.branches.get(target.branch)
    if head not in (None, target.head) and _holds(target, head, contents):
        return Landed(str(head))
    if not target.pull_request:
        return None
    for number, commit in sorted(repository.pull_requests.items(), reverse=True)[:_PULL_REQUESTS]:
        if _holds(target, commit, contents) and _is_open(target, number):
            return Landed(commit, number)
    return None


def opened_meanwhile(target: Target, before: Repository, own: Landed, contents: Sequence[Content]) -> int | None:
    """Return the number of another open pull request with these contents, opened after ``before`` was read; else None.

    Of two runs that open pull requests at the same time, at least the one whose request is the second finds the other.
    """
    now = look_up(target.hub, target.repo_id, pull_requests=True)
    numbers = sorted(set(now.pull_requests if now else ()) - {*before.pull_requests, own.pull_request})
    held = (number for number in numbers if now and _holds(target, now.pull_requests[number], contents))
    return next((number for number in held if _is_open(target, number)), None)


def _commit(
    target: Target, contents: Sequence[Content], added: Sequence[str], deleted: Sequence[str], message: str
) -> Landed:
    sources: Mapping[str, Content] = {content.record.path: content for content in contents}

    def commit(api: HfApi) -> Landed:
        made = api.create_commit(
            target.repo_id,
            # Built anew for every try, since the client modifies the operations.
            [CommitOperationAdd(path, sources[path].source) for path in added]
            + [CommitOperationDelete(path, is_folder=False) for path in deleted],
            commit_message=message,
            revision=target.branch,
            parent_commit=target.head,
            create_pr=target.pull_request,
        )
        return Landed(str(made.oid), made.pr_num)

    with _without_bars():
        return target.hub.once(target.repo_id, commit)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the client's progress bars during the block, unless HF_HUB_DISABLE_PROGRESS_BARS asks for them."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _look_again(target: Target) -> Repository | None:
    """Return the current state of the repository; None if the Hub does not answer."""
    try:
        return look_up(target.hub, target.repo_id, target.pull_request)
    except NetworkError:
        return None


def _may_repeat(target: Target, repository: Repository, error: AdaptkitError) -> bool:
    """Return whether a retry cannot commit twice."""
    if repository.branches.get(target.branch) != target.head or status_of(error) == 412:
        return False
    return not target.pull_request or status_of(error) in (409, 429, 503)


def _holds(target: Target, commit: str | None, contents: Sequence[Content]) -> bool:
    return commit is not None and differences(list_tree(target.hub, target.repo_id, commit), contents) == ([], [])


def _is_open(target: Target, number: int) -> bool:
    details = target.hub.ask(target.repo_id, lambda api: api.get_discussion_details(target.repo_id, number))
    return details.status in ("open", "draft")
