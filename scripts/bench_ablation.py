"""Measure what each part of ``training/fast`` buys a step on a CPU: the step without it, against the step with all.

    .venv/bin/python scripts/bench_ablation.py [--rounds 9] [--only 256 ...] [--threads 1 2]

The step is that of ``bench_training.py`` on SmolLM2-135M-Instruct. Every variant is a process of its own, and they take
steps in turn; printed are the median over the rounds of the time's ratio to the step with all parts, and the ratio of
the peak memory of the processes. On a CPU, tables and entropy do nothing: what they buy on a GPU is in
launches and bytes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import bench_training
import get_smollm2

PARTS = ("attention", "last_products", "norms_and_gates", "products")
LINES = {
    "attention": ("attention", "attention_gpu", "cpu_attention", "attention_spans"),
    "last_products": ("last_products",),
    "norms_and_gates": ("norms_and_gates", "gpu_layers"),
    "products": ("products",),
}
"""The modules of each part that does something on a CPU."""


def work(without: str, case: str, threads: int) -> None:
    """Take steps of one variant for lines of the input."""
    bench_training.begin("adaptkit", threads)
    length, share, checkpointing = bench_training.CASES[case]
    base = bench_training.packed_base(get_smollm2.default_folder() / get_smollm2.MODEL_NAME)
    left_out = frozenset(PARTS) if without == "everything" else frozenset({without} - {"nothing"})
    policy = "layer" if checkpointing else "none"
    bench_training.serve(bench_training.AdaptkitStep(base, length, share, policy, without=left_out))


def measure(case: str, threads: int, rounds: int) -> None:
    """Print a row for every variant of a case."""
    variants = ("nothing", *PARTS, "everything")
    workers = {
        without: subprocess.Popen(
            [sys.executable, __file__, "--work", without, "--only", case, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        for without in variants
    }  # fmt: skip
    if any(worker.stdout.readline().strip() != "ready" for worker in workers.values()):
        sys.exit("bench: a variant failed to start")
    seconds: dict[str, list[float]] = {without: [] for without in variants}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):
        for without, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            taken, peaks[without], _ = json.loads(worker.stdout.readline())
            seconds[without] += [taken] if turn else []  # the first step compiles, allocates and fills caches
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    whole = statistics.median(seconds["nothing"])
    print(f"\n{case} tokens, {threads} thread(s): {whole:.3f} s, {peaks['nothing']:.0f} MB")
    for without in variants[1:]:
        ratio = statistics.median(a / b for a, b in zip(seconds[without], seconds["nothing"], strict=True))
        print(
            f"  without {without:12} {ratio:6.3f} x time {peaks[without] / peaks['nothing']:6.3f} x memory", flush=True
        )


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(bench_training.CASES), default=list(bench_training.CASES))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.only[0], options.threads[0])
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors")
    room = Path(__file__).resolve().parents[1] / "adaptkit/training/fast"
    for part, modules in LINES.items():
        lines = sum(len((room / f"{module}.py").read_text().splitlines()) for module in modules)
        print(f"{part}: {lines} lines")
    for case in options.only:
        for threads in options.threads:
            measure(case, threads, options.rounds)


if __name__ == "__main__":
    main()
