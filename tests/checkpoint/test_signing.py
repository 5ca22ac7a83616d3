"""Only valid signatures of a trusted key for the same manifest are accepted."""

import io
import json
import subprocess
import sys
from base64 import b64decode, b64encode
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from signing_keys import write_keys

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adaptkit.checkpoint.signing import Signer, Trust, check_signature, sign, sign_manifest
from adaptkit.errors import AuthenticationError, IntegrityError, UsageError

CONTENT = Manifest("checkpoint", {"name": "test"}, ()).to_bytes()
OTHER = Manifest("checkpoint", {"name": "another"}, ()).to_bytes()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Map of names to the paths of a private and a public key."""
    folder = tmp_path_factory.mktemp("keys")
    made = {
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "stranger": ec.generate_private_key(ec.SECP256R1()),
        "k256": ec.generate_private_key(ec.SECP256K1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    found = {name: write_keys(folder, name, key) for name, key in made.items()}
    return found | {"locked": write_keys(folder, "locked", made["p256"], b"secret")}


@pytest.fixture
def signed(tmp_path, keys):
    """A signature of CONTENT by p256."""
    path = tmp_path / "x.sig"
    path.write_bytes(sign_manifest(CONTENT, Signer(keys["p256"][0])))
    return path


def edited(path, change):
    """Rewrite a bundle."""
    bundle = json.loads(path.read_bytes())
    change(bundle)
    path.write_text(json.dumps(bundle))
    return path


@pytest.mark.parametrize("name", ["p256", "p384", "p521"])
def test_a_valid_signature_is_accepted(tmp_path, keys, name):
    private, public = keys[name]
    path = tmp_path / "x.sig"
    path.write_bytes(sign_manifest(CONTENT, Signer(private)))
    check_signature(CONTENT, path, Trust(public))


def test_a_signature_conforms_to_dsse_in_toto_and_ecdsa(keys, signed):
    """The formats are written out here, without model-signing."""
    envelope = json.loads(signed.read_bytes())["dsseEnvelope"]
    payload, kind = b64decode(envelope["payload"]), envelope["payloadType"].encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public = pem.load_pem_public_key(keys["p256"][1].read_bytes())
    raw = b64decode(envelope["signatures"][0]["sig"])
    public.verify(raw, message, ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public.verify(raw, message + b" ", ec.ECDSA(hashes.SHA256()))
    statement = json.loads(payload)
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    assert [subject["name"] for subject in statement["subject"]] == [MANIFEST_NAME]
    expected = {"name": ".", "algorithm": "sha256", "digest": sha256(CONTENT).hexdigest()}
    assert statement["predicate"]["resources"] == [expected]


def test_model_signing_verifies_a_signature_without_adaptkit(tmp_path, keys, signed):
    (tmp_path / MANIFEST_NAME).write_bytes(CONTENT)
    command = [sys.executable, "-m", "model_signing", "verify", "key", tmp_path / MANIFEST_NAME]
    command += ["--signature", signed, "--public_key", keys["p256"][1]]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (tmp_path / MANIFEST_NAME).write_bytes(OTHER)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_locked_key_opens_with_its_password(keys, tmp_path):
    private, public = keys["locked"]
    path = tmp_path / "x.sig"
    path.write_bytes(sign_manifest(CONTENT, Signer(private, b"secret")))
    check_signature(CONTENT, path, Trust(public))
    for password in (None, b"wrong"):
        with pytest.raises(UsageError, match="password missing or incorrect") as caught:
            sign_manifest(CONTENT, Signer(private, password))
        assert "wrong" not in str(caught.value)
        assert "openssl" not in caught.value.hint  # its command would overwrite this key
    with pytest.raises(UsageError, match="needs no password") as caught:
        sign_manifest(CONTENT, Signer(keys["p256"][0], b"secret"))
    assert "openssl" not in caught.value.hint


def test_a_signature_by_a_different_key_or_of_a_different_manifest_is_refused(keys, signed):
    with pytest.raises(IntegrityError, match="not made by the key in") as caught:
        check_signature(CONTENT, signed, Trust(keys["stranger"][1]))
    assert caught.value.exit_code == 3
    with pytest.raises(IntegrityError, match="is for another artifact"):
        check_signature(OTHER, signed, Trust(keys["p256"][1]))
    with pytest.raises(IntegrityError, match="is for another artifact"):
        check_signature(CONTENT + b" ", signed, Trust(keys["p256"][1]))


def statement_of(digest):
    """Return a change that replaces the digest in the signed payload."""

    def change(bundle):
        statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
        statement["predicate"]["resources"][0]["digest"] = digest
        statement["subject"][0]["digest"]["sha256"] = sha256(bytes.fromhex(digest)).hexdigest()
        bundle["dsseEnvelope"]["payload"] = b64encode(json.dumps(statement).encode()).decode()

    return change


def flip(bundle):
    entry = bundle["dsseEnvelope"]["signatures"][0]
    raw = bytearray(b64decode(entry["sig"]))
    raw[-1] ^= 1
    entry["sig"] = b64encode(raw).decode()


FORGERIES = {
    "a flipped bit": flip,
    "no signature": lambda b: b["dsseEnvelope"].update(signatures=[]),
    "no envelope": lambda b: b.pop("dsseEnvelope"),
    "no key": lambda b: b["verificationMaterial"].pop("publicKey"),
    "a payload that is not a statement": lambda b: b["dsseEnvelope"].update(payload=b64encode(b"{}").decode()),
    "another payload": statement_of(sha256(OTHER).hexdigest()),
    "another media type": lambda b: b.update(mediaType="text/plain"),
    "nothing": lambda b: b.clear(),
}


@pytest.mark.parametrize("name", sorted(FORGERIES))
def test_a_forged_bundle_is_refused(keys, signed, name):
    edited(signed, FORGERIES[name])
    for content in (CONTENT, OTHER):
        with pytest.raises(IntegrityError):
            check_signature(content, signed, Trust(keys["p256"][1]))


@pytest.mark.parametrize("content", [b"", b"x", b"[]", b"null", b"\xff", b"{" * 5000, b"[" * 100_000, b" " * (2 << 20)])
def test_a_file_that_is_not_a_bundle_is_refused(keys, tmp_path, content):
    (tmp_path / "x.sig").write_bytes(content)
    with pytest.raises(IntegrityError):
        check_signature(CONTENT, tmp_path / "x.sig", Trust(keys["p256"][1]))


def test_a_signature_of_a_folder_is_not_accepted_for_its_manifest(keys, tmp_path):
    """The holder of the key signed a folder that contains the manifest, with or without ignoring it."""
    from model_signing import hashing, signing

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_bytes(CONTENT)
    config = signing.Config().use_elliptic_key_signer(private_key=keys["p256"][0])
    config.sign(folder, tmp_path / "whole.sig")
    (folder / "x").write_text("x")
    ignoring = hashing.Config().set_ignored_paths(paths=[folder / MANIFEST_NAME, folder / "x"])
    config.set_hashing_config(ignoring).sign(folder, tmp_path / "nothing.sig")
    for name in ("whole.sig", "nothing.sig"):
        with pytest.raises(IntegrityError):
            check_signature(CONTENT, tmp_path / name, Trust(keys["p256"][1]))


@pytest.mark.parametrize("name", ["k256", "rsa", "ed25519"])
def test_unsupported_kinds_of_keys_are_refused(keys, signed, name):
    with pytest.raises(UsageError, match="P-256"):
        sign_manifest(CONTENT, Signer(keys[name][0]))
    with pytest.raises(UsageError, match="P-256"):
        check_signature(CONTENT, signed, Trust(keys[name][1]))


def test_files_that_hold_no_key_are_refused(keys, signed, tmp_path):
    private, public = keys["p256"]
    with pytest.raises(UsageError, match="no private key"):
        sign_manifest(CONTENT, Signer(public))
    with pytest.raises(UsageError, match="no public key"):
        check_signature(CONTENT, signed, Trust(private))
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="key not found, or not readable"):
            sign_manifest(CONTENT, Signer(path))
        with pytest.raises(UsageError, match="key not found, or not readable"):
            check_signature(CONTENT, signed, Trust(path))
    with pytest.raises(UsageError, match="signature not found"):
        check_signature(CONTENT, tmp_path / "absent", Trust(public))


def test_missing_empty_or_conflicting_arguments_of_trust_and_signer_are_refused():
    for arguments in ({}, {"identity": "x"}, {"identity_provider": "x"}, {"public_key": "x", "identity": "y"}):
        with pytest.raises(UsageError, match="public key, or an identity"):
            Trust(**arguments)
    for empty in ({"identity": "", "identity_provider": ""}, {"identity": "x", "identity_provider": ""}):
        with pytest.raises(UsageError, match="empty"):
            Trust(**empty)
    with pytest.raises(UsageError, match="not both"):
        Signer("key", identity_token="token")
    with pytest.raises(UsageError, match="without a private key"):
        Signer(password=b"x")


def test_repr_contains_no_secrets():
    assert "hidden" not in repr(Signer(identity_token="hidden")) + repr(Signer("key", b"hidden"))


def test_signing_without_a_key_or_an_identity_is_an_authentication_error(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "BUILDKITE", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(AuthenticationError, match="no identity") as caught:
        sign_manifest(CONTENT, Signer())
    assert caught.value.exit_code == 6


def test_signing_a_folder_writes_or_replaces_its_signature_file(keys, tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(CONTENT)
    assert sign(tmp_path, Signer(keys["stranger"][0])) == tmp_path / SIGNATURE_NAME
    assert sign(tmp_path, Signer(keys["p256"][0])) == tmp_path / SIGNATURE_NAME
    check_signature(CONTENT, tmp_path / SIGNATURE_NAME, Trust(keys["p256"][1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST_NAME, SIGNATURE_NAME]
