"""Translation of huggingface_hub's exceptions to adaptkit's errors.

    401, 403                          AuthenticationError
    404, 410                          UsageError: no such repository, revision or file
    409, 412                          ConflictError: the repository changed meanwhile
    408, 425, 429, 5xx                NetworkError
    no answer, or a malformed one     NetworkError
    another 4xx                       UsageError
    a value that the client refuses   UsageError
    no home folder for its cache      UsageError

The client wraps some causes: a failed upload in a RuntimeError, a failed download in a LocalEntryNotFoundError.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RevisionNotFoundError,
)

# What failed connections raise: httpx's for huggingface_hub 1, httpx2's for huggingface_hub 2.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import DISK_HINTS, AdaptkitError, AuthenticationError, ConflictError, NetworkError, UsageError
from adaptkit.hub.secrets import redact

_InvalidURL = import_module(TransportError.__module__).InvalidURL  # not a subclass of TransportError
_MALFORMED = (LookupError, TypeError, AttributeError)
"""Exceptions of the client if fields are missing in an answer: it does not validate the JSON."""
_TRANSLATED = (TransportError, OSError, ValueError, RuntimeError, OIDCError, *_MALFORMED)
_XET_REFUSAL = re.compile(r"HTTP status client error \((401|403)\b")
_XET_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""The errno in the message of hf_xet's RuntimeError, which has no field for it."""
LOGIN = "set HF_TOKEN, or run `hf auth login`, with a token that has the permission for this"
_SETTINGS = "check HF_ENDPOINT, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE, if they are set"
_AGAIN = "run the same command again; what is done is not repeated"
_TEMPORARY = {408, 425, 429}


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """Translate the errors of client calls; the block must contain nothing else.

    Args:
        what: the repository that the calls are about, for messages.
    """
    try:
        yield
    except _TRANSLATED as error:
        if isinstance(error, NotImplementedError | RecursionError):
            raise
        raise _translated(error, what) from error


@contextmanager
def setting_errors(endpoint: str) -> Iterator[None]:
    """Translate the errors of creating a client from the environment's settings.

    Args:
        endpoint: the Hub's address.
    """
    try:
        if not constants.HF_HUB_OFFLINE and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"{endpoint!r} is not an http or https address")
        yield
    except (*_TRANSLATED, ImportError, _InvalidURL) as error:  # ImportError: socksio, for a SOCKS proxy
        raise UsageError(f"cannot connect to the Hub: {_line(error)}", hint=_SETTINGS) from error


def _translated(error: BaseException, what: str) -> AdaptkitError:
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, what)
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return _translated(error.__cause__, what)
    if isinstance(error, OfflineModeIsEnabled):
        return offline_error(what)
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":  # of a header; the other headers are ASCII
        return AuthenticationError(f"{what}: the token contains invalid characters", hint=LOGIN)
    is_of_xet = isinstance(error, PermissionError) and error.errno is None
    if isinstance(error, LocalTokenNotFoundError | OIDCError) or is_of_xet or _XET_REFUSAL.search(str(error)):
        return AuthenticationError(f"{what}: {_line(error)}", hint=LOGIN)
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, such as in a container
        unknown = "the home folder, in which huggingface_hub keeps its cache, is unknown"
        return UsageError(f"{what}: {unknown}", hint="set HF_HOME to the path of a folder, or set HOME")
    system = _XET_SYSTEM.search(str(error))
    if system and int(system[1]) in {*DISK_HINTS, errno.ENOTDIR}:
        return _of_disk(what, int(system[1]), None)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return _of_disk(what, error.errno, error.filename)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return UsageError(f"{what}: {_line(error)}")
    problem = "malformed" if isinstance(error, _MALFORMED) else _line(error)
    return NetworkError(f"{what}: no usable answer from the Hub: {problem}", hint=_AGAIN)


def offline_error(what: str) -> NetworkError:
    """Return the error for something that is neither cached nor asked for, since offline mode is set."""
    return NetworkError(f"{what}: huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE")


def _of_disk(what: str, number: int, path: object) -> AdaptkitError:
    what_to_do = DISK_HINTS.get(number, "check the disk")
    hint = f"{what_to_do}; then run the same command again (huggingface_hub keeps its own files in HF_HOME)"
    return DiskError(f"{what}: cannot write {path or 'a file'}: {os.strerror(number)}", hint=hint)


def _of_status(error: HfHubHTTPError, what: str) -> AdaptkitError:
    status = error.response.status_code
    answer = f"{what}: the Hub answered {status}: {redact(' '.join((error.server_message or _line(error)).split()))}"
    if isinstance(error, GatedRepoError):
        return AuthenticationError(answer, hint=f"ask for access on the repository's page; then {LOGIN}")
    if status in (401, 403):
        return AuthenticationError(answer, hint=LOGIN)
    if isinstance(error, RevisionNotFoundError):
        return UsageError(answer, hint="use a branch, a tag or a full commit hash of this repository")
    if status in (404, 410):
        return UsageError(answer, hint="check the name; a private repository also needs a token that may read it")
    if status in (409, 412):
        return ConflictError(answer, hint="check what changed in the repository, then run the same command again")
    if status in _TEMPORARY or status >= 500:
        return NetworkError(answer, hint=_AGAIN)
    return UsageError(answer)


def status_of(error: AdaptkitError) -> int | None:
    """Return the HTTP status of the answer behind an error; None if there was no answer."""
    answer = _answer(error)
    return None if answer is None else int(answer.response.status_code)


def retry_after_s(error: AdaptkitError) -> float:
    """Return the seconds that the Hub asked to wait, else 0; for a 429, ``RateLimit`` overrides ``Retry-After``."""
    answer = _answer(error)
    if answer is None:
        return 0.0
    headers = answer.response.headers
    limit = parse_ratelimit_headers(headers) if answer.response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = headers.get("Retry-After", "")
    return float(seconds) if seconds.isdecimal() else 0.0


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, redacted."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0] if lines else type(error).__name__)
