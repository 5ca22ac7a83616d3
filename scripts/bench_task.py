"""A real task on SmolLM2-135M-Instruct: QLoRA against 16-bit LoRA and full fine-tuning, by the command line.

The task is to define words: WordNet's glosses, as ``get_real_data.py`` makes them; no word or gloss of the test is in
the training rows. Every method sees the same rows in the same order (same seed, steps and batch), and takes the better
of two learning rates by the loss on rows that are set aside from the training file. Then ``adaptkit evaluate`` measures
all models in one run on the test: held-out loss, BLEU to CIDEr of generated answers against all of a word's glosses,
and perplexity of the Brown corpus, before and after. Asked of QLoRA: a held-out loss within 2 % of LoRA's and within
5 % of full fine-tuning's, at under 2 % of the parameters.

    .venv/bin/python scripts/bench_task.py [--steps N] [--questions N] [--rows N] [--only-train]

What is finished is kept in adaptkit/bench-task in the user's cache folder, so a run that was stopped goes on. The
base's weights have been through 4 bits once (see ``get_smollm2.py``), and plain NF4 raises this model's loss on text by
a third of a nat: a harder case than a 16-bit release of a large model.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import get_real_data
import get_smollm2

ADAPTKIT = [sys.executable, "-m", "adaptkit.cli.main"]
BATCH, RANK, SEED, SET_ASIDE = 8, 8, 0, 64
METHODS = {"lora": (5e-4, 2e-3), "qlora": (5e-4, 2e-3), "full": (3e-5, 1e-4)}
"""Learning rates that each method may choose from."""
BOUNDS = {"lora": 1.02, "full": 1.05}
MOST_TRAINED = 0.02


@dataclass(frozen=True)
class Run:
    """A training run that was kept.

    Attributes:
        rate: its learning rate.
        folder: of what it made.
        before: loss on the rows set aside, before training.
        after: the same after training.
    """

    rate: float
    folder: Path
    before: float
    after: float


class Bench:
    """Everything a run needs, in a folder of its own for each number of steps."""

    def __init__(self, steps: int, rows: int, questions: int) -> None:
        self.steps, self.questions = steps, questions
        self.model = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
        self.data = get_real_data.make(get_real_data.default_folder())
        self.folder = get_smollm2.default_folder().parent / "bench-task" / f"{steps}-steps"
        self.folder.mkdir(parents=True, exist_ok=True)
        count = steps * BATCH + SET_ASIDE
        self.train_file = self.cut("wordnet-train.jsonl", "train.jsonl", count)
        self.test_file = self.cut("wordnet-test.jsonl", "test.jsonl", rows)
        self.held_out = SET_ASIDE / count
        self.nf4 = self.folder.parent / "smollm2-nf4"
        if not self.nf4.exists():
            self.call("quantize", self.model, "-o", self.nf4)

    def cut(self, source: str, name: str, rows: int) -> Path:
        """The first rows of a file."""
        lines = (self.data / source).read_text(encoding="utf-8").splitlines(keepends=True)
        path = self.folder / name
        path.write_text("".join(lines[:rows]), encoding="utf-8")
        return path

    def call(self, *arguments: object) -> dict[str, Any]:
        """Run a command and return its report."""
        environment = os.environ | {"NLTK_DATA": str(self.data / "nltk_data")}
        command = [*ADAPTKIT, *map(str, arguments), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"bench: {arguments[0]} failed: {done.stdout}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def train(self, method: str, rate: float) -> Run:
        """Train once, or read what a former call kept."""
        output = self.folder / f"{method}-{rate:g}"
        kept = self.folder / f"{output.name}.json"
        started = time.monotonic()
        if not kept.exists():
            base = self.nf4 if method == "qlora" else self.model
            adapter = [] if method == "full" else ["--rank", RANK]
            report = self.call(
                "train", "--base", base, "--data", self.train_file, "-o", output, "--force", "--method", method,
                *adapter, "--steps", self.steps, "--batch-size", BATCH, "--learning-rate", rate, "--schedule", "linear",
                "--warmup", 0.1, "--seed", SEED, "--held-out", self.held_out, "--keep", "last", "--checkpointing",
                "none", "--save-every", 0,
            )  # fmt: skip
            kept.write_text(json.dumps(report))
        report = json.loads(kept.read_text())
        run = Run(rate, output, report["held_out_before"], report["held_out_after"])
        losses = f"{run.before:.4f} -> {run.after:.4f}"
        print(f"{method:<6} rate {rate:<7g} set aside {losses}   {time.monotonic() - started:5.0f} s", flush=True)
        return run

    def evaluate(self, best: dict[str, Run]) -> dict[str, Any]:
        """All models in one run, or what a former call kept."""
        names = "-".join(f"{run.rate:g}" for run in best.values())
        kept = self.folder / f"evaluated-{names}-{self.questions}-{sum(1 for _ in self.test_file.open())}.json"
        if not kept.exists():
            report = self.call(
                "evaluate", "--base", self.model, "--base", self.nf4, "--base", best["full"].folder,
                "--adapter", best["lora"].folder, "--adapter", best["qlora"].folder, "--data", self.test_file,
                "--text", self.data / "brown.txt", "--max-tokens", 4096, "--generate", "--samples", self.questions,
                "--max-new-tokens", 24, "--batch-size", 16, "--shots", 2, "--shots-from", self.train_file,
                "--samples-file", self.folder / "answers.jsonl", "--html", self.folder / "task.html",
            )  # fmt: skip
            kept.write_text(json.dumps(report))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def label(report: dict[str, Any], best: dict[str, Run]) -> str:
    """What a model is called in the table."""
    folders = {str(run.folder): method for method, run in best.items()}
    names = {"lora": "LoRA, 16-bit base", "qlora": "QLoRA", "full": "full fine-tuning"}
    method = folders.get(report["adapter"] or report["base"])
    name = names[method] if method else "NF4 base" if "nf4" in report["base"] else "base"
    return f"{name}, {report['shots']} shots" if report["shots"] else name


def show(report: dict[str, Any], best: dict[str, Run]) -> None:
    """The table, the ratios that are asked for, and what was forgotten."""
    print(f"\n{'':<26}{'trained':>12}{'share':>8}{'loss':>9}{'text ppl':>10}", end="")
    print(f"{'BLEU':>7}{'NIST':>7}{'METEOR':>8}{'ROUGE-L':>9}{'CIDEr':>8}")
    loss, share = {}, {}
    for model in report["models"]:
        name, trained = label(model, best), model["trained_parameters"]
        scores, text = model["generated"]["scores"], model["text"]
        loss[name] = model["loss"]
        share[name] = trained / model["parameters"] if trained else 0.0
        print(f"{name:<26}{trained or 0:>12,}{100 * share[name]:>7.2f}%{model['loss']:>9.4f}", end="")
        print(f"{text['perplexity']:>10.2f}" if text else f"{'':>10}", end="")
        print(f"{scores['bleu']:>7.2f}{scores['nist'] or 0:>7.3f}{scores['meteor']:>8.4f}", end="")
        print(f"{scores['rouge_l']:>9.4f}{scores['cider']:>8.4f}")
    first = report["models"][0]
    print(f"\n{first['samples']} test rows, {first['answer_tokens']} answer tokens; ", end="")
    print(f"{first['generated']['questions']} questions with {first['generated']['references']} reference answers")
    print(f"METEOR: {first['generated']['scores']['meteor_variant']}")
    for method, bound in BOUNDS.items():
        other = {"lora": "LoRA, 16-bit base", "full": "full fine-tuning"}[method]
        ratio = loss["QLoRA"] / loss[other]
        print(f"held-out loss, QLoRA / {other}: {ratio:.4f} (asked: at most {bound})  {verdict(ratio <= bound)}")
    print(f"trained share of QLoRA: {100 * share['QLoRA']:.2f} % (asked: under 2 %)  ", end="")
    print(verdict(0 < share["QLoRA"] < MOST_TRAINED))
    names: dict[str, str] = {}
    for model in report["models"]:
        path = f"{model['base']} + {model['adapter']}" if model["adapter"] else model["base"]
        names.setdefault(path, label(model, best))
    for line in report["forgetting"]:
        change = 100 * (line["perplexity_after"] / line["perplexity_before"] - 1)
        print(f"forgetting, perplexity of Brown: {names[line['before']]} {line['perplexity_before']:.2f} -> ", end="")
        print(f"{names[line['model']]} {line['perplexity_after']:.2f} ({change:+.1f} %)")


def verdict(met: bool) -> str:
    """In a word."""
    return "met" if met else "MISSED"


def main() -> None:
    """Train what is missing, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} rows")
    parser.add_argument("--rows", type=int, default=160, help="of the test, for the held-out loss")
    parser.add_argument("--questions", type=int, default=40, help="of the test, to answer")
    parser.add_argument("--only-train", action="store_true", help="stop before the evaluation")
    options = parser.parse_args()
    bench = Bench(options.steps, options.rows, options.questions)
    best = {}
    for method, rates in METHODS.items():
        best[method] = min((bench.train(method, rate) for rate in rates), key=lambda run: run.after)
    if not options.only_train:
        show(bench.evaluate(best), best)


if __name__ == "__main__":
    main()
