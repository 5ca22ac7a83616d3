"""Compare the time and memory of one training step of a mixture of experts on a CPU: adaptkit, and peft.

    .venv/bin/python scripts/bench_experts.py [--rounds 5] [--only "256 tokens" ...] [--threads 1]

Both sides train rank-16 adapters of attention, in one case also of the experts, on random layers of the width of OLMoE
1B-7B (64 experts, 8 for each token); measured as in ``bench_training.py``.

    adaptkit     shards of ``quantize --moe quantize``
    peft, bf16   transformers + peft on the 16-bit model: bitsandbytes quantizes no stacked experts
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_training

LAYERS, VOCABULARY = 2, 1024
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""What ``*`` means to adaptkit here; peft's ``all-linear`` includes routers and experts, which takes it far longer."""
CASES = {
    "256 tokens": (256, False, ()),
    "256 tokens, checkpointing": (256, True, ()),
    "1024 tokens, checkpointing": (1024, True, ()),
    "256 tokens, checkpointing, experts": (256, True, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
}
"""Tokens of the sequence, whether layers are checkpointed, and which stacked expert matrices get adapters, too."""


def make_base(folder: Path) -> None:
    """Write the random model and its shards."""
    import torch
    import transformers

    transformers.set_seed(0)
    config = transformers.OlmoeConfig(
        intermediate_size=1024, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, eos_token_id=0, dtype="bfloat16"
    )
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    command = [sys.executable, "-m", "adaptkit.cli.main", "quantize", str(folder / "plain"), "-o", str(folder / "nf4")]
    subprocess.run([*command, "--moe", "quantize"], check=True, stdout=subprocess.DEVNULL)


def work(side: str, case: str, folder: Path, threads: int) -> None:
    """Run one side in this process; see ``bench_training.serve``."""
    bench_training.begin(side, threads)
    length, checkpointing, experts = CASES[case]
    if side == "adaptkit":
        policy, patterns = "layer" if checkpointing else "none", tuple(f"*.{name}" for name in experts)
        step: Callable[[], float] = bench_training.AdaptkitStep(
            folder / "nf4", length, 1.0, policy, vocabulary=VOCABULARY, experts=patterns
        )
    else:
        step = bench_training.peft_step(
            folder / "plain", length, 1.0, checkpointing,
            packed=False, vocabulary=VOCABULARY, targets=ATTENTION, experts=experts,
        )  # fmt: skip
    bench_training.serve(step)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.case, options.folder, options.threads)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.threads} thread(s)")
    folder = Path(tempfile.mkdtemp(prefix="bench-experts-"))
    try:
        make_base(folder)
        for case in options.only or CASES:
            common = ["--case", case, "--threads", str(options.threads), "--folder", str(folder)]
            sides = {side: [__file__, "--work", side, *common] for side in ("adaptkit", "peft, bf16")}
            bench_training.compare(case, options.rounds, options.threads, sides)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
