"""Signatures of artifacts are verified, in Python and on the command line."""

import shutil

import pytest
from folders import flip
from signing_keys import write_keys

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME
from adaptkit.checkpoint.signing import Signer, Trust, sign
from adaptkit.errors import IntegrityError, UsageError
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import VerifyOptions, verify


@pytest.fixture(scope="module")
def pair(tmp_path_factory, llama):
    """Two artifacts, one of them signed, and the keys of its signer and of a stranger."""
    root = tmp_path_factory.mktemp("signed")
    write_keys(root, "mine")
    write_keys(root, "stranger")
    quantize(llama, root / "artifact", QuantizeOptions(max_shard_bytes=60_000))
    quantize(llama, root / "other", QuantizeOptions(block_size=128))
    sign(root / "artifact", Signer(root / "mine.pem"))
    return root


@pytest.fixture
def copied(pair, tmp_path):
    return shutil.copytree(pair, tmp_path / "signed")


def test_a_signed_artifact_passes_and_its_signer_is_printed(run_cli, pair):
    done = run_cli("verify", pair / "artifact", "--public-key", pair / "mine.pub")
    assert done.code == 0, done.stderr
    assert f"signed           by the key in {pair / 'mine.pub'}" in done.stdout
    assert "signature        not checked" in run_cli("verify", pair / "artifact").stdout
    assert "signature" not in run_cli("verify", pair / "other").stdout


CASES = [
    "changed byte",
    "swapped file",
    "wrong key",
    "signature of another",
    "changed manifest",
    "cut",
    "none",
    "no key",
]


@pytest.mark.parametrize("case", CASES)
def test_changed_files_and_wrong_signatures_print_one_error_and_one_hint(run_cli, copied, case):
    folder, key, code = copied / "artifact", copied / "mine.pub", 3
    shards = sorted(folder.glob("*.safetensors"))
    arguments = ["verify", folder, "--public-key", key]
    if case == "changed byte":
        flip(shards[0])
    elif case == "swapped file":
        first, second = (shard.read_bytes() for shard in shards[:2])
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)
    elif case == "wrong key":
        arguments[-1] = copied / "stranger.pub"
    elif case == "signature of another":
        sign(copied / "other", Signer(copied / "mine.pem"))
        arguments += ["--signature", copied / "other" / SIGNATURE_NAME]
    elif case == "changed manifest":
        shutil.copy(copied / "other" / MANIFEST_NAME, folder / MANIFEST_NAME)
    elif case == "cut":
        (folder / SIGNATURE_NAME).write_bytes((folder / SIGNATURE_NAME).read_bytes()[:200])
    elif case == "none":
        (folder / SIGNATURE_NAME).unlink()  # 3, as for pull: a removed signature must not look like a usage error
    else:
        arguments[-1] = copied / "absent.pub"
        code = 2
    run_cli(*arguments).refusal(code)


def test_a_signature_may_be_in_a_different_folder(copied):
    shutil.move(copied / "artifact" / SIGNATURE_NAME, copied / "detached.sig")
    trust = Trust(copied / "mine.pub")
    report = verify(copied / "artifact", VerifyOptions(trust=trust, signature=copied / "detached.sig"))
    assert (report.signature, report.signed_by) == (False, str(trust))


def test_incomplete_descriptions_of_the_expected_signer_are_refused(copied, run_cli):
    with pytest.raises(UsageError, match="needs a public key or an identity"):
        VerifyOptions(signature=copied / "artifact" / SIGNATURE_NAME)
    done = run_cli("verify", copied / "artifact", "--identity", "me@example.org")
    assert done.code == 2
    assert "--identity-provider" in done.stderr


@pytest.mark.parametrize("signed_before", [True, False])
def test_a_signed_base_is_restored_with_its_signature(signed_before, tmp_path, llama, adapter, second_adapter, run_cli):
    private, public = write_keys(tmp_path, "mine")
    merge(llama, [second_adapter], tmp_path / "base")
    if signed_before:
        sign(tmp_path / "base", Signer(private))
    merge(tmp_path / "base", [adapter], tmp_path / "merged")
    verify(tmp_path / "merged")
    done = run_cli("unmerge", tmp_path / "merged", "--adapter", adapter, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    trust = ["--public-key", public]
    assert run_cli("verify", tmp_path / "out", *(trust if signed_before else [])).code == 0
    assert (tmp_path / "out" / SIGNATURE_NAME).exists() == signed_before
    # The merge does not depend on the signature: recomputed from a base signed or unsigned since, it is the same.
    if signed_before:
        (tmp_path / "base" / SIGNATURE_NAME).unlink()
    else:
        sign(tmp_path / "base", Signer(private))
    again = ["--parents", tmp_path / "base", "--parents", adapter, "--parents", llama, "--parents", second_adapter]
    done = run_cli("verify", tmp_path / "merged", *again, "--recompute")
    assert "same bytes; its base's signature differs" in done.stdout, done.stderr


def test_a_changed_signature_of_the_base_is_detected(tmp_path, llama, adapter, second_adapter):
    merge(llama, [second_adapter], tmp_path / "base")
    sign(tmp_path / "base", Signer(write_keys(tmp_path, "mine")[0]))
    merge(tmp_path / "base", [adapter], tmp_path / "merged")
    kept = tmp_path / "merged" / "adaptkit-undo" / "base" / SIGNATURE_NAME
    kept.write_bytes(kept.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match=r"adaptkit-manifest\.sig changed since the merge"):
        unmerge(tmp_path / "merged", [adapter], tmp_path / "out")
