"""The Hub client, and retries of its calls.

Calls that can be repeated safely are retried after temporary failures: after half a second, then twice as long each
time, or after the time that the Hub's answer asks for. The client itself retries some requests; a call in which it has
done so is not retried here. A commit is not retried this way, see ``_commit``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, get_session

import adaptkit
from adaptkit.errors import NetworkError
from adaptkit.hub._errors import hub_errors, is_temporary, retry_after_s, setting_errors

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries."""
_LONGEST_WAIT_S = 60.0
SILENCE_S = 120.0
"""Timeout of a silent connection; the client itself has none."""
_CLIENT_WAITED_S = 10.0
"""If a failed call took longer than this, the client has already retried it."""

_REQUESTS, _DOWNLOADS = "huggingface_hub.utils._http", "huggingface_hub.file_download"
"""The client's loggers that report retries."""
_BROKEN = "Error while downloading"
"""Start of what the client logs if a download breaks off."""

Answer = TypeVar("Answer")
Note = Callable[[str], None]


def no_note(text: str) -> None:
    """Ignore the message."""


@dataclass(frozen=True)
class Hub:
    """The client; it takes the Hub's address and the token from the environment.

    Attributes:
        api: the client.
        note: called with a one-line message when something is waited for or left out.
    """

    api: HfApi
    note: Note = no_note

    def once(self, what: str, call: Callable[[HfApi], Answer]) -> Answer:
        """Make one call of the client, and translate its exceptions.

        Args:
            what: what the call is about, for messages.
            call: makes the call and nothing else.
        """
        get_session().timeout = SILENCE_S
        with hub_errors(what), _noting_retries(lambda text: self.note(f"{what}: {text}")):
            return call(self.api)

    def ask(self, what: str, call: Callable[[HfApi], Answer]) -> Answer:
        """Make an idempotent call, and retry it after temporary failures as often as ``WAITS_S`` says."""
        for wait_s in WAITS_S:
            started = time.monotonic()
            try:
                return self.once(what, call)
            except NetworkError as error:
                if time.monotonic() - started > _CLIENT_WAITED_S:
                    raise
                self.wait(error, wait_s)
        return self.once(what, call)

    def wait(self, error: NetworkError, wait_s: float) -> None:
        """Wait before a retry; raise the error if a retry cannot help or the wait would be too long."""
        asked_s = retry_after_s(error)
        wait_s = max(wait_s, asked_s)
        if not is_temporary(error) or wait_s > _LONGEST_WAIT_S:
            raise error
        self.note(f"{error.message}; trying again in {wait_s:g} s")
        time.sleep(wait_s)


@contextmanager
def _noting_retries(note: Note) -> Iterator[None]:
    """While the block runs, report the client's retries to ``note`` instead of its log, which would show every URL."""

    def tell(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno != logging.WARNING or not (record.name == _REQUESTS or text.startswith(_BROKEN)):
            return True
        if "[Retry " in text:
            note(f"no usable answer from the Hub; {text[0].lower()}{text[1:].rstrip('.')}")
        elif "resume" in text:
            note("the connection broke; the download continues where it stopped")
        return False

    loggers = [logging.getLogger(name) for name in (_REQUESTS, _DOWNLOADS)]
    for logger in loggers:
        logger.addFilter(tell)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(tell)


def model_info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """Fetch a repository's metadata; this call of the client has its own timeout, infinite by default."""
    return api.model_info(repo_id, revision=revision, timeout=SILENCE_S)


def connect(note: Note = no_note) -> Hub:
    """Create a client.

    Raises:
        UsageError: the Hub's address, the proxies or the certificates in the environment are invalid.
    """
    api = HfApi(library_name=adaptkit.__name__, library_version=adaptkit.__version__)
    with setting_errors(api.endpoint):
        get_session()
    return Hub(api, note)
