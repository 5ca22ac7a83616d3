"""``adaptkit stack`` as a process."""

import json
import re
from pathlib import Path

import pytest
from folders import edit_json, tree

from adaptkit.discovery import load, names
from adaptkit.numerics import stacking

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_method_with_what_it_does(run_cli):
    done = run_cli("stack", "--help")
    assert done.code == 0
    listed = done.stdout.partition("Methods:")[2]
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == names(stacking)
    assert "TIES: keep each adapter's largest elements" in listed


def test_the_table_reports_the_energy_kept_and_json_reports_it_by_module(run_cli, adapter, second_adapter, tmp_path):
    arguments = ["stack", adapter, second_adapter, "--method", "ties", "--density", "0.4", "--rank", "2"]
    done = run_cli(*arguments, "-o", tmp_path / "one")
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    assert "2 adapters by ties (density 0.4, lambda 1)" in done.stdout
    assert "14, rank 2; 8 not in every adapter" in done.stdout
    report = json.loads(run_cli(*arguments, "-o", tmp_path / "two", "--json").stdout)
    assert report["modules"] == len(report["per_module"]) == 14
    assert report["settings"] == {"density": 0.4, "lambda": 1.0}
    assert set(report["per_module"][0]) == {"module", "adapters", "rank", "norm", "energy_kept"}
    worst = min(report["per_module"], key=lambda entry: entry["energy_kept"])
    assert re.search(rf"kept least +{100 * worst['energy_kept']:.3g} % {re.escape(worst['module'])}", done.stdout)
    assert f"{100 * report['energy_kept']:.3g} % of the squared norm" in done.stdout
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "code", "message", "hint"),
    [
        (["--method", "magic"], 2, "must be one of breadcrumbs, cat, dare", "How to combine"),
        (["--method", "ties", "--seed", "3"], 2, "ties does not use --seed", "--density, --lambda"),
        (["--rank", "4", "--energy", "0.9"], 2, "cannot be combined", "leave out --rank or --energy"),
        (["--weight", "0", "--weight", "0"], 2, "nothing is left", "check each --weight"),
        (["--method", "knots", "--weight", "1e300", "--weight", "1"], 5, "too large for float32", "smaller"),
    ],
)
def test_bad_requests_end_in_an_error_and_a_hint_and_write_nothing(
    run_cli, adapter, second_adapter, tmp_path, options, code, message, hint
):
    error, told = run_cli("stack", adapter, second_adapter, "-o", tmp_path / "out", *options).refusal(code)
    assert message in error
    assert hint in told
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_different_bases_are_refused_with_exit_code_4(
    run_cli, llama, adapter, second_adapter, certified, tmp_path
):
    import tiny

    other = tiny.write_llama(tmp_path / "other", seed=9)
    parts = [certified(adapter, llama), certified(second_adapter, other)]
    done = run_cli("stack", *parts, "-o", tmp_path / "out", "--method", "ties")
    assert done.code == 4
    assert "different bases" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_documented_options_and_defaults_are_those_of_the_methods():
    """The table in docs/stack.md has one row per method: name, source, space, options, rank."""
    text = (ROOT / "docs" / "stack.md").read_text(encoding="utf-8")
    rows = {
        name: cells for name, *cells in re.findall(r"^\| `(\w+)` \|(.*?)\|(.*?)\|(.*?)\|(.*?)\|$", text, re.MULTILINE)
    }
    assert set(rows) == set(names(stacking))
    for name, (source, _, options, rank) in rows.items():
        method = load(stacking, name, "METHOD")
        defaults = {part.rstrip("_"): value for part, value in vars(method.options()).items()}
        assert dict(re.findall(r"`--(\w+)` ([\d.]+)", options)) == {k: f"{v:g}" for k, v in defaults.items()}, name
        assert set(re.findall(r"\d{4}\.\d{5}", source)) <= set(re.findall(r"\d{4}\.\d{5}", method.source)), name
        assert rank.strip() == {"as given": "sum", "largest": "largest", "sum": "sum"}[method.length], name


def test_a_stack_of_changes_that_cancel_says_so(run_cli, adapter, second_adapter, tmp_path):
    """Its factors are kept as they are, and each of them is large."""
    everywhere = "the changes cancel in every module, such as model.layers.0.mlp.down_proj, where the result is only"
    for name, others, weights, note in (
        ("opposite", [adapter, adapter], (1, -1), everywhere),
        ("half", [adapter, adapter, second_adapter], (1, -1, 1), "the changes cancel in 8 of 14 modules, such as "),
        ("nearly", [adapter, adapter], (1, -0.9999), ""),
        ("sum", [adapter, adapter], (1, 1), ""),
    ):
        asked = [word for weight in weights for word in ("--weight", weight)]
        done = run_cli("stack", *others, "-o", tmp_path / name, *asked)
        assert done.code == 0, done.stderr
        assert ("the changes cancel" in done.stdout) == bool(note)
        assert note in done.stdout


@pytest.mark.parametrize("command", ["stack", "merge"])
def test_an_adapter_given_several_times_is_named_once_in_the_report(
    run_cli, copy_of, llama, adapter, second_adapter, tmp_path, command
):
    copy, scaled = copy_of(adapter, "copy"), copy_of(adapter, "scaled")
    edit_json(scaled / "adapter_config.json", lora_alpha=1)  # other changes from the same tensors
    asked = [command, *([llama] if command == "merge" else []), "-o", tmp_path / "out", "--dry-run", "--json"]

    def told(*adapters):
        return [note for note in json.loads(run_cli(*asked, *adapters).stdout)["notes"] if "given" in note]

    assert told(adapter, second_adapter, scaled) == []
    assert told(adapter, second_adapter, adapter) == [f"{adapter}: given 2 times; it counts each time"]
    assert told(copy, adapter, copy) == [f"{copy}: given 3 times, also as {adapter}; it counts each time"]
