"""Read-only checks of whether an artifact can be published, made before the work of creating it."""

import os
from contextlib import suppress

from adaptkit.checkpoint.signing import check_signer
from adaptkit.errors import AuthenticationError, UsageError
from adaptkit.hub.client import Hub, Note, connect
from adaptkit.hub.client_errors import LOGIN
from adaptkit.hub.names import check_repo_id
from adaptkit.hub.options import PublishOptions
from adaptkit.hub.publish import refuse_absent
from adaptkit.hub.repository import look_up


def check_publishable(repo_id: str, options: PublishOptions, note: Note) -> None:
    """Refuse what ``publish`` would refuse for an artifact that the repository does not hold yet.

    Whether an absent repository may be created under this name cannot be known before trying.

    Args:
        repo_id: org/name.
        options: branch, tag, visibility, signature.
        note: called with a one-line message before a wait, and if the tag exists already.

    Raises:
        AuthenticationError: there is no token, it may not write, or there is no identity to sign with.
        ConflictError: the tag is on a commit that is not the branch's head, or the repository is not private.
        NetworkError: the Hub did not answer; run it again.
        UsageError: a name or key is invalid, or a pull request is wanted in an absent repository.
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
    with suppress(UsageError):  # a Hub without this endpoint refuses at the commit instead
        hub.ask(repo_id, lambda api: api.auth_check(repo_id, write=True))
    if options.tag is not None:
        repository.check_tag(options.tag, options.branch, head)
        if options.tag in repository.tags:
            note(f"{repo_id} already has the tag {options.tag}; only the same artifact can be published with it")


def _check_token(hub: Hub, repo_id: str) -> None:
    """Refuse a missing or read-only token."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return  # a CI job's identity has no account to ask about
    account = hub.ask(repo_id, lambda api: api.whoami())
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AuthenticationError(f"{repo_id}: the token is read-only", hint=LOGIN)
