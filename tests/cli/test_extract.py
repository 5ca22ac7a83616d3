"""``adaptkit extract`` and ``adaptkit resize`` as processes: their output and their errors."""

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.manifest import require_manifest


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A copy of a base with rank-3 matrices added to its linear layers and with scaled norms; and the base."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.write_llama(folder / "base", dtype="float32")
    shutil.copytree(base, folder / "tuned")
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "_proj" in name:
            out, columns = tensor.shape
            b, a = torch.randn(out, 3, generator=generator), torch.randn(3, columns, generator=generator)
            tensor += 0.01 * b * torch.tensor([4.0, 2.0, 1.0]) @ a
        elif "norm" in name:
            tensor *= 1.5
    save_file(tensors, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return folder / "tuned", base


def table(text):
    """Label -> the rest of its line; continuation lines are left out."""
    return dict(re.findall(r"^(\S.*?)  +(.*)$", text, re.MULTILINE))


def test_extract_reports_how_much_of_the_change_is_kept(run_cli, tmp_path, pair):
    done = run_cli("extract", *pair, "-o", tmp_path / "out", "--rank", 3)
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    rows = table(done.stdout)
    assert rows["wrote"] == str(tmp_path / "out")
    assert rows["equal"] == "1 of 20 tensors"
    assert rows["low-rank"] == "14 modules, rank 3"
    assert rows["change"].startswith("kept 100 % of the change; 0 modules below 90 %; relative error ")
    assert rows["saved whole"] == "5 tensors (5 norm)"
    assert rows["manifest sha256"] == require_manifest(tmp_path / "out").sha256
    low = table(run_cli("extract", *pair, "-o", tmp_path / "low", "--rank", 1).stdout)
    kept = float(re.match(r"kept ([\d.]+) % of the change; 14 modules below 90 %", low["change"])[1])
    assert 60 < kept < 90
    assert re.match(r"[\d.]+ % model\.layers\.\d\.\S+ \(rank 1; 99 % needs rank 3\)$", low["kept least"])


def test_the_json_document_of_extract_does_not_depend_on_the_number_of_threads(run_cli, tmp_path, pair):
    options = ["--rank", 2, "--only-linear", "--target", "*.q_proj", "--target", "*norm"]
    runs = [run_cli("extract", *pair, "-o", tmp_path / str(n), *options, "--threads", n, "--json") for n in (1, 2)]
    report, other = (json.loads(done.stdout) for done in runs)
    assert all(done.stderr == "" for done in runs)
    assert report["manifest_sha256"] == other["manifest_sha256"]
    assert [module["rank"] for module in report["modules"]] == [2, 2]
    assert {(entry["name"].split(".")[-2], entry["why"]) for entry in report["left_out"]} >= {("norm", "norm")}
    assert report["left_out_energy"] > 0


def test_dry_runs_of_extract_and_resize_write_nothing(run_cli, tmp_path, pair, adapter):
    done = run_cli("extract", *pair, "-o", tmp_path / "out", "--rank", 2, "--dry-run")
    assert done.code == 0
    assert table(done.stdout)["would compare"] == "20 tensors, 14 of them weights of linear layers"
    done = run_cli("resize", adapter, "-o", tmp_path / "out", "--rank", 2, "--dry-run")
    assert done.code == 0
    assert table(done.stdout)["would write"] == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_resize_reports_how_much_of_the_norm_is_kept(run_cli, tmp_path, adapter):
    done = run_cli("resize", adapter, "-o", tmp_path / "out", "--rank", 2)
    assert (done.code, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["resized"] == "14 modules; 0 unchanged"
    assert rows["parameters"] == "8,192 -> 4,096"
    assert 20 < float(re.match(r"([\d.]+) % of the squared norm", rows["kept"])[1]) < 100
    assert "not padded" not in rows
    wide = table(run_cli("resize", adapter, "-o", tmp_path / "wide", "--rank", 9).stdout)
    assert wide["resized"] == "0 modules; 14 unchanged"
    assert wide["not padded"] == "14 modules have a smaller rank already"
    quiet = run_cli("resize", adapter, "-o", tmp_path / "wide", "--rank", 2, "--quiet", "--force")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert require_manifest(tmp_path / "wide").sha256 == rows["manifest sha256"]
    report = json.loads(run_cli("resize", adapter, "-o", tmp_path / "json", "--energy", "0.5", "--json").stdout)
    assert {entry["module"]: entry["rank"] for entry in report["modules"]} == {
        module: term.rank for module, term in read_adapter(tmp_path / "json").modules.items()
    }


@pytest.fixture(scope="module")
def failing(pair, adapter, tmp_path_factory, run_cli):
    """Command lines that must fail: arguments, exit code, a phrase of the message."""
    tuned, base = pair
    folder = tmp_path_factory.mktemp("failing")
    shutil.copytree(tuned, folder / "whole")
    run_cli("quantize", base, "-o", folder / "nf4", "--quiet")
    shutil.copytree(tuned, folder / "nan")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"][2] = float("nan")
    save_file(tensors, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    tensors["model.norm.weight"] = torch.ones(tensors["model.norm.weight"].shape, dtype=torch.int32)
    save_file(tensors, folder / "whole" / "model.safetensors", metadata={"format": "pt"})
    rank = ["-o", "out", "--rank", "2"]
    return {
        "quantized": (["extract", folder / "nf4", base, *rank], 5, "quantized with bitsandbytes"),
        "not finite": (["extract", folder / "nan", base, *rank], 5, "model.norm.weight holds NaN or infinity"),
        "another type": (["extract", folder / "whole", base, *rank], 4, "dtype differs from"),
        "itself": (["extract", base, base, *rank], 2, "hold the same weights"),
        "exists": (["extract", tuned, base, "-o", folder / "nan", "--rank", "2"], 8, "already exists"),
        "resize too much": (["resize", adapter, "-o", "out", "--energy", "2"], 2, "must be above 0 and at most 1"),
        "resize no adapter": (["resize", base, *rank], 5, "not an adapter"),
    }


def test_bad_input_prints_only_an_error_and_a_hint_and_exits_with_its_code(failing, run_cli, tmp_path):
    for case, (arguments, code, phrase) in failing.items():
        error, _ = run_cli(*arguments, cwd=tmp_path).refusal(code)
        assert phrase in error, case
        assert not (tmp_path / "out").exists(), case
