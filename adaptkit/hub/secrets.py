"""Tokens: redacted from messages, and detected in files before publishing.

This module imports little on purpose: the command line redacts every error message and must not import huggingface_hub
for that.
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
"""Minimum length of a secret to search for: a shorter one would match ordinary words."""
_PIECE_BYTES, _OVERLAP_BYTES = 1 << 20, 256


def redact(text: str) -> str:
    """Replace in a text the tokens available to this process, strings that look like tokens, and logins in URLs."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, "(token)")
    return _LOGIN_IN_A_URL.sub("(token)", _LIKE_A_TOKEN.sub("(token)", text))


def looks_like_a_token(text: str) -> bool:
    """Return whether ``redact`` would change a text."""
    return redact(text) != text


def holds_token(source: Path | bytes, limit_bytes: int | None = None) -> bool:
    """Return whether a file holds a token available to this process, or a string that looks like a Hub token.

    Args:
        source: a regular file, read in pieces, or its content.
        limit_bytes: search only this many bytes from the start; the whole file if None.
    """
    secrets, rest = [secret.encode() for secret in _known()], b""
    overlap = max([_OVERLAP_BYTES, *map(len, secrets)])  # a CI job's identity token may be longer than _OVERLAP_BYTES
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
    """Return the tokens in the environment and in the file that huggingface_hub's login writes."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    # os.path, since pathlib raises if there is no home folder.
    file = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token"))
    known = {os.environ.get(name, "").strip() for name in _VARIABLES}
    with contextlib.suppress(OSError):  # a token that cannot be read cannot be printed either
        known.add(file.read_text(errors="replace").strip() if file.is_file() and file.stat().st_size < 1 << 16 else "")
    return {secret for secret in known if len(secret) >= _SHORTEST}
