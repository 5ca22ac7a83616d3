"""Run quantize, train, evaluate, merge, unmerge, diff, publish, pull and verify on SmolLM2-135M-Instruct.

Every step uses the real command line; the Hub is ``scripts/local_hub.py`` on this machine. Ends with a summary of the
results of each step.
"""

import argparse
import contextlib
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import get_smollm2

STEPS = 60
QUESTION = "Which of Shakespeare’s plays is the longest?"
BARS = "▁▂▃▄▅▆▇█"
REPO = "demo/smollm2-trivia"
MARKER = ".adaptkit-demo"
MADE = ("base-nf4", "trivia", "merged", "restored", "hub", "hf", "pulled")
"""Outputs of the demo in its folder; unfinished ones have the suffix .partial."""


class Demo:
    """Runs commands in a work folder and collects the summary."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder = folder
        self.model = sources / get_smollm2.MODEL_NAME
        self.data = sources / "data"
        self.summary: list[tuple[str, str]] = []
        self.environment = dict(os.environ)

    def run(self, *arguments: object, expect: int = 0) -> str:
        """Run one adaptkit command, show it and its output, and return the output."""
        shown = ["adaptkit", *map(str, arguments)]
        for path, name in ((self.folder, ""), (self.model.parent, "")):
            shown = [text.replace(f"{path}/", name) for text in shown]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        command = [sys.executable, "-m", "adaptkit.cli.main", *map(str, arguments)]
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout.replace(f"{self.folder}/", ""), end="")
        print(f"({time.monotonic() - started:.1f} s)", flush=True)
        if done.returncode != expect:
            sys.exit(f"demo: exit code {done.returncode}, expected {expect}")
        return done.stdout

    def summarize(self, step: str, text: str) -> None:
        """Add a line to the summary."""
        self.summary.append((step, text))

    def quantize(self) -> None:
        """Quantize 16 bits to NF4."""
        self.run("quantize", self.model, "-o", "base-nf4")
        before, after = (
            sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (self.model, self.path("base-nf4"))
        )
        self.summarize("quantize", f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({before / after:.2f}x smaller)")

    def train(self) -> None:
        """Train an adapter with QLoRA on trivia questions."""
        self.run("train", "--base", "base-nf4", "--data", self.data / "train.jsonl", "-o", "trivia", "--steps", STEPS,
                 "--checkpointing", "sqrt", "--optimizer-pages-mib", 8)  # fmt: skip
        lines = [json.loads(line) for line in (self.path("trivia") / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
        self.summarize("train", f"held-out loss {held_out[0]:.3f} -> {held_out[-1]:.3f} in {STEPS} steps")
        self.summarize("loss curve", f"{curve(losses)}  {losses[0]:.2f} -> {losses[-1]:.2f}")

    def evaluate(self) -> None:
        """Evaluate on questions that were in neither training nor held-out data."""
        test, losses, answers = self.data / "test.jsonl", {}, {}
        for name, model in (("before", ("base-nf4",)), ("after", ("base-nf4", "--adapter", "trivia"))):
            printed = self.run("evaluate", "--base", *model, "--data", test, "--prompt", QUESTION)
            losses[name] = found(r"loss +([\d.]+)", printed)
            answers[name] = found(r"\nanswer +(.*)", printed)
        self.summarize("evaluate", f"loss on unseen questions {losses['before']} -> {losses['after']}")
        for name, answer in answers.items():
            self.summarize(f"answer {name}", textwrap.shorten(answer, 80, placeholder=" …"))

    def merge(self) -> None:
        """Merge the adapter into the 16-bit base, and unmerge it."""
        self.run("merge", self.model, "trivia", "-o", "merged")
        printed = self.run("evaluate", "--base", "merged", "--data", self.data / "test.jsonl", "--prompt", QUESTION)
        loss = found(r"loss +([\d.]+)", printed)
        self.summarize("merge", f"16-bit model that includes the adapter: loss {loss}")
        self.run("unmerge", "merged", "-o", "restored", "--adapter", "trivia")
        name = "model.safetensors"
        same = filecmp.cmp(self.model / name, self.path("restored") / name, shallow=False)
        changed = not filecmp.cmp(self.model / name, self.path("merged") / name, shallow=False)
        if not (same and changed):
            sys.exit("demo: unmerge did not restore the base")
        self.summarize(
            "unmerge", f"identical: {name} has the base's bytes again, all {(self.model / name).stat().st_size}"
        )

    def publish(self) -> None:
        """Publish to a Hub, pull, verify and compare."""
        with local_hub(self.folder / "hub") as url:
            self.environment |= {
                "HF_ENDPOINT": url, "HF_TOKEN": "demo", "HF_HOME": str(self.folder / "hf"),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }  # fmt: skip
            printed = self.run("publish", "trivia", REPO, "--tag", "v1")
            commit = found(r"commit +(\w+)", printed)
            digest = found(r"manifest sha256 +(\w+)", printed)
            again = self.run("publish", "trivia", REPO, "--tag", "v1")
            if "nothing" not in again:
                sys.exit("demo: publishing again uploaded files")
            self.run("pull", f"{REPO}@v1", "-o", "pulled")
        self.run("verify", "pulled", "--manifest-sha256", digest)
        self.run("diff", "trivia", "pulled")
        self.summarize("publish", f"commit {commit[:12]}, tag v1; publishing again uploads nothing")
        self.summarize("pull, verify", f"all bytes are as published; manifest sha256 {digest[:16]}…")
        self.summarize("diff", "the pulled adapter is the same as the trained one")

    def path(self, name: str) -> Path:
        """Return the path of a folder in the work folder."""
        return self.folder / name


def found(pattern: str, text: str) -> str:
    """Return the first group of a pattern in a command's output."""
    match = re.search(pattern, text)
    if match is None:
        sys.exit(f"demo: {pattern!r} is not in the output")
    return match[1]


def curve(values: list[float], width: int = 30) -> str:
    """Draw a curve in one line; each column is the mean of its share of the values."""
    step = len(values) / width
    means = []
    for column in range(width):
        share = values[int(column * step) : max(int(column * step) + 1, int((column + 1) * step))]
        means.append(sum(share) / len(share))
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low or 1) * (len(BARS) - 1))] for mean in means)


@contextlib.contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Run the local Hub and yield its address."""
    script = Path(__file__).with_name("local_hub.py")
    command = [sys.executable, str(script), str(folder), "--token", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def prepare(folder: Path, is_own: bool) -> None:
    """Make the folder, and remove the outputs of an earlier demo; other files in it stay.

    Args:
        folder: folder for the artifacts.
        is_own: whether it is the default folder in the user's cache, which only the demo uses. Any other folder must be
            new, empty, or marked by an earlier demo, since it may have a ``merged`` that is not the demo's.
    """
    marker = folder / MARKER
    if folder.exists() and not (is_own or marker.is_file() or (folder.is_dir() and not any(folder.iterdir()))):
        print(f"demo: {folder}: holds files that the demo did not make", file=sys.stderr)
        print("hint: give --folder a folder that is new or empty", file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in MADE:
        for path in (folder / name, folder / f"{name}.partial"):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)


def main() -> None:
    """Run everything and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="a new or empty folder for the artifacts; default: one in the user's cache"
    )
    sources = get_smollm2.default_folder()
    own = (sources.parent / "demo").resolve()
    folder = (parser.parse_args().folder or own).resolve()
    prepare(folder, is_own=folder == own)
    print("Fetching SmolLM2-135M-Instruct and question-answer data (once)", flush=True)
    get_smollm2.make(sources)
    started = time.monotonic()
    demo = Demo(folder, sources)
    for step in (demo.quantize, demo.train, demo.evaluate, demo.merge, demo.publish):
        step()
    print(f"\nSummary ({time.monotonic() - started:.0f} s; artifacts in {folder})\n")
    for label, text in demo.summary:
        print(f"  {label:<13}  {text}")


if __name__ == "__main__":
    main()
