"""Every kind of step runs its operation and reports the figures that a gate can check."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adaptkit.discovery import load, names
from adaptkit.errors import GateError
from adaptkit.operations.options import Calibration
from adaptkit.operations.verify import verify
from adaptkit.pipeline import steps as registry
from adaptkit.pipeline.artifact import kind_of
from adaptkit.pipeline.reading import read_recipe
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.run import InputReport, Listener, OutputReport, RunReport, StepResult, run
from adaptkit.pipeline.steps.evaluate import KIND, EvaluateStep, Limits

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: every kind
sources:
  base: {path: model}
  lora: {path: lora}
  text: {path: text.txt}
  rows: {path: rows.jsonl}
  more: {path: more.jsonl}
  words: {path: mine.jinja}
steps:
  small:
    quantize: base
    calibration: {files: [text], tokens: 256, window: 64, init_rank: 2}
  plain: {dequantize: small}
  ours: {adopt: lora, base: base}
  lighter: {resize: ours, rank: 2}
  both: {stack: [lora, lighter], method: ties, weights: [1, 0.5], settings: {density: 0.5}}
  merged: {merge: base, adapters: [both], undo: false}
  packed: {merge: base, adapters: [lora], format: nf4}
  found: {extract: merged, base: base, rank: 8}
  whole: {train: base, method: full, data: [rows], steps: 1, batch_size: 4, learning_rate: 1.0e-4, device: cpu}
  begun:
    train: small
    init: small-init
    data: [rows, more]
    chat_template: words
    mixture: {more: 2}
    steps: 1
    batch_size: 4
    device: cpu
  measured:
    evaluate: small
    adapter: small-init
    data: [rows]
    text: [text]
    reference: base
    window: 64
    max_tokens: 256
    device: cpu
    require: {loss: {min: 0, max: 9}, text.kl_divergence: {max: 1}, text.reference_loss: {min: 1}}
  loads: {check: found, base: base, target: [peft, vllm]}
"""
TEMPLATE = "{% for message in messages %}[{{ message.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, llama, adapter, instructions):
    folder = tmp_path_factory.mktemp("steps")
    shutil.copytree(llama, folder / "model")
    shutil.copytree(adapter, folder / "lora")
    shutil.copy(instructions, folder / "rows.jsonl")
    shutil.copy(instructions, folder / "more.jsonl")
    (folder / "text.txt").write_text("Most rivers in the north are quiet. There are seven kinds of salt. " * 40)
    (folder / "mine.jinja").write_text(TEMPLATE)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, run(folder / "recipe.yaml")


def test_every_kind_of_step_but_publish_runs_and_makes_its_artifacts(ran):
    folder, report = ran
    assert {step.kind for step in report.steps} == set(names(registry)) - {"publish"}
    outputs = {output.name: output for step in report.steps for output in step.outputs}
    steps = read_recipe(folder / "recipe.yaml").steps.values()
    foreseen = {name: kind for step in steps for name, kind in step.makes.items()}
    assert foreseen["ours"] is None
    made = {name: kind_of(folder / output.path, as_adapter=True) for name, output in outputs.items()}
    assert made == foreseen | {"ours": "adapter"}
    assert {name: verify(folder / output.path).kind for name, output in outputs.items()}["small"] == "quantized"


def test_an_adapter_has_the_chat_template_of_its_step(ran):
    folder, report = ran
    begun = next(output for step in report.steps for output in step.outputs if output.name == "begun")
    assert (folder / begun.path / "chat_template.jinja").read_text() == TEMPLATE


def test_a_gate_reports_its_figures(ran):
    _, report = ran
    facts = next(step.facts for step in report.steps if step.name == "measured")
    assert 0 < facts["text.kl_divergence"] < 1
    assert facts["loss"] > 0
    assert facts["text.tokens"] > 0


def test_a_merge_reports_the_share_of_the_change_that_is_left(ran):
    _, report = ran
    steps = {step.name: step for step in report.steps if step.kind == "merge"}
    for step in steps.values():
        assert step.figure.endswith(f" changed, {100 * step.facts['effect']:.3g} % of the change kept")
    assert 0 < steps["packed"].facts["effect"] < steps["merged"].facts["effect"]


def test_the_notes_of_operations_are_passed_on_with_the_steps_name(tmp_path, llama, adapter):
    shutil.copytree(llama, tmp_path / "model")
    shutil.copytree(adapter, tmp_path / "lora")
    shutil.copytree(llama, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned/model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "tuned/config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "tuned/config.json").write_text(json.dumps(config))
    (tmp_path / "lora/value_head.safetensors").write_bytes(b"scores")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b", "colour": "red"}\n')
    (tmp_path / "recipe.yaml").write_text(
        "name: notes\nsources:\n  base: {path: model}\n  tuned: {path: tuned}\n  lora: {path: lora}\n"
        "  rows: {path: rows.jsonl}\nsteps:\n"
        "  less: {resize: lora, rank: 2}\n  both: {stack: [lora, less], weights: [0.5, 0.5]}\n"
        "  merged: {merge: base, adapters: [lora], weights: [0]}\n"
        "  found: {extract: tuned, base: base, rank: 2}\n"
        "  judged: {evaluate: base, data: [rows], device: cpu, require: {loss: {min: 0}}}\n"
    )
    notes = []
    report = run(tmp_path / "recipe.yaml", listener=Listener(note=notes.append))
    (figure,) = [step.figure for step in report.steps if step.name == "merged"]
    assert figure.endswith("but no weight moved: the result is the base")
    for step in ("both", "less", "merged"):
        assert any(note.startswith(f"{step}: ") and "value_head.safetensors is left out" in note for note in notes)
    assert any(note.startswith("found: not covered: config.json differs in rms_norm_eps") for note in notes)
    assert any(note.startswith("judged: ") and "colour" in note for note in notes)


def test_a_figure_beyond_a_changed_limit_fails_the_gate_without_being_measured_again(ran):
    folder, report = ran
    path, begun, ended = folder / "strict.yaml", [], []
    listener = Listener(on_start=begun.append, on_end=ended.append)
    (measured,) = (folder / ".adaptkit").glob("*/measured.json")
    before = measured.stat()
    path.write_text(RECIPE.replace("text.kl_divergence: {max: 1}", "text.kl_divergence: {max: 0}"))
    with pytest.raises(GateError, match=r"text\.kl_divergence is 0\.\d{4}; required: at most 0"):
        run(path, listener=listener)
    ended = [result for result in ended if isinstance(result, StepResult)]
    assert not any(isinstance(part, Step) for part in begun)
    earlier = [step.name for step in report.steps]
    assert [step.name for step in ended] == earlier[: earlier.index("measured") + 1]
    assert {step.state for step in ended[:-1]} == {"kept"}
    assert (ended[-1].state, ended[-1].facts) == ("failed", report.steps[len(ended) - 1].facts)
    (after,) = ((found, found.stat()) for found in (folder / ".adaptkit").glob("*/measured.json"))
    assert (after[0], after[1].st_ino, after[1].st_mtime_ns) == (measured, before.st_ino, before.st_mtime_ns)


def test_a_step_runs_again_if_one_of_its_two_artifacts_is_missing(ran):
    folder, report = ran
    base, companion = next(step.outputs for step in report.steps if step.name == "small")
    shutil.rmtree(folder / base.path)
    again = run(folder / "recipe.yaml")
    assert [step.name for step in again.steps if step.state == "done"] == ["small"]
    assert next(step.outputs for step in again.steps if step.name == "small") == (base, companion)


def test_the_docs_list_every_key_of_every_step():
    """Except for train, which is documented on a separate page."""
    before_runs, _, _ = (ROOT / "docs" / "release.md").read_text().partition("\n## A run\n")
    rows = [line for line in before_runs.splitlines() if line.startswith("| `")]
    listed = {row.split("`")[1]: set(re.findall(r"[`{]([a-z_]+)[`:]", row)) for row in rows}
    assert set(listed) == set(names(registry))
    for name in set(listed) - {"train"}:
        kind = load(registry, name, "KIND")
        inputs = {part for taken in kind.inputs for part in taken.key.split(".")}
        assert listed[name] == {field.name for field in fields(kind.options)} - set(kind.refused) | inputs | (
            {field.name for field in fields(Calibration)} if name == "quantize" else set()
        ), name


def test_the_docs_list_every_key_of_the_report():
    _, _, section = (ROOT / "docs" / "release.md").read_text().partition("\n### The report\n")
    rows = dict(re.findall(r"^\| (`[^|]*) \| (.*) \|$", section, re.MULTILINE))
    listed = {key: value for keys, value in rows.items() for key in re.findall(r"`(\w+)`", keys)}
    assert set(listed) == {field.name for field in fields(RunReport)}
    for key, kinds in ("sources", (InputReport,)), ("steps", (StepResult, OutputReport)):
        missing = {field.name for kind in kinds for field in fields(kind)} - set(re.findall(r"`(\w+)`", listed[key]))
        assert not missing, key


@pytest.mark.parametrize(
    ("value", "limits", "told"),
    [
        (2.50001, {"max": 2.5}, "loss is 2.50001; required: at most 2.5"),
        (0.12345, {"min": 0.1234567}, "loss is 0.12345; required: at least 0.1234567"),
        (float("nan"), {"min": 1, "max": 2}, "loss is nan; required: at least 1, at most 2"),
    ],
)
def test_a_failed_gate_shows_a_figure_outside_its_limits(value, limits, told):
    """Rounded to four digits, it could be within them."""
    assert KIND.judge(EvaluateStep(require={"loss": Limits(**limits)}), {"loss": value}) == told
