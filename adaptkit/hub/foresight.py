"""What stands against publishing whatever the artifact is; asked before the work that makes one. Only reads."""

import os
from contextlib import suppress

from adaptkit.checkpoint.signing import check_signer
from adaptkit.errors import AuthenticationError, UsageError
from adaptkit.hub._client import Hub, Note, connect
from adaptkit.hub._errors import LOGIN
from adaptkit.hub._remote import check_repo_id, look_up
from adaptkit.hub.publish import PublishOptions, refuse_absent


def foresee(repo_id: str, options: PublishOptions, note: Note) -> None:
    """Refuse what ``publish`` would refuse if there were an artifact that the repository does not hold yet.

    Whether a repository that is absent may be made under that name is not known before it is.

    Args:
        repo_id: org/name.
        options: branch, tag, visibility, signature.
        note: told what is waited for, and of a tag that only one artifact can have.

    Raises:
        AuthenticationError: no token, or one that may not write; nobody to sign.
        ConflictError: the tag is on a commit that is not the branch's head, or the repository is not private.
        NetworkError: no answer; run it again.
        UsageError: an unusable name or key, or a pull request to a repository that is absent.
    """
    check_repo_id(repo_id)
    if options.signer is not None:
        check_signer(options.signer)
    hub = connect(note)
    repository = look_up(hub, repo_id)
    if repository is None:
        refuse_absent(repo_id, options)
    if repository is None or options.pull_request:
        _check_token(hub, repo_id)
        return
    head = repository.head(options.branch, options.private)
    with suppress(UsageError):  # of a Hub that has no such question: its answer comes with the commit
        hub.ask(repo_id, lambda api: api.auth_check(repo_id, write=True))
    if options.tag is not None:
        repository.check_tag(options.tag, options.branch, head)
        if options.tag in repository.tags:
            note(f"{repo_id} already has the tag {options.tag}; only the same artifact can be published with it")


def _check_token(hub: Hub, repo_id: str) -> None:
    """Refuse to go on without a token, or with one that may write nowhere."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return  # the identity of a CI job, which is nobody's account
    account = hub.ask(repo_id, lambda api: api.whoami())
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AuthenticationError(f"{repo_id}: the token is read-only", hint=LOGIN)
