"""The result does not depend on how the work is divided: pieces, shards and interrupted runs."""

import errno
import os
import shutil

import pytest
import tiny
import torch
from folders import tree
from safetensors.torch import load_file, save_file

from adaptkit.errors import IntegrityError
from adaptkit.operations import _shards
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize

SMALL = 40_000
"""A shard size that makes several shards of the small model."""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, llama):
    out = tmp_path_factory.mktemp("sharded") / "llama"
    quantize(llama, out, QuantizeOptions(max_shard_bytes=SMALL))
    return out


@pytest.mark.parametrize(("piece", "options"), [(130, {}), (8200, {"double_quant": False}), (130, {"block_size": 128})])
def test_pieces_do_not_change_the_result(llama, tmp_path, monkeypatch, piece, options):
    quantize(llama, tmp_path / "whole", QuantizeOptions(**options))
    dequantize(tmp_path / "whole", tmp_path / "plain")
    monkeypatch.setattr(_shards, "PIECE_BYTES", piece)
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    dequantize(tmp_path / "out", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "plain")


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("nf4", False), ("int8", False), ("fp8", False)])
def test_pieces_of_a_weight_with_an_odd_element_count_do_not_change_the_result(
    tmp_path, monkeypatch, format, double_quant
):
    """Large enough for several pieces of dequantize, too, which contain whole groups of constants."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    weight = torch.randn(301, 191, generator=torch.Generator().manual_seed(1))
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, source / "model.safetensors")
    options, plain = QuantizeOptions(format=format, double_quant=double_quant), DequantizeOptions(dtype="float32")
    quantize(source, tmp_path / "whole", options)
    dequantize(tmp_path / "whole", tmp_path / "whole-plain", plain)
    monkeypatch.setattr(_shards, "PIECE_BYTES", 600)
    quantize(source, tmp_path / "out", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    dequantize(tmp_path / "out", tmp_path / "plain", plain)
    assert tree(tmp_path / "plain") == tree(tmp_path / "whole-plain")
    back = load_file(tmp_path / "plain" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert back.dtype == torch.float32
    assert 0.001 < float((back - weight).norm() / weight.norm()) < 0.12


def test_the_reported_error_matches_the_file(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(_shards, "PIECE_BYTES", 5000)
    report = quantize(llama, tmp_path / "out")
    dequantize(tmp_path / "out", tmp_path / "plain", DequantizeOptions(dtype="float32"))
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    squares = [0.0, 0.0]
    for tensor in report.tensors:
        weight = before[tensor.name].double()
        error = float((weight - after[tensor.name].double()).square().sum())
        if tensor.format:
            assert tensor.relative_error == pytest.approx((error / float(weight.square().sum())) ** 0.5, rel=1e-3)
            squares = [squares[0] + error, squares[1] + float(weight.square().sum())]
        else:
            assert (error, tensor.relative_error) == (0, None)
            assert tensor.kept_because
    assert report.relative_error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-3)


def test_work_from_a_different_checkpoint_of_the_same_shapes_is_not_reused(llama, sharded, copy_of, tmp_path):
    """E.g. the same command after a damaged download was replaced by a good one at a different path."""
    other, options = copy_of(llama, "other"), QuantizeOptions(max_shard_bytes=SMALL)
    tensors = {name: value * 3 for name, value in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(other, tmp_path / "out", options, progress=interrupt)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))  # so there is work that could be reused
    quantize(llama, tmp_path / "out", options)
    assert tree(tmp_path / "out") == tree(sharded)


def test_a_read_error_leaves_finished_shards_to_resume_from(tmp_path, monkeypatch):
    source = tiny.write_llama(tmp_path / "source", shards=3, layers=4)
    quantize(source, tmp_path / "expected")
    last, partial, real = max(source.glob("*.safetensors")).name, tmp_path / "out.partial", os.open

    def fails(path, *args, **kwargs):
        if str(path).endswith(last) and any(partial.glob("*.safetensors")):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(IntegrityError, match="cannot be read: Input/output error"):
        quantize(source, tmp_path / "out")
    monkeypatch.undo()
    assert any(partial.glob("*.safetensors"))
    quantize(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_too_little_disk_space_is_reported_before_anything_is_written(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(Exception, match="10,000 free") as caught:
        quantize(llama, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
