"""Names of repositories and revisions on the Hub; nothing here imports its client."""

import re

from adaptkit.errors import UsageError
from adaptkit.hub.secrets import looks_like_a_token

REPO_ID = re.compile(
    r"(?![\w./-]*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII
)
"""``org/name``, as the Hub allows it."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_repo_id(repo_id: str) -> None:
    """Refuse an invalid repository name, or one that contains a token, which must not be sent as a name.

    Raises:
        UsageError: the name is refused.
    """
    if looks_like_a_token(repo_id):
        raise UsageError("the repository's name contains a token", hint="use org/name, and put the token into HF_TOKEN")
    if not REPO_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id or repr(repo_id)}: not the name of a repository", hint="write it as org/name")


def is_commit(revision: str) -> bool:
    """Return whether a revision is a full commit hash."""
    return _COMMIT.fullmatch(revision) is not None
