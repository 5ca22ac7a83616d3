"""Files of elliptic-curve keys, checked before they sign or verify, and how to make a pair."""

import itertools
import os
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.header import check_regular
from adaptkit.errors import CheckpointError, UsageError

_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def check_private_key(path: Path, password: bytes | None) -> None:
    """Reject a key file that cannot sign, with a message that reveals nothing of its content.

    Raises:
        UsageError: it cannot be read or decrypted, or holds no private key on one of the curves.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path)
    try:
        key = load_pem_private_key(content, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if b"ENCRYPTED" in content:
            raise UsageError(f"{path}: password missing or incorrect", "set ADAPTKIT_KEY_PASSWORD") from error
        if isinstance(error, TypeError):
            raise UsageError(f"{path}: needs no password", hint="unset ADAPTKIT_KEY_PASSWORD") from error
        raise UsageError(f"{path}: contains no private key", hint=_make_a_key()) from error
    _check_curve(path, key)


def check_public_key(path: Path) -> None:
    """Reject a key file that cannot verify.

    Raises:
        UsageError: it cannot be read, or holds no public key on one of the curves.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path}: contains no public key", hint=_make_a_key()) from error
    _check_curve(path, key)


def _check_curve(path: Path, key: Any) -> None:
    curve = getattr(key, "curve", None)
    if curve is None or curve.name not in _CURVES:
        raise UsageError(f"{path}: is not a key on the curve P-256, P-384 or P-521", hint=_make_a_key())


def _read_key(path: Path) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except (CheckpointError, OSError) as error:
        raise UsageError(f"{path}: key not found, or not readable", hint=_make_a_key()) from error


def _make_a_key() -> str:
    """Return a hint with commands that create a key pair, under names that do not exist yet."""
    names = itertools.chain(["key"], (f"key-{number}" for number in itertools.count(2)))
    name = next(n for n in names if not os.path.lexists(f"{n}.pem") and not os.path.lexists(f"{n}.pub"))
    make = f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.pem"
    return f"name another file, or create keys: {make}; openssl ec -in {name}.pem -pubout -out {name}.pub"
