"""The seam of training methods: a file is all that a method takes, and nothing outside of its folder names one."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.discovery import names
from adaptkit.training import methods
from adaptkit.training.config import TrainConfig
from adaptkit.training.inputs import read_inputs
from adaptkit.training.loop import train

PACKAGE = Path(methods.__file__).parents[2]
PAIRS = '''
"""Of two answers to a question, one becomes likelier than the other."""

from dataclasses import dataclass, replace
from itertools import pairwise

from adaptkit.data.batches import collate
from adaptkit.data.dataset import load_data
from adaptkit.data.encoding import Sample
from adaptkit.training.methods._method import TrainingMethod
from adaptkit.training.network.loss import summed_loss
from adaptkit.settings import setting


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    push: float = setting("Factor of the loss.", 1.0, above=0, after="loss_on")


@dataclass(frozen=True)
class Pair(Sample):
    rejected: Sample = None


class Pairwise(TrainingMethod):
    settings, unit, sequences = PairSettings, "pairs", 2

    def read(self, sources, tokenizer, context, known):
        data = load_data(sources, tokenizer, self.config.max_length, context=context, known=known)
        pairs = [Pair(**vars(one), rejected=other) for one, other in pairwise(data.samples)]
        return replace(data, samples=pairs)

    def weight(self, sample):
        return 1

    def collate(self, rows, padding):
        samples = [sample for row in rows for sample in row]
        return collate([(side,) for sample in samples for side in (sample, sample.rejected)], padding)

    def loss(self, model, batch, share=None):
        sides = []  # chosen, rejected
        for side in (0, 1):
            part = replace(batch, ids=batch.ids[side::2], labels=batch.labels[side::2], mask=batch.mask[side::2])
            sides.append(summed_loss(model, part))
        margin = sides[1] - sides[0]
        return {"loss": -self.config.push * margin, "margin": margin.detach()}


METHOD = Pairwise
'''
RUN = """
import json, sys
from dataclasses import replace
from pathlib import Path

from adaptkit.training import methods
from adaptkit.training.methods import _method

base, data, folder, default = sys.argv[1:]
methods.__path__.append(folder)
_method._DEFAULT = default

from adaptkit.cli.commands.train import command
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.loop import train
from adaptkit.training.preview import preview
from interrupted import stop_after

out = Path(folder)
config = TrainConfig(
    base=base, data=(data,), rank=2, steps=4, batch_size=3, micro_batch_size=2, device="cpu", compute_dtype="float32",
    dropout=0.1, eval_every=2, save_every=1,
)
recorded = config.recorded()
options = [option.name for option in command.params]
if default == "pairs":
    assert options.index("push") == options.index("loss_on") + 1, options
    rows, plan = preview(config).rows, plan_run(config, out / "plan")
    train(config, out / "whole")
    stop_after(config, out / "resumed", 3)
    resumed = train(config, out / "resumed").resumed_from
    recorded |= {"rows": rows, "planned": plan.steps, "resumed": resumed}
print(json.dumps(recorded))
"""


def run_with_pairs(base, data, folder, default):
    """Run the script in a process whose folder of methods has one more file, and return what it printed."""
    (folder / "pairs.py").write_text(PAIRS)
    fixtures = str(Path(__file__).resolve().parents[2] / "fixtures")
    code = f"import sys; sys.path[:0] = [{str(PACKAGE.parent)!r}, {fixtures!r}]\n{RUN}"
    arguments = [sys.executable, "-c", code, str(base), str(data), str(folder), default]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def config(llama_nf4, instructions):
    return TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=2, steps=4, batch_size=3, micro_batch_size=2,
        device="cpu", compute_dtype="float32", dropout=0.1, eval_every=2, save_every=1,
    )  # fmt: skip


def test_a_file_adds_a_method_which_trains_and_resumes_to_the_same_bytes(llama_nf4, instructions, tmp_path):
    found = run_with_pairs(llama_nf4, instructions, tmp_path, "pairs")
    assert "push" in found
    assert not found.keys() & {"loss_on", "pack"}
    assert (found["resumed"], found["planned"]) == (3, 4)
    for name in ("adapter_model.safetensors", "adaptkit-manifest.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {line["pairs"] for line in steps} <= {2, 3}
    assert found["rows"] == 2 * steps[0]["pairs"], "each pair is two rows of the batch"
    assert all({"loss", "margin"} <= line.keys() and "answer_tokens" not in line for line in steps)
    assert [line["step"] for line in lines if {"held_out_loss", "held_out_margin"} <= line.keys()] == [0, 2, 4]


def test_a_file_more_changes_neither_what_other_runs_record_nor_what_they_are(
    config, llama_nf4, instructions, tmp_path
):
    assert run_with_pairs(llama_nf4, instructions, tmp_path, "sft") == json.loads(json.dumps(config.recorded()))


def test_metrics_of_a_step_are_means_over_its_units(config, tmp_path):
    inputs = read_inputs(config, None, False)
    assert config.training_method.unit == "answer_tokens"
    train(config, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    units = sum(map(config.training_method.weight, inputs.samples))
    taken = sum(line.get("answer_tokens", 0) for line in lines)
    assert 0 < taken <= units * config.steps


def test_no_module_outside_of_the_folder_names_a_method():
    known = {f"adaptkit.training.methods.{name}" for name in names(methods)} | set(names(methods))
    for path in PACKAGE.rglob("*.py"):
        if path.parent != Path(methods.__file__).parent:
            for node in ast.walk(ast.parse(path.read_text())):
                said = [getattr(node, key, None) for key in ("id", "attr", "module", "name", "value")]
                assert not known.intersection(word for word in said if isinstance(word, str)), path
