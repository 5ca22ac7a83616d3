"""The result does not depend on how the work is divided: pieces, shards, shares and interrupted runs."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from folders import edited_tensors, tree
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint._journal_file import read_journal
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.part import Part
from adaptkit.errors import BaseMismatchError, ConflictError, IntegrityError, NonFiniteError, UsageError
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


@pytest.mark.parametrize("piece", [130, 8200])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 128}])
def test_pieces_do_not_change_the_result(llama, tmp_path, monkeypatch, piece, options):
    quantize(llama, tmp_path / "whole", QuantizeOptions(**options))
    dequantize(tmp_path / "whole", tmp_path / "plain")
    monkeypatch.setattr(_shards, "PIECE_BYTES", piece)
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    dequantize(tmp_path / "out", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "plain")


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
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


def share(llama, out, number, total, **options):
    return quantize(llama, out, QuantizeOptions(max_shard_bytes=SMALL, part=Part(number, total), **options))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 2, 1, 3)])
def test_joined_shares_equal_the_result_of_one_run(llama, sharded, tmp_path, order):
    for number in order:
        report = share(llama, tmp_path / "out", number, 3)
        assert (report.part, report.manifest_sha256) == ((number, 3), None)
        assert not (tmp_path / "out").exists()
    quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert tree(tmp_path / "out") == tree(sharded)
    assert not (tmp_path / "out.partial").exists()


def test_a_share_writes_its_shards_and_no_others(llama, sharded, tmp_path):
    every = {path.name for path in sharded.glob("*.safetensors")}
    made = []
    for number in (1, 2, 3):
        share(llama, tmp_path / str(number), number, 3)
        made.append({path.name for path in (tmp_path / f"{number}.partial").glob("*.safetensors")})
    assert all(made)
    assert set.union(*made) == every
    assert sum(len(names) for names in made) == len(every)


def test_joining_does_not_rewrite_shards(llama, sharded, tmp_path):
    for number in (1, 2):
        share(llama, tmp_path / "out", number, 2)
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    before = {path.name: path.stat().st_ino for path in shards}
    assert len(before) == len(list(sharded.glob("*.safetensors")))
    quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")} == before


def test_missing_shares_are_made_when_joining(llama, sharded, tmp_path):
    share(llama, tmp_path / "out", 2, 3)
    quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert tree(tmp_path / "out") == tree(sharded)


def test_shares_from_copies_of_the_source_can_be_joined(llama, sharded, copy_of, tmp_path):
    """On several machines, paths and times differ."""
    share(copy_of(llama, "elsewhere"), tmp_path / "out", 1, 2)
    share(llama, tmp_path / "out", 2, 2)
    quantize(copy_of(llama, "third"), tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert tree(tmp_path / "out") == tree(sharded)


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


def test_a_nonfinite_checkpoint_leaves_nothing_but_earlier_shares(llama, copy_of, tmp_path):
    bad, options = copy_of(llama, "bad"), QuantizeOptions(max_shard_bytes=SMALL)
    with edited_tensors(bad / "model.safetensors") as tensors:
        for name in sorted(tensors)[len(tensors) // 2 :]:  # so that both shares contain one
            tensors[name].view(-1)[7] = float("nan")
    with pytest.raises(NonFiniteError):
        quantize(bad, tmp_path / "out", options)
    assert not (tmp_path / "out.partial").exists()
    share(llama, tmp_path / "out", 1, 2)
    before = tree(tmp_path / "out.partial")
    with pytest.raises(NonFiniteError):
        share(bad, tmp_path / "out", 2, 2)
    with pytest.raises((NonFiniteError, BaseMismatchError)):
        quantize(bad, tmp_path / "out", options)
    after = tree(tmp_path / "out.partial")
    assert all(after[name] == before[name] for name in before)


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


def test_shares_of_different_checkpoints_are_not_joined(llama, copy_of, tmp_path):
    other = copy_of(llama, "other")
    with edited_tensors(other / "model.safetensors") as tensors:
        for value in tensors.values():
            value.view(-1)[5] += 1
    for number, source in ((1, llama), (2, other)):
        share(source, tmp_path / "out", number, 2)
    before = tree(tmp_path / "out.partial")
    for base in (llama, other, copy_of(llama, "third")):
        with pytest.raises(BaseMismatchError, match=r"was not made from the \S+ of") as caught:
            quantize(base, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
        assert caught.value.exit_code == 4
    assert tree(tmp_path / "out.partial").keys() >= before.keys()
    assert not (tmp_path / "out").exists()


def test_shares_of_a_source_that_changed_meanwhile_are_not_joined(llama, copy_of, tmp_path):
    source = copy_of(llama)
    share(source, tmp_path / "out", 1, 2)
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    with pytest.raises(ConflictError, match="other options, inputs or shares"):
        share(source, tmp_path / "out", 2, 2)
    options = QuantizeOptions(max_shard_bytes=SMALL)
    with pytest.raises(ConflictError, match="other options, inputs or shares"):
        quantize(source, tmp_path / "out", options)
    quantize(source, tmp_path / "out", options, force=True)
    quantize(source, tmp_path / "fresh", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_shares_with_different_options_or_totals_are_refused(llama, tmp_path):
    share(llama, tmp_path / "out", 1, 2)
    before = tree(tmp_path / "out.partial")
    with pytest.raises(ConflictError):
        share(llama, tmp_path / "out", 2, 2, double_quant=False)
    with pytest.raises(ConflictError):
        share(llama, tmp_path / "out", 2, 3)
    assert tree(tmp_path / "out.partial") == before
    share(llama, tmp_path / "out", 2, 2)
    both = tree(tmp_path / "out.partial")
    for options in (QuantizeOptions(), QuantizeOptions(max_shard_bytes=SMALL, double_quant=False)):
        with pytest.raises(ConflictError, match="other options, inputs or shares"):
            quantize(llama, tmp_path / "out", options)
        assert tree(tmp_path / "out.partial") == both


def test_a_share_does_not_change_a_folder_that_adaptkit_did_not_make(llama, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ConflictError, match="in the way, and adaptkit did not make it"):
        share(llama, tmp_path / "out", 1, 2)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


@pytest.fixture
def begun_beside(tmp_path):
    """The partial folder of a share that starts at the same moment, or was killed then: an empty journal."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "adaptkit-journal-2-of-2.jsonl").touch()
    return tmp_path / "out.partial"


def test_a_share_starts_while_the_other_has_only_an_empty_journal(begun_beside, llama, sharded, tmp_path):
    share(llama, tmp_path / "out", 1, 2)
    share(llama, tmp_path / "out", 2, 2)
    quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert tree(tmp_path / "out") == tree(sharded)


def test_an_empty_journal_does_not_identify_a_folder_as_adaptkits(begun_beside, llama, tmp_path):
    (begun_beside / "thesis.txt").touch()
    with pytest.raises(ConflictError, match="in the way, and adaptkit did not make it"):
        share(llama, tmp_path / "out", 1, 2)


def test_a_missing_journal_is_read_as_none(tmp_path):
    assert read_journal(tmp_path / "adaptkit-journal-2-of-2.jsonl", repair=False) is None


@pytest.mark.parametrize(("number", "total"), [(0, 2), (3, 2), (-1, 2), (1, 0)])
def test_invalid_share_numbers_are_refused(number, total):
    with pytest.raises(UsageError):
        Part(number, total)


def test_shares_can_be_made_concurrently(llama, sharded, tmp_path, run_cli):
    def share_apart(number):
        return run_cli(
            "quantize", llama, "-o", tmp_path / "out", "--part", f"{number}/2", "--max-shard-size", f"{SMALL}B"
        )

    with ThreadPoolExecutor(2) as pool:
        assert [done.code for done in pool.map(share_apart, (1, 2))] == [0, 0]
    quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=SMALL))
    assert tree(tmp_path / "out") == tree(sharded)


def test_too_little_disk_space_is_reported_before_anything_is_written(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(Exception, match="10,000 free") as caught:
        quantize(llama, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_neither_shares_nor_threads(sharded):
    assert not {"part", "threads"} & set(require_manifest(sharded).operation["options"])
