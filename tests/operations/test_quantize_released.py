"""A model released in FP8 or MXFP4 is quantized as the 16-bit checkpoint that dequantize would write."""

import json
from functools import cache

import pytest
import released
import tiny
import torch
from folders import edited_tensors, flip, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.checkpoint.decoded import open_plain
from adaptkit.checkpoint.manifest import TensorRecord, require_manifest, tensors_root
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, IntegrityError
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations import _shards
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import Calibration, QuantizeOptions, quantize
from adaptkit.operations.verify import VerifyOptions, verify

KINDS = ("fp8", "mxfp4", "deepseek_v4")
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Make a release of a kind and its 16-bit checkpoint, side by side and once."""
    folder = tmp_path_factory.mktemp("released")
    write = {"fp8": released.write_fp8, "mxfp4": released.write_mxfp4, "deepseek_v4": released.write_deepseek_v4}

    @cache
    def made(kind):
        release, plain = write[kind](folder / kind), folder / f"{kind}-plain"
        dequantize(release, plain)
        return release, plain

    return made


def without_manifest(folder):
    return {name: content for name, content in tree(folder).items() if name != "adaptkit-manifest.json"}


@pytest.mark.parametrize(
    ("kind", "moe"),  # fp8 has no experts
    [*((kind, "keep") for kind in KINDS), *((kind, "quantize") for kind in KINDS if kind != "fp8")],
)
def test_the_files_are_those_made_from_the_16_bit_checkpoint(releases, kind, moe, tmp_path):
    release, plain = releases(kind)
    options = QuantizeOptions(moe=moe, max_shard_bytes=60_000)
    report = quantize(release, tmp_path / "one", options)
    quantize(plain, tmp_path / "two", options)
    assert report.quantized > 5
    assert len(Checkpoint(tmp_path / "one").headers) > 1
    assert without_manifest(tmp_path / "one") == without_manifest(tmp_path / "two")


@pytest.mark.parametrize(("kind", "piece"), [("fp8", 130), ("mxfp4", 3000), ("deepseek_v4", 130)])
def test_pieces_do_not_change_the_files(releases, kind, piece, tmp_path, monkeypatch):
    release, _ = releases(kind)
    options = QuantizeOptions(moe="keep" if kind == "fp8" else "quantize")
    quantize(release, tmp_path / "one", options)
    monkeypatch.setattr(_shards, "PIECE_BYTES", piece)
    quantize(release, tmp_path / "two", options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(("columns", "are_whole"), [(11008, True), (11003, False)])
def test_pieces_are_whole_rows_unless_they_would_be_large_for_it(columns, are_whole):
    pieces = _shards.cut_pieces(TensorSpec("weight", "BF16", (4096, columns)), 4096, columns)
    assert all(piece.start % 4096 == 0 and 2 * piece.count <= _shards.PIECE_BYTES for piece in pieces)
    assert all(piece.start % columns == 0 for piece in pieces) == are_whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_read_of_the_view_is_of_the_16_bit_checkpoint(releases, kind):
    release, plain = releases(kind)
    view, expected = open_plain(release), Checkpoint(plain)
    assert list(view.tensors) == list(expected.tensors)
    assert view.config == expected.config

    @settings(max_examples=60)
    @given(st.sampled_from(sorted(view.tensors)), st.data())
    def same(name, data):
        spec = view.spec(name)
        assert spec == expected.spec(name)
        start = data.draw(st.integers(0, spec.nbytes))
        count = data.draw(st.integers(0, spec.nbytes - start))
        assert bytes(view.read_bytes(name, start, count)) == bytes(expected.read_bytes(name, start, count))
        first = data.draw(st.integers(0, spec.count))
        some = data.draw(st.integers(0, spec.count - first))
        assert view.read_flat(name, first, some).tobytes() == expected.read_flat(name, first, some).tobytes()

    same()


@pytest.mark.parametrize("kind", KINDS)
def test_the_release_alone_is_enough_to_repeat_it(releases, kind, tmp_path):
    release, plain = releases(kind)
    quantize(release, tmp_path / "nf4")
    base, parent = require_manifest(tmp_path / "nf4").parents
    assert (base.role, base.kind) == ("base", "checkpoint")
    assert base.tensors_root == require_manifest(plain).tensors_root
    files = Checkpoint(release)
    records = [TensorRecord.of(at.spec, released.fingerprint(files, name)) for name, at in files.tensors.items()]
    assert (parent.role, parent.tensors_root) == ("release", tensors_root(records))
    with_plain = kind == "fp8"
    parents = releases(kind)[: 1 + with_plain]
    report = verify(tmp_path / "nf4", VerifyOptions(parents=parents, recompute=True))
    assert [result for _, result in report.recomputed][-1] == "same bytes"
    assert [(p.role, p.state) for p in report.parents] == [
        ("base", "verified" if with_plain else "never written"),
        ("release", "verified"),
    ]


def test_a_changed_release_is_not_the_parent(releases, copy_of, tmp_path):
    quantize(releases("fp8")[0], tmp_path / "nf4")
    other = copy_of(releases("fp8")[0])
    flip(other / "model.safetensors", Checkpoint(other).tensors[f"{GATE}_scale_inv"].position)
    problem = r"1 of 2 ancestors cannot be verified: release \w+ not found; base \w+ never written\n"
    with pytest.raises(IntegrityError, match=problem):
        verify(tmp_path / "nf4", VerifyOptions(parents=(other,)))


def test_what_was_trained_on_it_is_verified_against_the_16_bit_checkpoint(releases, tmp_path, run_cli):
    release, plain = releases("fp8")
    done = run_cli("quantize", release, "-o", tmp_path / "nf4")
    assert done.code == 0, done.stderr
    assert "source           fp8, decoded to bfloat16\n" in done.stdout
    data = tiny.write_instructions(tmp_path / "rows.jsonl")
    options = ["--steps", "1", "--max-length", "64", "-o", tmp_path / "adapter"]
    done = run_cli("train", "--base", tmp_path / "nf4", "--data", data, *options)
    assert done.code == 0, done.stderr
    assert merge(plain, tmp_path / "adapter", tmp_path / "merged").base_verified
    done = run_cli("evaluate", "--base", release, "--adapter", tmp_path / "adapter", "--data", data)
    assert done.code == 0, done.stderr  # the release's decoded values are those that the adapter's base was made from
    assert merge(release, tmp_path / "adapter", tmp_path / "merged back").base_verified


def test_the_size_before_is_that_of_the_release(tmp_path, run_cli):
    release = released.write_fp8(tmp_path / "model", block=None, input_scales=True)
    done = run_cli("quantize", release, "-o", tmp_path / "nf4", "--json")
    report = json.loads(done.stdout)
    assert report["bytes_before"] == Checkpoint(release).nbytes
    assert (report["decoded_from"], report["input_scales"]) == ("fp8", 14)
    done = run_cli("quantize", release, "-o", tmp_path / "other", "--dry-run")
    assert "fp8, decoded to bfloat16; left out 14 scales of 8-bit inputs" in done.stdout


def test_calibration_and_a_budget_run_on_a_release(releases, instructions, tmp_path):
    release, plain = releases("fp8")
    options = QuantizeOptions(calibration=Calibration((instructions,), tokens=64, window=32, bits_budget=6.5))
    quantize(release, tmp_path / "one", options)
    quantize(plain, tmp_path / "two", options)
    assert without_manifest(tmp_path / "one") == without_manifest(tmp_path / "two")
    base, parent = require_manifest(tmp_path / "one").parents
    assert (base.role, parent.role) == ("base", "release")


def test_a_released_base_that_was_only_decoded_is_asked_for_by_merge(releases, adapter, tmp_path):
    quantize(releases("fp8")[0], tmp_path / "alone" / "nf4")
    with pytest.raises(CheckpointError, match="was not found beside it") as caught:
        merge(tmp_path / "alone" / "nf4", adapter, tmp_path / "out")
    assert caught.value.hint.startswith("run: adaptkit dequantize RELEASE -o PLAIN")


def test_weights_too_large_for_bfloat16_are_refused_as_such_and_can_be_quantized_from_float32(
    releases, copy_of, run_cli, tmp_path
):
    folder = copy_of(releases("fp8")[0])
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors[GATE].view(torch.uint8)[0, 0] = 0x7E  # 448
        tensors[f"{GATE}_scale_inv"][0, 0] = 7.59e35  # the product is less than the largest float32
    error, hint = run_cli("quantize", folder, "-o", tmp_path / "out").refusal(5)
    assert error == f"error: {GATE}: a weight is too large for bfloat16"
    assert hint == f"hint: run: adaptkit dequantize {folder} -o PLAIN --dtype float32; then use PLAIN"
    assert not list(tmp_path.glob("out*"))
    assert run_cli("dequantize", folder, "-o", tmp_path / "plain", "--dtype", "float32").code == 0
    assert run_cli("quantize", tmp_path / "plain", "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_the_weights_and_their_bits(releases, kind):
    release, plain = releases(kind)
    report, files = inspect(release), Checkpoint(release)
    assert report.parameters == inspect(plain).parameters
    assert report.kind == "quantized"
    view = open_plain(release)
    codes = [view.spec(name) for name in view.tensors if view.unit(name) > 1]
    parts = {part for name in view.tensors if view.unit(name) > 1 for part in view.fingerprints_of_parts(name)}
    assert report.details["quantized_matrices"] == len(codes)
    inside = sum(spec.count for spec in codes)
    bits = 8 * sum(files.spec(part).nbytes for part in parts) / inside
    assert report.details["bits_per_quantized_parameter"] == pytest.approx(bits, abs=1e-3)
