"""Tokens: kept out of every message, and found in files before they are published.

Light on purpose: the command line redacts whatever it prints about a failure, and must not import the client for that.
"""

import contextlib
import os
import re
import sys
from io import BytesIO
from pathlib import Path

_SHAPE = r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]"
_LIKE_A_TOKEN = re.compile(_SHAPE + "{20,}")
_IN_A_FILE = re.compile((_SHAPE + "{30,}").encode())
"""The Hub's tokens have 34 characters after the prefix."""
_LOGIN_IN_A_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HF_OIDC_ID_TOKEN"),
    *("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ADAPTKIT_KEY_PASSWORD", "WANDB_API_KEY"),
)
_SHORTEST = 8
"""Characters of a secret that is looked for: a shorter one would be found in ordinary words."""
_PIECE_BYTES, _OVERLAP_BYTES = 1 << 20, 256


def redact(text: str) -> str:
    """Replace every token in a text: those that this process could use, what looks like one, and logins in URLs."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, "(token)")
    return _LOGIN_IN_A_URL.sub("(token)", _LIKE_A_TOKEN.sub("(token)", text))


def looks_like_a_token(text: str) -> bool:
    """Whether a text holds what ``redact`` would replace."""
    return redact(text) != text


def holds_token(source: Path | bytes, limit_bytes: int | None = None) -> bool:
    """Whether a file holds a token that this process could use, or what is shaped like one of the Hub's.

    Args:
        source: a regular file, read piece by piece, or its content.
        limit_bytes: how much of it is text, from its start; all if None.
    """
    secrets, rest = [secret.encode() for secret in _known()], b""
    overlap = max([_OVERLAP_BYTES, *map(len, secrets)])  # the identity of a job is longer
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        left = sys.maxsize if limit_bytes is None else limit_bytes
        while piece := file.read(min(_PIECE_BYTES, left)):
            left -= len(piece)
            window = rest + piece
            if _IN_A_FILE.search(window) or any(secret in window for secret in secrets):
                return True
            rest = window[-overlap:]
    return False


def _known() -> set[str]:
    """The tokens in the environment and in the file that huggingface_hub's login keeps."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    # Of os.path, since pathlib raises where nobody has a home.
    file = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token"))
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    with contextlib.suppress(OSError):  # what cannot be read cannot be shown either
        found.add(file.read_text(errors="replace").strip() if file.is_file() and file.stat().st_size < 1 << 16 else "")
    return {secret for secret in found if len(secret) >= _SHORTEST}
