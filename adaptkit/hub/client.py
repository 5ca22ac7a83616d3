"""The Hub's client: its calls, with its exceptions translated, and retries of those that it does not repeat itself.

The client repeats requests of uploads and of listings of files, resumes downloads, and says so in its own log. Other
calls that can be repeated safely are retried here after temporary failures: after half a second, then twice as long
each time, or after the time that the Hub's answer asks for. A commit is not retried this way, see ``commit``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, get_session

import adaptkit
from adaptkit.errors import AdaptkitError, NetworkError
from adaptkit.hub.client_errors import client_errors, retry_after_s, setting_errors

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries."""
_LONGEST_WAIT_S = 60.0
SILENCE_S = 120.0
"""Timeout of a silent connection; the client itself has none."""

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
        with client_errors(what):
            return call(self.api)

    def ask(self, what: str, call: Callable[[HfApi], Answer]) -> Answer:
        """Make an idempotent call, and retry it after temporary failures as often as ``WAITS_S`` says."""
        for wait_s in WAITS_S:
            try:
                return self.once(what, call)
            except NetworkError as error:
                self.wait(error, wait_s)
        return self.once(what, call)

    def wait(self, error: AdaptkitError, wait_s: float) -> None:
        """Wait before a retry, at least as long as the Hub asks; raise the error if that is too long."""
        wait_s = max(wait_s, retry_after_s(error))
        if constants.HF_HUB_OFFLINE or wait_s > _LONGEST_WAIT_S:
            raise error
        self.note(f"{error.message}; trying again in {wait_s:g} s")
        time.sleep(wait_s)

    def model_info(self, what: str, repo_id: str, revision: str | None = None) -> ModelInfo:
        """Fetch a repository's metadata; by default, this call of the client would wait without an end."""
        return self.ask(what, lambda api: api.model_info(repo_id, revision=revision, timeout=SILENCE_S))


def connect(note: Note = no_note) -> Hub:
    """Create a client.

    Raises:
        UsageError: the Hub's address, the proxies or the certificates in the environment are invalid.
    """
    api = HfApi(library_name=adaptkit.__name__, library_version=adaptkit.__version__)
    with setting_errors(api.endpoint):
        get_session()
    return Hub(api, note)
