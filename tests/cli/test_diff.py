"""``adaptkit diff``: its output, its exit codes, and its errors for unusable input."""

import functools
import json
import shutil

import peft_adapters
import pytest
from folders import edit_json, edited_tensors

from adaptkit.operations.quantize import QuantizeOptions, quantize

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def changed(tmp_path_factory, llama):
    """A copy of the checkpoint with one matrix and one key changed."""
    folder = tmp_path_factory.mktemp("changed") / "changed"
    shutil.copytree(llama, folder)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.25
    edit_json(folder / "config.json", rope_theta=7.0)
    return folder


@pytest.fixture(scope="module")
def ran(run_cli, adapter, second_adapter, llama, changed):
    """A function from a pair's name and options to the finished command; each command runs once."""
    pairs = {
        "adapters": (adapter, second_adapter),
        "adapter": (adapter, adapter),
        "checkpoints": (llama, changed),
        "checkpoint": (llama, llama),
    }
    return functools.cache(lambda pair, *options: run_cli("diff", *pairs[pair], *options))


def test_exit_codes_tell_same_from_different_in_every_output_mode(ran):
    for options in ((), ("--json",), ("--quiet",)):
        done = ran("adapters", *options)
        assert (done.code, done.stderr) == (1, "")
        assert (done.stdout == "") == (options == ("--quiet",))
    assert [ran(pair).code for pair in ("adapter", "checkpoint", "checkpoints")] == [0, 0, 1]


def test_the_json_document_has_all_modules_tensors_and_config_differences(ran):
    report = json.loads(ran("adapters", "--json").stdout)
    assert (report["kind"], report["same"], len(report["modules"])) == ("adapter", False, 14)
    assert len(report["modules"][-1]["spectra"][0]) == 4
    report = json.loads(ran("checkpoints", "--json").stdout)
    assert [t["name"] for t in report["tensors"]] == ["model.layers.1.mlp.up_proj.weight"]
    assert report["tensors"][0]["relative"] == pytest.approx(0.2, rel=1e-3)
    assert report["config"] == [{"file": "config.json", "key": "rope_theta", "first": None, "second": "7.0"}]


def rows(done):
    """Label -> value of the table; continuation lines belong to the label above."""
    found, label = {}, ""
    width = len(done.stdout.splitlines()[0]) - len(done.stdout.splitlines()[0].split("  ", 1)[1].lstrip())
    for line in done.stdout.splitlines():
        label = line[:width].strip() or label
        found[label] = "\n".join(filter(None, [found.get(label), line[width:]]))
    return found


def test_the_adapter_table_shows_totals_and_the_most_different_modules(ran):
    table, report = rows(ran("adapters")), json.loads(ran("adapters", "--json").stdout)
    assert table["adapters"] == "different"
    assert table["modules"] == "14 of rank 4 and 6 of rank 2"
    assert float(table["cosine"]) == pytest.approx(report["total"]["cosine"], abs=1e-6)
    assert table["only in first"].startswith("8 modules: model.layers.0.mlp.gate_proj")
    assert "random subspaces" in table["overlap, outputs"]
    first = report["modules"][0]
    assert (
        f"difference {100 * first['relative']:.3g} %" in table[first["module"]] or "only in" in table[first["module"]]
    )
    named = [m["module"] for m in report["modules"][:8]]
    assert [label for label in table if label.startswith("model.")] == named
    assert table["…"] == "6 more in --json"
    same = rows(ran("adapter"))
    assert same["adapters"] == "the same"
    assert not [label for label in same if label.startswith("model.")]


def test_the_adapter_table_lists_differences_in_tensors_other_than_low_rank_pairs(run_cli, made, tmp_path):
    folder = peft_adapters.make(made, "dora").adapter
    twin = shutil.copytree(folder, tmp_path / "twin")
    peft_adapters.change_tensors(twin, lambda t: [v.mul_(2) for k, v in t.items() if "magnitude" in k and ".0." in k])
    table = rows(run_cli("diff", folder, twin))
    assert table["other tensors"] == "3 equal, 3 differ, 0 only in one\n3 × DoRA magnitude"
    assert table["model.layers.0.mlp.down_proj.lora_magnitude_vector"].startswith("difference 50 %, 100 % of the elem")
    assert "DoRA" in table["remark"]


def test_the_checkpoint_table_lists_differences(ran):
    table = rows(ran("checkpoints"))
    assert table["checkpoints"] == "different"
    assert table["tensors"].endswith(", 1 differ")
    assert table["fingerprints"] == "computed from all bytes"
    assert table["config.json"] == "rope_theta: absent -> 7.0"
    assert table["model.layers.1.mlp.up_proj.weight"].startswith("difference 20 %")
    assert list(rows(ran("checkpoint"))) == ["checkpoints", "tensors", "fingerprints"]


def test_the_table_says_which_fingerprints_were_computed_and_which_taken_from_a_manifest(run_cli, llama, tmp_path):
    quantize(llama, tmp_path / "nf4", QuantizeOptions())
    table = rows(run_cli("diff", tmp_path / "nf4", tmp_path / "nf4"))
    assert (table["checkpoints"], "--recompute" in table["fingerprints"]) == ("the same", True)
    table = rows(run_cli("diff", tmp_path / "nf4", tmp_path / "nf4", "--recompute"))
    assert (table["checkpoints"], table["fingerprints"]) == ("the same", "computed from all bytes")
    table = rows(run_cli("diff", llama, tmp_path / "nf4"))
    assert table["quantized"] == "not quantized and bitsandbytes; compared as stored, not decoded"
    assert table["fingerprints"] == "first computed from its bytes; second from its manifest, not read"


def test_an_adapter_and_a_checkpoint_are_refused_with_an_error_and_a_hint(run_cli, adapter, llama, tmp_path):
    error, hint = run_cli("diff", adapter, llama, "--html", tmp_path / "page.html").refusal(2)
    assert "is an adapter, but" in error
    assert hint.startswith("hint: merge the adapter and compare the result")
    assert not (tmp_path / "page.html").exists()


def test_a_page_replaces_only_an_earlier_page(run_cli, adapter, second_adapter, copy_of, tmp_path):
    mine = copy_of(adapter)
    config = mine / "adapter_config.json"
    before = config.read_bytes()
    done = run_cli("diff", mine, second_adapter, "--html", config)
    assert (done.code, config.read_bytes()) == (2, before)
    assert "is not a page of adaptkit" in done.stderr
    for _ in range(2):
        done = run_cli("diff", mine, second_adapter, "--json", "--html", tmp_path / "page.html")
        assert (done.code, json.loads(done.stdout)["same"]) == (1, False)
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_a_difference_that_cannot_be_measured_is_reported_as_unknown(run_cli, llama, copy_of):
    folder = copy_of(llama)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["model.norm.weight"][0] = float("nan")
    done = run_cli("diff", folder, llama)
    assert (done.code, "unknown, since some tensors have no norm" in done.stdout) == (1, True)


def test_an_empty_path_is_not_the_current_folder(run_cli, adapter):
    """A path is empty, for instance, if it comes from a shell variable that is not set."""
    for arguments in (
        ("diff", adapter, ""),
        ("diff", adapter, adapter, "--html", ""),
        ("plan", ""),
        ("run", ""),
        ("run", "recipe.yaml", "--output-file", ""),
        ("evaluate", "--base", adapter, "--data", ""),
        ("quantize", adapter, "-o", ""),
        ("quantize", adapter, "-o", "out", "--calibrate", ""),
        ("train", "-o", "out", "--config", ""),
        ("verify", adapter, "--parents", ""),
        ("pull", "org/name", "-o", "out", "--public-key", ""),
    ):
        done = run_cli(*arguments)
        assert done.code == 2
        assert "path is empty" in done.stderr, arguments


def test_numbers_too_large_for_a_float_are_null_in_the_document(adapter, copy_of, run_cli):
    huge = copy_of(adapter)
    peft_adapters.change_config(huge, lora_alpha=1e308)
    done = run_cli("diff", adapter, huge, "--json")
    assert done.code == 1, done.stderr
    report = json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(constant))
    assert report["total"]["norms"][1] is None
