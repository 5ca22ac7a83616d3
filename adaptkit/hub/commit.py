"""Making one commit, with retries that cannot commit twice.

The client never repeats the request. This module does so only after it has read the repository again:

    412, or the head moved               another commit was made first, unless the head holds exactly what was sent
    409, 429, 5xx, a lost answer         either the commit is at the branch's head, or the head has not moved; then a
                                         retry can at worst be refused as stale, since each request names its parent
    the same for a pull request          no parent protects it: retry only if the Hub said that it refused the request;
                                         after a lost answer, the user has to look whether it was opened
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

from adaptkit.errors import ConflictError, NetworkError
from adaptkit.hub.client import WAITS_S, Hub
from adaptkit.hub.client_errors import status_of
from adaptkit.hub.repository import Content, differences, list_tree, look_up


@dataclass(frozen=True)
class CommitPlace:
    """Where a commit goes: onto ``head`` of the branch, or into a pull request against it."""

    hub: Hub
    repo_id: str
    branch: str
    head: str
    pull_request: bool = False


@dataclass(frozen=True)
class PublishedCommit:
    """A commit on the Hub, and the number of its pull request; None if it is on a branch."""

    oid: str
    pull_request: int | None = None


def send(
    place: CommitPlace, contents: Sequence[Content], added: Sequence[str], deleted: Sequence[str], message: str
) -> PublishedCommit:
    """Make the commit exactly once.

    Args:
        place: where the commit goes.
        contents: all files of the commit.
        added: paths of files to send.
        deleted: paths of files to delete.
        message: commit message.

    Raises:
        ConflictError: the branch moved meanwhile.
        NetworkError: the commit was not made, or that cannot be determined; run it again.
        AuthenticationError, UsageError: the Hub refused.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return _commit(place, contents, added, deleted, message)
        except (NetworkError, ConflictError) as error:
            status = status_of(error)
            if place.pull_request and status not in (409, 412, 429, 503):
                error.advise("look at the repository's pull requests: if this one was opened, nothing is left to do")
                raise
            repository = look_up(place.hub, place.repo_id)
            head = repository.branches.get(place.branch) if repository is not None else None
            if head not in (None, place.head) and _holds(place, str(head), contents):
                return PublishedCommit(str(head))
            if wait_s is None or status == 412:
                raise
            place.hub.wait(error, wait_s)
    raise AssertionError  # the last round returns or raises


def _holds(place: CommitPlace, commit: str, contents: Sequence[Content]) -> bool:
    return differences(list_tree(place.hub, place.repo_id, commit), contents) == ([], [])


def _commit(
    place: CommitPlace, contents: Sequence[Content], added: Sequence[str], deleted: Sequence[str], message: str
) -> PublishedCommit:
    sources: Mapping[str, Content] = {content.record.path: content for content in contents}

    def commit(api: HfApi) -> PublishedCommit:
        made = api.create_commit(
            place.repo_id,
            # Built anew for every try, since the client modifies the operations.
            [CommitOperationAdd(path, sources[path].source) for path in added]
            + [CommitOperationDelete(path, is_folder=False) for path in deleted],
            commit_message=message,
            revision=place.branch,
            parent_commit=place.head,
            create_pr=place.pull_request,
        )
        return PublishedCommit(str(made.oid), made.pr_num)

    with _without_bars():
        return place.hub.once(place.repo_id, commit)


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
