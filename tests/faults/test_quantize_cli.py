"""``quantize`` with unusual or bad input, with signals and with resuming: correct errors, and nothing is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from folders import edited_tensors, tree
from safetensors.torch import load_file

from adaptkit.checkpoint.journal import append_line
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import DiskError, TensorWriter
from adaptkit.errors import BaseMismatchError, DataError, IntegrityError, UsageError
from adaptkit.operations import _shards
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import Calibration, QuantizeOptions, quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.evaluation.evaluate import evaluate
from adaptkit.training.network.start import read_start


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The rivers in the north are in the water and on the hill.\n" * 40)
    return path


def poisoned(folder, name):
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors[name][3, 5] = float("nan")
    return folder


@pytest.mark.parametrize("where", ["out", "out/init", "out.partial/init", "."])
def test_a_companion_path_that_conflicts_with_its_base_is_refused_before_the_work(llama, text, tmp_path, where):
    options = QuantizeOptions(calibration=Calibration((text,), 128, 64, init_rank=2))
    with pytest.raises(UsageError) as caught:
        quantize(llama, tmp_path / "x" / "out", options, companion=tmp_path / "x" / where)
    assert caught.value.hint
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("model.layers.1.mlp.up_proj.weight", []),
        ("model.embed_tokens.weight", ["--bits-budget", 8]),
    ],
)
def test_calibration_names_a_weight_that_is_not_finite(llama, text, copy_of, tmp_path, run_cli, name, more):
    source = poisoned(copy_of(llama), name)
    calibration = ["--calibrate", text, "--calibration-tokens", 128, "--window", 64, *more]
    done = run_cli("quantize", source, "-o", tmp_path / "out", *calibration)
    assert done.code == 5
    assert done.stderr.splitlines()[0] == f"error: {name}: the weight at [3, 5] is nan"
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_it_is_read_is_not_published(llama, copy_of, tmp_path):
    source = copy_of(llama)

    def touch(done, total):
        if done == total:
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(IntegrityError, match=r"model\.safetensors changed while it was read"):
        quantize(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_source_that_vanishes_while_it_is_read_is_named(llama, copy_of, monkeypatch):
    checkpoint = Checkpoint(copy_of(llama))
    (checkpoint.root / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors: cannot be read"):
        checkpoint.read("model.norm.weight")
    with pytest.raises(IntegrityError, match=r"model\.safetensors: cannot be read"):
        checkpoint.state()


def test_a_file_in_place_of_the_output_folder_is_a_disk_error_that_names_the_output(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(DiskError) as caught, TensorWriter(file, "model.safetensors", []):
        pass
    assert caught.value.message == f"{file}/model.safetensors: cannot write: {os.strerror(errno.EEXIST)}"
    assert file.read_text() == "kept"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_journal_on_a_full_disk_is_an_error_with_a_hint_to_resume():
    with pytest.raises(DiskError, match="No space left") as caught:
        append_line(Path("/dev/full"), {"key": "value"})
    assert "same command again to resume" in caught.value.hint


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
@pytest.mark.parametrize("piece", [600, 4 << 20])
def test_codes_stored_as_floats_are_read(llama, tmp_path, monkeypatch, storage, piece):
    """bitsandbytes stores the same bytes as another dtype if ``bnb_4bit_quant_storage`` says so."""
    quantize(llama, tmp_path / "packed")
    dequantize(tmp_path / "packed", tmp_path / "expected")
    file = tmp_path / "packed" / "model.safetensors"
    with edited_tensors(file) as tensors:
        for name in [name.partition(".quant_state.")[0] for name in tensors if ".quant_state." in name]:
            tensors[name] = tensors[name].flatten().view(getattr(torch, storage)).view(-1, 1)
    (tmp_path / "packed" / MANIFEST_NAME).unlink()  # bitsandbytes writes none
    monkeypatch.setattr(_shards, "PIECE_BYTES", piece)
    dequantize(tmp_path / "packed", tmp_path / "plain")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "plain"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def begin(source, output, *more):
    """Start ``adaptkit quantize`` in its own process group."""
    command = [sys.executable, "-m", "adaptkit.cli.main", "quantize", source, "-o", output, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see what is loaded")
@pytest.mark.parametrize(
    ("when", "number"),
    [("_multiarray_umath", signal.SIGINT), ("libllvmlite", signal.SIGTERM), ("out.partial", signal.SIGINT)],
)
def test_a_signal_at_startup_ends_cleanly_and_the_command_can_be_repeated(llama, tmp_path, when, number):
    """The signal arrives while numpy or LLVM is being loaded, or while shards are written."""
    process = begin(llama, tmp_path / "out", "--json")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: (tmp_path / when).exists() or when in maps.read_text())
    process.send_signal(number)
    output, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (128 + number, "")
    assert json.loads(output)["error"]["retryable"]
    assert is_gone(process.pid)
    quantize(llama, tmp_path / "out")
    quantize(llama, tmp_path / "at-once")
    files = tree(tmp_path / "at-once")
    assert tree(tmp_path / "out") == files


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see what is loaded")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_signal_has_the_right_exit_code_even_if_the_output_is_closed(llama, tmp_path, more):
    process = begin(llama, tmp_path / "out", *more)
    process.stdout.close()
    if not more:
        process.stderr.close()
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libllvmlite" in maps.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    if more:
        assert process.stderr.read().startswith("error: terminated\n")  # since the document could not be written
        process.stderr.close()


def test_options_that_need_calibration_are_refused_without_it(llama, tmp_path, run_cli):
    for flag, *value in (
        ("--calibration-tokens", 4096),
        ("--window", 512),  # the default
        ("--no-compensate",),
        ("--init-adapter", 4),
        ("--bits-budget", 4.5),
    ):
        error, hint = run_cli("quantize", llama, "-o", tmp_path / "out", flag, *value).refusal(2)
        assert error == f"error: {flag.replace('no-', '')}: needs --calibrate"
        assert "--calibrate FILE" in hint
        assert list(tmp_path.iterdir()) == []


def test_calibration_text_from_a_pipe_is_refused(llama, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe"):
        quantize(llama, tmp_path / "out", QuantizeOptions(calibration=Calibration((tmp_path / "pipe",), 128, 64)))


def test_a_companion_is_refused_if_there_is_no_error_to_offset(text, tmp_path):
    """The stacked experts, which are not calibrated, leave enough of the budget to keep all others in 16 bits."""
    source = tiny.write_family(tmp_path / "source", "mixtral", fused_experts=True)
    options = QuantizeOptions(moe="quantize", calibration=Calibration((text,), 128, 64, init_rank=2, bits_budget=9))
    with pytest.raises(UsageError) as caught:
        quantize(source, tmp_path / "out", options)
    assert "nothing to offset" in caught.value.message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-init").exists()


def test_windows_longer_than_the_reference_allows_are_refused(llama, gpt2, text, tmp_path):
    with pytest.raises(UsageError, match=r"gpt2: windows of 512 tokens are longer than") as caught:
        evaluate(llama, text=[text], reference=gpt2)
    assert caught.value.hint.endswith("--window 128")


@pytest.fixture(scope="module")
def with_companion(llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("companion") / "out"
    quantize(llama, out, QuantizeOptions(calibration=Calibration((text,), 128, 64, init_rank=2)))
    return out, out.with_name("out-init")


def test_a_companion_without_its_record_is_refused_by_merge_and_train(llama, with_companion, copy_of, tmp_path):
    base, companion = with_companion[0], copy_of(with_companion[1])
    (companion / COMPENSATION_NAME).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        merge(llama, [companion], tmp_path / "merged")
    with pytest.raises(IntegrityError, match="is missing"):
        read_start(TrainConfig(str(base), (str(base),), init=str(companion)), require_manifest(base))
    assert not (tmp_path / "merged").exists()


def test_a_companion_without_a_manifest_is_not_trained(with_companion, copy_of):
    base, companion = with_companion[0], copy_of(with_companion[1])
    config = TrainConfig(str(base), (str(base),), init=str(companion))
    assert read_start(config, require_manifest(base)) is not None
    (companion / MANIFEST_NAME).unlink()
    with pytest.raises(BaseMismatchError, match="no manifest"):
        read_start(config, require_manifest(base))
