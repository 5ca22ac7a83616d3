"""A run on a base without a manifest resumes on a copy of it, and on no other one."""

import os
import shutil
from dataclasses import replace

import pytest
import tiny
from interrupted import stop_after

from adaptkit.errors import ConflictError
from adaptkit.operations.quantize import quantize
from adaptkit.training import result
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.loop import train


@pytest.fixture
def config(llama, instructions, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    return TrainConfig(
        base=str(base), data=(str(instructions),), rank=4, steps=4, batch_size=4, save_every=2, device="cpu"
    )


def flipped(path):
    """Change the last byte of a file, and not its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_resumes_if_only_the_times_of_its_base_differ(config, tmp_path):
    whole, output = train(config, tmp_path / "whole"), tmp_path / "adapter"
    stop_after(config, output, 2)
    for path in (tmp_path / "base").iterdir():
        os.utime(path, ns=(1, 1))
    assert plan_run(config, output).resumed_from == 2
    copy = shutil.copytree(tmp_path / "base", tmp_path / "copy", copy_function=shutil.copyfile)
    report = train(replace(config, base=str(copy)), output)
    assert (report.resumed_from, report.tensors_root) == (2, whole.tensors_root)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_with_other_contents_is_refused(config, tmp_path, name):
    output, path = tmp_path / "adapter", tmp_path / "base" / name
    stop_after(config, output, 2)
    before = path.read_bytes()
    if name == "config.json":
        path.write_bytes(before.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05'))
        assert path.read_bytes() != before
    else:
        flipped(path)
    with pytest.raises(ConflictError, match="another base"):
        train(config, output)
    assert plan_run(config, output, force=True).resumed_from == 0
    path.write_bytes(before)
    assert train(config, output).resumed_from == 2


def test_a_base_with_another_manifest_is_refused(config, tmp_path):
    """Neither has its contents recorded beside its manifest."""
    for seed in (0, 1):
        quantize(tiny.write_llama(tmp_path / f"plain-{seed}", seed=seed), tmp_path / f"base-{seed}")
    config = replace(config, base=str(tmp_path / "base-0"))
    stop_after(config, tmp_path / "adapter", 2)
    with pytest.raises(ConflictError, match="of another run: another base"):
        train(replace(config, base=str(tmp_path / "base-1")), tmp_path / "adapter")


def test_other_differences_are_named_alone(config, tmp_path):
    stop_after(config, tmp_path / "adapter", 2)
    os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConflictError, match=r"(?m)of another run: rank was 4 and is 8$"):
        train(replace(config, rank=8), tmp_path / "adapter")


def test_a_base_is_hashed_once_in_a_run(config, tmp_path, monkeypatch):
    read, fingerprint = [], result.fingerprint_in_pieces
    monkeypatch.setattr(
        result, "fingerprint_in_pieces", lambda files, name: read.append(name) or fingerprint(files, name)
    )
    train(config, tmp_path / "whole")
    assert len(read) == len(set(read)) > 0
    stop_after(config, tmp_path / "adapter", 2)
    read.clear()
    assert plan_run(config, tmp_path / "adapter").resumed_from == 2
    assert not read
    assert train(config, tmp_path / "adapter").resumed_from == 2
    assert len(read) == len(set(read)) > 0
