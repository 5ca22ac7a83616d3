"""What huggingface_hub raises, as adaptkit's errors.

    401, 403                          AuthenticationError
    404, 410                          UsageError: no such repository, revision or file
    409, 412                          ConflictError: somebody else was there meanwhile
    408, 425, 429, 5xx                NetworkError
    no answer, or one without what the client looks for in it    NetworkError
    another 4xx, a value the client refuses    UsageError

The client wraps some of these: a failed upload in a RuntimeError, a failed download in a LocalEntryNotFoundError.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What failed connections raise: httpx's for huggingface_hub 1, httpx2's for huggingface_hub 2.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import DISK_HINTS, AdaptkitError, AuthenticationError, ConflictError, NetworkError, UsageError
from adaptkit.hub.secrets import redact

_InvalidURL = import_module(TransportError.__module__).InvalidURL  # which has no parent among the others
_NONSENSE = (LookupError, TypeError, AttributeError)
"""What the client raises when it looks into an answer for what is not there: it takes any JSON for a good one."""
_TRANSLATED = (TransportError, OSError, ValueError, RuntimeError, OIDCError, *_NONSENSE)
_XET_REFUSAL = re.compile(r"HTTP status client error \((401|403)\b")
_XET_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""In a RuntimeError of hf_xet, which has no field for it."""
LOGIN = "set HF_TOKEN, or run `hf auth login`, with a token that has the permission for this"
_SETTINGS = "check HF_ENDPOINT, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE, if they are set"
_AGAIN = "run the same command again; what is done is not repeated"
_PASSING = {408, 425, 429}


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Translate the errors of the client calls inside the block, and of nothing else: put only such calls there.

    Args:
        what: the repository that they are about.
    """
    try:
        yield
    except _TRANSLATED as error:
        if isinstance(error, NotImplementedError | RecursionError):
            raise
        raise _translated(error, what) from error


@contextmanager
def setting_errors(endpoint: str) -> Iterator[None]:
    """Translate the errors of making a client from the environment inside the block.

    Args:
        endpoint: the Hub's address.
    """
    try:
        if not constants.HF_HUB_OFFLINE and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"{endpoint!r} is not an http or https address")
        yield
    except (*_TRANSLATED, ImportError, _InvalidURL) as error:  # that of an import: socksio, for a SOCKS proxy
        raise UsageError(f"cannot connect to the Hub: {_line(error)}", hint=_SETTINGS) from error


def _translated(error: BaseException, what: str) -> AdaptkitError:
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, what)
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return _translated(error.__cause__, what)
    if isinstance(error, OfflineModeIsEnabled):
        return NetworkError(f"{what}: huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, LocalTokenNotFoundError | OIDCError) or (
        isinstance(error, PermissionError) and error.errno is None
    ):
        return AuthenticationError(f"{what}: {_line(error)}", hint=LOGIN)  # the second is hf_xet's
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":  # of a header, and the others are
        return AuthenticationError(f"{what}: the token contains invalid characters", hint=LOGIN)
    if _XET_REFUSAL.search(str(error)):
        return AuthenticationError(f"{what}: {_line(error)}", hint=LOGIN)
    system = _XET_SYSTEM.search(str(error))
    if system and int(system[1]) in {*DISK_HINTS, errno.ENOTDIR}:
        return _of_disk(what, int(system[1]), None)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return _of_disk(what, error.errno, error.filename)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return UsageError(f"{what}: {_line(error)}")
    said = "malformed" if isinstance(error, _NONSENSE) else _line(error)
    return NetworkError(f"{what}: no usable answer from the Hub: {said}", hint=_AGAIN)


def _of_disk(what: str, number: int, path: object) -> AdaptkitError:
    what_to_do = DISK_HINTS.get(number, "check the disk")
    hint = f"{what_to_do}; then run the same command again (huggingface_hub keeps its own files in HF_HOME)"
    return DiskError(f"{what}: cannot write {path or 'a file'}: {os.strerror(number)}", hint=hint)


def _of_status(error: HfHubHTTPError, what: str) -> AdaptkitError:
    status = error.response.status_code
    said = f"{what}: the Hub answered {status}: {redact(' '.join((error.server_message or _line(error)).split()))}"
    if status in (401, 403):
        return AuthenticationError(said, hint=LOGIN)
    if isinstance(error, RevisionNotFoundError):
        return UsageError(said, hint="use a branch, a tag or a full commit hash of this repository")
    if status in (404, 410):
        return UsageError(said, hint="check the name; a private repository also needs a token that may read it")
    if status in (409, 412):
        return ConflictError(said, hint="check what changed in the repository, then run the same command again")
    if status in _PASSING or status >= 500:
        return NetworkError(said, hint=_AGAIN)
    return UsageError(said)


def is_passing(error: AdaptkitError) -> bool:
    """Whether another try may succeed: the Hub said so, or did not answer; being offline on purpose does not pass."""
    return isinstance(error, NetworkError) and not any(
        isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)
    )


def is_no_repository(error: AdaptkitError) -> bool:
    """Whether the Hub has no such repository, as far as it says."""
    return status_of(error) == 404 and any(isinstance(cause, RepositoryNotFoundError) for cause in _causes(error))


def status_of(error: AdaptkitError) -> int | None:
    """The status that the Hub answered with, if an answer is what the error is about."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def retry_after_s(error: AdaptkitError) -> float:
    """How many seconds the Hub asked to wait; 0 if it did not. Who asked too often is told by ``RateLimit`` instead."""
    response = _response(error)
    if response is None:
        return 0.0
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


def _response(error: BaseException | None) -> Any:
    return next((cause.response for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0] if lines else type(error).__name__)
