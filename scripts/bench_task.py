"""Compare QLoRA with 16-bit LoRA and full fine-tuning on a real task with SmolLM2-135M-Instruct.

The task is to define words: WordNet's glosses, from ``get_real_data.py``; no word or gloss of the test is in the
training rows. Every method gets the same rows in the same order (same seed, steps and batch), and uses the better of
two learning rates, by the loss on rows set aside from the training file. Then ``adaptkit evaluate`` measures all models
on the test: held-out loss, BLEU to CIDEr of generated answers against all glosses of a word, and perplexity of the
Brown corpus before and after. The goals for QLoRA are a held-out loss within 2 % of LoRA's and within 5 % of full
fine-tuning's, with under 2 % of the parameters.

    .venv/bin/python scripts/bench_task.py [--steps N] [--questions N] [--rows N] [--methods METHOD...]

Results are kept in adaptkit/bench-task in the user's cache folder, so that a stopped run can be resumed. The base's
weights were quantized to 4 bits once before (see ``get_smollm2.py``), and plain NF4 raises this model's loss on text by
a quarter of a nat: a harder case than a 16-bit release of a large model.
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
METHODS = {
    "lora": (5e-4, 2e-3),
    "qlora": (5e-4, 2e-3),
    "calibrated": (5e-4, 2e-3),
    "companion": (5e-4, 2e-3),
    "full": (3e-5, 1e-4),
}
"""Learning rates that each method may choose from. ``calibrated`` is QLoRA on a base calibrated with the training rows,
``companion`` the same started from the adapter that was made with that base."""
QUANTIZED = {"qlora": "plain", "calibrated": "calibrated", "companion": "calibrated"}
"""The quantized base of each method that uses one."""
NAMES = {
    "lora": "LoRA, 16-bit base",
    "qlora": "QLoRA, plain NF4",
    "calibrated": "QLoRA, calibrated NF4",
    "companion": "QLoRA, its companion",
    "full": "full fine-tuning",
}
BOUNDS = {"lora": 1.02, "full": 1.05}
MOST_TRAINED = 0.02


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        rate: its learning rate.
        folder: folder of its output.
        before: loss on the rows set aside, before training.
        after: loss on the same rows, after training.
    """

    rate: float
    folder: Path
    before: float
    after: float


class Bench:
    """Data, bases and results, in a separate folder for each number of steps."""

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
        self.bases = {"plain": self.folder.parent / "smollm2-nf4"}
        self.bases["calibrated"] = self.folder / "smollm2-nf4-calibrated"

    def cut(self, source: str, name: str, rows: int) -> Path:
        """Write the first rows of a file."""
        lines = (self.data / source).read_text(encoding="utf-8").splitlines(keepends=True)
        path = self.folder / name
        path.write_text("".join(lines[:rows]), encoding="utf-8")
        return path

    def base(self, method: str) -> Path:
        """Return the checkpoint that a method trains on, quantized at the first call."""
        if method not in QUANTIZED:
            return self.model
        folder = self.bases[QUANTIZED[method]]
        if not folder.exists():
            calibrated = QUANTIZED[method] == "calibrated"
            calibrate = ("--calibrate", self.train_file, "--init-adapter", RANK) if calibrated else ()
            self.call("quantize", self.model, "-o", folder, *calibrate)
        return folder

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
        """Train, or read the result of an earlier call."""
        output = self.folder / f"{method}-{rate:g}"
        kept = self.folder / f"{output.name}.json"
        started = time.monotonic()
        if not kept.exists():
            base, kind = self.base(method), "qlora" if method in QUANTIZED else method
            adapter: list[object] = [] if method == "full" else ["--rank", RANK]
            if method == "companion":  # has the rank of the adapter that it starts from
                adapter = ["--init", base.with_name(f"{base.name}-init")]
            report = self.call(
                "train", "--base", base, "--data", self.train_file, "-o", output, "--force", "--method", kind,
                *adapter, "--steps", self.steps, "--batch-size", BATCH, "--learning-rate", rate, "--schedule", "linear",
                "--warmup", 0.1, "--seed", SEED, "--held-out", self.held_out, "--keep", "last", "--checkpointing",
                "none", "--save-every", 0,
            )  # fmt: skip
            kept.write_text(json.dumps(report))
        report = json.loads(kept.read_text())
        run = Run(rate, output, report["held_out_before"], report["held_out_after"])
        losses = f"{run.before:.4f} -> {run.after:.4f}"
        print(f"{method:<10} rate {rate:<7g} set aside {losses}   {time.monotonic() - started:5.0f} s", flush=True)
        return run

    def evaluate(self, best: dict[str, Run]) -> list[dict[str, Any]]:
        """Evaluate bases and adapters in one run; the fully tuned checkpoint, and prompts with examples, in another."""
        text = ("--text", self.data / "brown.txt", "--max-tokens", 4096)
        reports = []
        adapted = {method: run for method, run in best.items() if method != "full"}
        if adapted:
            bases = {self.bases[QUANTIZED[method]]: None for method in adapted if method in QUANTIZED}
            reports.append(
                self.measured(
                    "-".join(f"{method}-{run.rate:g}" for method, run in adapted.items()),
                    *(f"--base={base}" for base in bases), *(f"--adapter={run.folder}" for run in adapted.values()),
                    *text,
                )
            )  # fmt: skip
        if "full" in best:
            full, examples = best["full"], ("--shots", 2, "--shots-from", self.train_file)
            reports.append(self.measured(f"full-{full.rate:g}", "--base", full.folder, *examples, *text))
        return reports

    def measured(self, name: str, *more: object) -> dict[str, Any]:
        """Compare with the 16-bit base, or read the result of an earlier call."""
        rows = sum(1 for _ in self.test_file.open())
        kept = self.folder / f"evaluated-{name}-{self.questions}-{rows}.json"
        if not kept.exists():
            report = self.call(
                "evaluate", "--base", self.model, *more, "--data", self.test_file, "--generate", "--samples",
                self.questions, "--max-new-tokens", 24, "--batch-size", 16, "--html", kept.with_suffix(".html"),
            )  # fmt: skip
            kept.write_text(json.dumps(report))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def label(report: dict[str, Any], best: dict[str, Run]) -> str:
    """Return a model's name in the table."""
    folders = {str(run.folder): NAMES[method] for method, run in best.items()}
    base = Path(report["base"]).name
    plain = "calibrated NF4 base" if base.endswith("calibrated") else "NF4 base" if base.endswith("nf4") else "base"
    name = folders.get(report["adapter"] or report["base"], plain)
    return f"{name}, {report['shots']} shots" if report["shots"] else name


def show(reports: list[dict[str, Any]], best: dict[str, Run]) -> None:
    """Print the table, the ratios and their goals, and the forgetting."""
    print(f"\n{'':<26}{'trained':>12}{'share':>8}{'loss':>9}{'text ppl':>10}", end="")
    print(f"{'BLEU':>7}{'NIST':>7}{'METEOR':>8}{'ROUGE-L':>9}{'CIDEr':>8}")
    loss, share = {}, {}
    models = [*reports[0]["models"], *(model for report in reports[1:] for model in report["models"][1:])]
    for model in models:
        name, trained = label(model, best), model["trained_parameters"]
        scores, text = model["generated"]["scores"], model["text"]
        loss[name] = model["loss"]
        share[name] = trained / model["parameters"] if trained else 0.0
        print(f"{name:<26}{trained or 0:>12,}{100 * share[name]:>7.2f}%{model['loss']:>9.4f}", end="")
        print(f"{text['perplexity']:>10.2f}" if text else f"{'':>10}", end="")
        print(f"{scores['bleu']:>7.2f}{scores['nist'] or 0:>7.3f}{scores['meteor']:>8.4f}", end="")
        print(f"{scores['rouge_l']:>9.4f}{scores['cider']:>8.4f}")
    first = models[0]
    print(f"\n{first['samples']} test rows, {first['answer_tokens']} answer tokens; ", end="")
    print(f"{first['generated']['questions']} questions with {first['generated']['references']} reference answers")
    print(f"METEOR: {first['generated']['scores']['meteor_variant']}")
    for method in (method for method in QUANTIZED if method in best):
        for other, bound in ((other, bound) for other, bound in BOUNDS.items() if other in best):
            ratio = loss[NAMES[method]] / loss[NAMES[other]]
            print(f"held-out loss, {NAMES[method]} / {NAMES[other]}: {ratio:.4f} (at most {bound})  ", end="")
            print(verdict(ratio <= bound))
        trained = share[NAMES[method]]
        print(f"trained share of {NAMES[method]}: {100 * trained:.2f} % (under {100 * MOST_TRAINED:g} %)  ", end="")
        print(verdict(0 < trained < MOST_TRAINED))
    names: dict[str, str] = {}
    for model in models:
        path = f"{model['base']} + {model['adapter']}" if model["adapter"] else model["base"]
        names.setdefault(path, label(model, best))
    for line in (line for report in reports for line in report["forgetting"]):
        change = 100 * (line["perplexity_after"] / line["perplexity_before"] - 1)
        print(f"forgetting, perplexity of Brown: {names[line['before']]} {line['perplexity_before']:.2f} -> ", end="")
        print(f"{names[line['model']]} {line['perplexity_after']:.2f} ({change:+.1f} %)")


def verdict(met: bool) -> str:
    """Return a word for whether a goal is met."""
    return "met" if met else "MISSED"


def main() -> None:
    """Train missing models, evaluate, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240, help=f"of {BATCH} rows")
    parser.add_argument("--rows", type=int, default=160, help="of the test, for the held-out loss")
    parser.add_argument("--questions", type=int, default=40, help="of the test, to answer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    options = parser.parse_args()
    bench = Bench(options.steps, options.rows, options.questions)
    best = {}
    for method in options.methods:
        best[method] = min((bench.train(method, rate) for rate in METHODS[method]), key=lambda run: run.after)
    show(bench.evaluate(best), best)


if __name__ == "__main__":
    main()
