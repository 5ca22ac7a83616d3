"""The client, and patience with the Hub.

What may be asked twice is asked again after a while when the Hub fails in passing: half a second, then twice as long
each time, or what its answer says. The client does the same for some of its requests; a call in which it was
patient already is not repeated. A commit is never simply asked for again, see ``_commit``.
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
from adaptkit.hub._errors import hub_errors, is_passing, retry_after_s, setting_errors

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Between tries."""
_LONGEST_WAIT_S = 60.0
SILENCE_S = 120.0
"""How long a connection may be silent; the client itself would wait for ever."""
_CLIENT_WAITED_S = 10.0
"""After that long in one call, the client has tried itself."""

Answer = TypeVar("Answer")
Note = Callable[[str], None]


def no_note(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Hub:
    """The client; where it goes and with which token is the environment's affair.

    Attributes:
        api: the client.
        note: told in a line for people what is waited for, or left out.
    """

    api: HfApi
    note: Note = no_note

    def once(self, what: str, call: Callable[[HfApi], Answer]) -> Answer:
        """Make a call of the client, with its errors as ours.

        Args:
            what: it is about.
            call: that call and nothing else.
        """
        get_session().timeout = SILENCE_S
        with hub_errors(what), _told(lambda text: self.note(f"{what}: {text}")):
            return call(self.api)

    def ask(self, what: str, call: Callable[[HfApi], Answer]) -> Answer:
        """Make a call that changes nothing when it is repeated, until it succeeds or patience ends."""
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
        """Wait before another try, or raise the error if none would help."""
        asked_s = retry_after_s(error)
        wait_s = max(wait_s, asked_s)
        if not is_passing(error) or wait_s > _LONGEST_WAIT_S:
            raise error
        self.note(f"{error.message}; trying again in {wait_s:g} s")
        time.sleep(wait_s)


@contextmanager
def _told(note: Note) -> Iterator[None]:
    """Say in our way that the client is patient while the block runs; it logs two lines for every try."""

    def tell(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno == logging.WARNING and "[Retry " in text:
            note(f"no usable answer from the Hub; {text[0].lower()}{text[1:].rstrip('.')}")
        return record.levelno != logging.WARNING

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(tell)
    try:
        yield
    finally:
        logger.removeFilter(tell)


def model_info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """Ask what a repository is; for this the client has a patience of its own, which is endless unless told."""
    return api.model_info(repo_id, revision=revision, timeout=SILENCE_S)


def connect(note: Note = no_note) -> Hub:
    """Make a client.

    Raises:
        UsageError: none can be made with the address, the proxies and the certificates that the environment names.
    """
    api = HfApi(library_name=adaptkit.__name__, library_version=adaptkit.__version__)
    with setting_errors(api.endpoint):
        get_session()
    return Hub(api, note)
