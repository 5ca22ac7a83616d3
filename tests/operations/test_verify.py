"""Every change to an artifact is detected and named."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest
from folders import edit_manifest, edited_tensors, flip
from safetensors.torch import load_file

from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import IntegrityError, UsageError
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import VerifyOptions, verify

MANIFEST = "adaptkit-manifest.json"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, llama):
    out = tmp_path_factory.mktemp("verify") / "quantized"
    quantize(llama, out, QuantizeOptions(max_shard_bytes=60_000))
    return out


@pytest.fixture
def folder(artifact, copy_of):
    return copy_of(artifact)


def refuses(folder, match):
    with pytest.raises(IntegrityError, match=match) as caught:
        verify(folder)
    assert caught.value.exit_code == 3


def test_an_unchanged_artifact_passes_and_the_report_matches_it(artifact):
    report, manifest = verify(artifact), require_manifest(artifact)
    files = [path for path in artifact.iterdir() if path.name != MANIFEST]
    assert report.kind == "quantized"
    assert report.files == len(files)
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert report.tensors == len(Checkpoint(artifact).tensors)
    assert report.tensors_root == manifest.tensors_root
    assert report.manifest_sha256 == manifest.sha256


@pytest.mark.parametrize("threads", [1, 4])
def test_a_flipped_bit_is_detected_in_every_file(artifact, copy_of, threads):
    for number, name in enumerate(sorted(path.name for path in artifact.iterdir() if path.name != MANIFEST)):
        folder = copy_of(artifact, f"copy-{number}")
        flip(folder / name, (folder / name).stat().st_size // 2)
        with pytest.raises(IntegrityError, match=rf"{name} changed"):
            verify(folder, VerifyOptions(threads=threads))


def test_the_first_of_many_problems_are_named_and_the_others_counted(folder):
    for number in range(7):
        (folder / f"extra-{number}.txt").write_text("")
    refuses(folder, r"(?m)extra-4\.txt is not in the manifest; and 2 more$")
    for path in folder.iterdir():
        path.unlink() if path.name.startswith("extra") else path.name == MANIFEST or flip(path, 3)
    several = len(list(folder.iterdir())) - 1
    refuses(folder, rf"(?m); and {several - 5} more$")


def test_a_truncated_and_a_longer_file_are_detected_by_size(folder):
    os.truncate(folder / "config.json", 10)
    refuses(folder, r"config\.json has 10 bytes instead of")
    with (folder / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    refuses(folder, r"tokenizer\.json has")


@pytest.mark.parametrize(
    "name", ["extra.txt", ".hidden", "deeper/x.py", ".github/workflows/x.yml", "deeper/.gitattributes"]
)
def test_an_extra_file_is_detected(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("")
    refuses(folder, rf"{name} is not in the manifest")


def test_files_that_download_tools_leave_at_the_top_level_are_ignored(folder):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    verify(folder)
    (folder / "deeper" / ".cache").mkdir(parents=True)
    (folder / "deeper" / ".cache" / "x").write_text("")
    refuses(folder, "is not in the manifest")


def test_files_of_git_and_the_hub_are_ignored(folder):
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    verify(folder)
    shutil.rmtree(folder / ".git")
    (folder / ".git").write_text("gitdir: ../.git/modules/model\n")  # as in a submodule
    verify(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux can root give up its right to read everything")
def test_an_unreadable_folder_is_reported_as_such_and_not_as_missing_files(folder):
    def as_others():  # drop root's right to read everything, which other users do not have
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    folder.chmod(0)
    command = [sys.executable, "-m", "adaptkit", "verify", folder]
    done = subprocess.run(command, preexec_fn=as_others, capture_output=True, text=True, check=False)
    folder.chmod(0o700)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder / MANIFEST_NAME}: Permission denied\nhint: ")


def test_a_renamed_file_is_reported_as_both_missing_and_extra(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer2.json")
    refuses(folder, r"tokenizer\.json is missing; tokenizer2\.json is not in the manifest")


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link"])
def test_a_file_replaced_by_a_folder_fifo_or_dangling_link_is_detected(tmp_path, folder, kind):
    path = folder / "config.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(Exception, match=r"config\.json") as caught:
        verify(folder)
    assert getattr(caught.value, "exit_code", 0) in {3, 5}


def test_links_to_unchanged_files_pass(tmp_path, folder):
    """The Hub's cache consists of such links."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    verify(folder)


def test_a_changed_or_missing_manifest_is_detected(folder):
    text = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(text.replace(b'"F32"', b'"U8"', 1))
    refuses(folder, "changed after it was written")
    (folder / MANIFEST).write_bytes(text[:-2])
    refuses(folder, MANIFEST)
    (folder / MANIFEST).unlink()
    refuses(folder, MANIFEST)


@pytest.mark.parametrize("change", ["a tensor", "a second copy of a tensor", "no safetensors file"])
def test_a_manifest_whose_tensors_do_not_match_its_files_is_detected(folder, change):
    """A file and its sha256 in the manifest were changed, but not the fingerprints of tensors."""
    from adaptkit.checkpoint.hashing import file_sha256
    from adaptkit.checkpoint.manifest import FileRecord

    manifest, (shard, other, *_) = require_manifest(folder), sorted(folder.glob("model-*.safetensors"))
    name = next(tensor.name for tensor in manifest.tensors if (tensor.file, tensor.dtype) == (shard.name, "U8"))
    changed = other if change == "a second copy of a tensor" else shard
    with edited_tensors(changed) as tensors:
        if changed == other:
            tensors[name] = load_file(shard)[name]
        else:
            tensors[name].view(-1)[0] ^= 1
    if change == "no safetensors file":
        shard.write_bytes(b"\xff" * 100)
    record = FileRecord(changed.name, changed.stat().st_size, file_sha256(changed))
    edit_manifest(folder, files=tuple(record if f.path == record.path else f for f in manifest.files))
    problem = {
        "a tensor": f"tensor {name} differs from its fingerprint",
        "a second copy of a tensor": f"tensor {name} is in both ",
        "no safetensors file": f"is not in {shard.name} as the manifest says",
    }
    refuses(folder, re.escape(problem[change]))


@pytest.mark.parametrize("change", ["another file", "left out"])
def test_a_manifest_that_misplaces_or_omits_a_tensor_is_detected(folder, change):
    from dataclasses import replace

    manifest = require_manifest(folder)
    first, *rest = manifest.tensors
    shards = sorted({tensor.file for tensor in manifest.tensors})
    elsewhere = replace(first, file=next(shard for shard in shards if shard != first.file))
    edit_manifest(folder, tensors=tuple(rest if change == "left out" else [elsewhere, *rest]))
    refuses(folder, first.name.replace(".", r"\."))


def test_an_expected_digest_pins_the_artifact(artifact, tmp_path, llama):
    digest = require_manifest(artifact).sha256
    assert verify(artifact, VerifyOptions(manifest_sha256=digest)).manifest_sha256 == digest
    quantize(llama, tmp_path / "other", QuantizeOptions(double_quant=False))
    with pytest.raises(IntegrityError, match=digest):
        verify(tmp_path / "other", VerifyOptions(manifest_sha256=digest))
    for wrong in (digest.upper(), digest[:-1], ""):
        with pytest.raises(UsageError, match="is not a sha256"):
            VerifyOptions(manifest_sha256=wrong)


def test_paths_without_a_manifest_are_refused(llama, tmp_path):
    with pytest.raises(IntegrityError, match=MANIFEST):
        verify(llama)
    with pytest.raises(UsageError, match="does not exist"):
        verify(tmp_path / "absent")
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        verify(tmp_path / "config.json")
