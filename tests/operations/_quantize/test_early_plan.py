"""Quantizing starts with a plan from names and ends with that from the architecture; tests run subprocesses."""

import subprocess
import sys

import pytest
from folders import edit_json, tree

from adaptkit.operations.quantize import QuantizeOptions, quantize

LIE = """
import sys
from pathlib import Path
from adaptkit.errors import AdaptkitError
from dataclasses import replace
from adaptkit.operations._quantize import early_plan
from adaptkit.operations.quantize import QuantizeOptions, quantize

truth, begun = early_plan.roles_by_name, []

def lie(checkpoint, reason):
    roles = truth(checkpoint, reason)
    wrong = {n: replace(r, kind="norm") if n.endswith("down_proj.weight") else r for n, r in roles.of.items()}
    return replace(roles, of=wrong)

if sys.argv[3] == "lie":
    early_plan.roles_by_name = lie
check = early_plan.EarlyPlan.confirm
early_plan.EarlyPlan.confirm = lambda self, plan: begun.append(len(plan.quantized())) or check(self, plan)
report = quantize(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeOptions(max_shard_bytes=40_000))
print(begun[0], begun[-1], "transformers" in sys.modules, report.read_from, sep="|")
"""


@pytest.mark.parametrize(("guess", "first"), [("truth", "14"), ("lie", "12")])
def test_a_wrong_early_plan_does_not_change_the_result(llama, tmp_path, guess, first):
    quantize(llama, tmp_path / "here", QuantizeOptions(max_shard_bytes=40_000))
    command = [sys.executable, "-c", LIE, str(llama), str(tmp_path / "out"), guess]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    begun, ended, loaded, read_from = done.stdout.strip().split("|")
    assert (begun, ended, loaded) == (first, "14", "False")
    assert read_from.startswith("architecture LlamaForCausalLM")
    assert tree(tmp_path / "out") == tree(tmp_path / "here")
    assert not (tmp_path / "out.partial").exists()


def test_an_invalid_config_is_refused_although_names_would_suffice(llama, copy_of, tmp_path):
    source = copy_of(llama)
    edit_json(source / "config.json", num_attention_heads="four")
    command = [sys.executable, "-m", "adaptkit.cli.main", "quantize", str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") <= 2
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
