"""Sign and verify an artifact's manifest in the OpenSSF Model Signing format, using the ``model-signing`` package.

The manifest contains the sha256 of every other file, so one signature over it covers the whole artifact. It is stored
beside the manifest:

    adaptkit-manifest.sig   a Sigstore bundle: DSSE envelope, in-toto statement, predicate model_signing/signature/v1.0
                            with one resource, named ".", whose digest is the sha256 of adaptkit-manifest.json

The signer uses either an elliptic-curve key, which works offline, or an OpenID Connect identity (keyless: Sigstore's
public services issue a certificate and keep a transparency log).
"""

import contextlib
import itertools
import json
import os
import sys
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaptkit.checkpoint.header import check_regular
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, require_manifest
from adaptkit.checkpoint.writer import replace_file
from adaptkit.errors import AuthenticationError, CheckpointError, IntegrityError, NetworkError, UsageError, install_hint
from adaptkit.settings import Settings, setting

MAX_SIGNATURE_BYTES = 1 << 20
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What ``model-signing`` raises for a malformed bundle or an invalid signature."""


@dataclass(frozen=True)
class Signer(Settings):
    """Credentials for signing: a private key, or without a key an identity.

    Attributes:
        private_key: PEM file of an elliptic-curve key (P-256, P-384 or P-521).
        password: of the key file.
        identity_token: OpenID Connect token; None for that of the CI job, or at a terminal a browser login.
    """

    private_key: Path | None = None
    password: bytes | None = field(default=None, repr=False)
    identity_token: str | None = field(default=None, repr=False)

    def validate(self) -> None:
        """See ``Settings``."""
        if self.private_key is not None and self.identity_token is not None:
            raise UsageError("sign with a key or with an identity, not both", hint="leave one of them out")
        if self.password is not None and self.private_key is None:
            raise UsageError("a password was given without a private key", hint="give the private key too")


@dataclass(frozen=True)
class Trust(Settings):
    """The expected signer of an artifact: the holder of a key, or an identity."""

    public_key: Path | None = setting("Require a signature by this key; PEM, P-256 and up.", None, metavar="FILE")
    identity: str | None = setting(
        "Require a keyless signature by this identity, such as an e-mail address or the URI of a CI job.", None
    )
    identity_provider: str | None = setting("URL of the provider of that identity.", None, metavar="URL")

    def validate(self) -> None:
        """See ``Settings``."""
        keyless = (self.identity is not None, self.identity_provider is not None)
        if (self.public_key is not None) == any(keyless) or any(keyless) != all(keyless):
            raise UsageError(
                "give either a public key, or an identity together with its provider",
                hint="use --public-key FILE, or --identity NAME --identity-provider URL",
            )
        if "" in (self.identity, self.identity_provider):
            raise UsageError("the identity or its provider is empty", hint="check for a shell variable that is not set")

    def __str__(self) -> str:
        if self.public_key is not None:
            return f"the key in {self.public_key}"
        return f"{self.identity} ({self.identity_provider})"


def sign(root: Path, signer: Signer) -> Path:
    """Write ``adaptkit-manifest.sig`` of the artifact in a folder, without comparing its files with the manifest."""
    replace_file(root / SIGNATURE_NAME, sign_manifest(require_manifest(root).to_bytes(), signer))
    return root / SIGNATURE_NAME


def sign_manifest(content: bytes, signer: Signer) -> bytes:
    """Return the content of ``adaptkit-manifest.sig``, given that of ``adaptkit-manifest.json``.

    Raises:
        UsageError: the extra ``sign`` is not installed, or the key cannot be used.
        AuthenticationError, NetworkError: Sigstore rejects the identity, or does not answer.
    """
    config = _package().signing.Config()
    if signer.private_key is not None:
        _check_key(signer.private_key, signer.password)
    with _manifest_file(content) as file, _keyless_errors():
        path = file.with_name(SIGNATURE_NAME)
        if signer.private_key is None:
            config.use_sigstore_signer(identity_token=_identity_token(signer))
        else:
            config.use_elliptic_key_signer(private_key=signer.private_key, password=signer.password)
        config.sign(file, path)
        return path.read_bytes()


def check_signer(signer: Signer) -> None:
    """Check that signing is possible: package installed, key usable, or identity available (or a browser login)."""
    _package()
    if signer.private_key is None:
        _identity_token(signer)
    else:
        _check_key(signer.private_key, signer.password)


def check_signature(content: bytes, signature: Path | bytes, trust: Trust, where: str = "") -> None:
    """Check that the expected signer signed exactly this manifest; a signature given as content is from ``where``.

    Raises:
        IntegrityError: malformed, made by another signer, or for another manifest.
        UsageError: the extra ``sign`` is not installed, or the key or file cannot be read.
        NetworkError: the signature is keyless, and Sigstore's services do not answer.
    """
    config = _package().verifying.Config()
    bundle = signature if isinstance(signature, bytes) else _read_signature(signature)
    where = where or str(signature)
    if trust.public_key is not None:
        _check_key(trust.public_key, is_private=False)
        config.use_elliptic_key_verifier(public_key=trust.public_key)
    from cryptography.exceptions import InvalidSignature

    with _manifest_file(content) as file, _keyless_errors():
        if trust.public_key is None:
            config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.identity_provider)
        file.with_name(SIGNATURE_NAME).write_bytes(bundle)
        try:
            config.verify(file, file.with_name(SIGNATURE_NAME))
            signed = _signed_digests(bundle)
        except (*_MALFORMED, InvalidSignature) as error:
            raise _refused(bundle, content, where, trust) from error
    if signed != [sha256(content).hexdigest()]:  # the statement may list files to ignore, so a valid one is not enough
        raise _refused(bundle, content, where, trust)


def _refused(bundle: bytes, content: bytes, where: str, trust: Trust) -> IntegrityError:
    try:
        digests = _signed_digests(bundle)
    except _MALFORMED:
        return IntegrityError(f"{where}: is not the signature of a manifest", hint="download it again")
    if digests != [sha256(content).hexdigest()]:
        return IntegrityError(
            f"{where}: is for another artifact: the manifest's sha256 is {sha256(content).hexdigest()}, "
            f"but the signature is of {', '.join(digests) or 'none'}",
            hint="get artifact and signature from the same place, and trust neither until they match",
        )
    return IntegrityError(f"{where}: not made by {trust}", hint="do not trust it, unless you gave the wrong key")


def _signed_digests(bundle: bytes) -> list[str]:
    statement = json.loads(b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
    return [str(resource["digest"]) for resource in statement["predicate"]["resources"]]


def _read_signature(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise UsageError(f"{path}: signature not found", hint="name its file with --signature")
    check_regular(path)
    if path.stat().st_size > MAX_SIGNATURE_BYTES:
        raise IntegrityError(f"{path}: is too large for a signature", hint="download it again")
    return path.read_bytes()


def _package() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise UsageError(
            f"signatures need the package model-signing ({error.name} is not installed)",
            hint=install_hint("sign"),
        ) from error
    return model_signing


def _identity_token(signer: Signer) -> str:
    """Return the given token, or the CI job's; empty to log in with a browser, for which stdin must be a terminal."""
    from sigstore.oidc import detect_credential

    token = signer.identity_token or detect_credential()
    if not token and not sys.stdin.isatty():
        raise AuthenticationError(
            "no identity to sign with is available",
            hint="sign with a private key, or in a CI job that may request an identity token (id-token: write)",
        )
    return token or ""


@contextlib.contextmanager
def _keyless_errors() -> Iterator[None]:
    """Convert errors of Sigstore's client to ours; the caller handles invalid signatures."""
    import requests
    from sigstore.errors import Error, TUFError
    from sigstore.errors import NetworkError as NoAnswer
    from sigstore.oidc import IdentityError, IssuerError

    try:
        yield
    except (NoAnswer, TUFError, requests.RequestException) as error:
        raise NetworkError("Sigstore's services do not answer", hint="try again, or use a key instead") from error
    except (IdentityError, IssuerError) as error:
        raise AuthenticationError("the identity token was rejected", hint="request a new one") from error
    except Error as error:
        raise IntegrityError(f"Sigstore: {' '.join(str(error).split())}", hint="do not trust it") from error


@contextlib.contextmanager
def _manifest_file(content: bytes) -> Iterator[Path]:
    """Write the manifest to a temporary file, so that exactly what was read is signed even if the folder changes.

    Meanwhile stdout, which is for reports, is redirected to stderr: the package prints warnings to stdout.
    """
    with TemporaryDirectory(prefix="adaptkit-signing-") as folder, contextlib.redirect_stdout(sys.stderr):
        file = Path(folder) / MANIFEST_NAME
        file.write_bytes(content)
        yield file


def _check_key(path: Path, password: bytes | None = None, is_private: bool = True) -> None:
    """Reject a key file that cannot sign or verify, with a message that reveals nothing of its content."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        check_regular(path)
        content = path.read_bytes()
    except (CheckpointError, OSError) as error:
        raise UsageError(f"{path}: key not found, or not readable", hint=_make_a_key()) from error
    try:
        key: Any = load_pem_private_key(content, password) if is_private else load_pem_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if is_private and b"ENCRYPTED" in content:
            raise UsageError(f"{path}: password missing or incorrect", "set ADAPTKIT_KEY_PASSWORD") from error
        if isinstance(error, TypeError):
            raise UsageError(f"{path}: needs no password", hint="unset ADAPTKIT_KEY_PASSWORD") from error
        kind = "private" if is_private else "public"
        raise UsageError(f"{path}: contains no {kind} key", hint=_make_a_key()) from error
    if getattr(getattr(key, "curve", None), "name", "") not in _CURVES:
        raise UsageError(f"{path}: is not a key on the curve P-256, P-384 or P-521", hint=_make_a_key())


def _make_a_key() -> str:
    """Return a hint with commands that create a key pair, under names that do not exist yet."""
    names = itertools.chain(["key"], (f"key-{number}" for number in itertools.count(2)))
    name = next(n for n in names if not os.path.lexists(f"{n}.pem") and not os.path.lexists(f"{n}.pub"))
    make = f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.pem"
    return f"name another file, or create keys: {make}; openssl ec -in {name}.pem -pubout -out {name}.pub"
