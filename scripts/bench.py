"""Time adaptkit against what people use today, both sides in one go, each as a whole process.

    .venv/bin/python scripts/bench.py help|quantize|memory|merge [--rounds 3]

The checkpoint is a random Llama of 1.1 billion parameters, bfloat16, five shards, made once in the user's cache; for
memory, one of four times that size, in matrices and in bytes, too.
Peers: transformers + bitsandbytes (``from_pretrained(load_in_4bit)`` and ``save_pretrained``), peft
(``merge_and_unload`` and ``save_pretrained``), and a plain copy with a sync after it. The rounds alternate; medians are
printed with the ratio to adaptkit. Peak memory is the process's own, as the kernel accounts it.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import get_smollm2

FOLDER = get_smollm2.default_folder().parent / "bench"
ADAPTKIT = [sys.executable, "-m", "adaptkit.cli.main"]

MAKE_MODEL = """
import torch, transformers
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size={hidden}, intermediate_size={intermediate}, num_hidden_layers=22,
    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
transformers.LlamaForCausalLM(config).save_pretrained({model!r}, max_shard_size="{shard}")
"""

MAKE_ADAPTER = """
import torch, transformers
from peft import LoraConfig, get_peft_model
model = transformers.AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16)
torch.manual_seed(1)
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(std=0.002)
adapted.save_pretrained({adapter!r})
"""

PEER_QUANTIZE = """
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    {model!r}, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
model.save_pretrained({out!r})
"""

PEER_MERGE = """
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload().save_pretrained({out!r}, max_shard_size="470MB")
"""


def python(code: str, **names: Path) -> list[str]:
    """A command that runs a snippet with paths filled in."""
    return [sys.executable, "-c", code.format(**{name: str(path) for name, path in names.items()})]


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; seconds, and peak resident megabytes of the process."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"bench: {command[:3]} failed:\n{errors.read()[-2000:]}")
    return time.monotonic() - started, usage.ru_maxrss / 1000


def compare(sides: dict[str, list[str]], rounds: int, out: Path) -> None:
    """Run all sides in turn, ``rounds`` times, and print medians and ratios to the first."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            found[name].append(measure(command))
    shutil.rmtree(out, ignore_errors=True)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    first = next(iter(medians.values()))
    print(f"{'':34} {'seconds':>9} {'ratio':>8} {'peak MB':>9} {'ratio':>8}")
    for name, (seconds, memory) in medians.items():
        print(f"{name:34} {seconds:9.2f} {seconds / first[0]:8.2f} {memory:9.0f} {memory / first[1]:8.2f}")


def checkpoint(name: str = "llama-1.1b", hidden: int = 2048, intermediate: int = 5632, shard: str = "470MB") -> Path:
    """A random checkpoint, the one of 1.1 B parameters unless said otherwise."""
    model = FOLDER / name
    if not model.exists():
        making = FOLDER / "making"
        code = MAKE_MODEL.format(model=str(making), hidden=hidden, intermediate=intermediate, shard=shard)
        subprocess.run([sys.executable, "-c", code], check=True)
        making.rename(model)
    return model


def adapter() -> Path:
    """A rank-16 adapter for all of its linear layers."""
    folder = FOLDER / "adapter"
    if not folder.exists():
        subprocess.run(python(MAKE_ADAPTER, model=checkpoint(), adapter=FOLDER / "making-adapter"), check=True)
        (FOLDER / "making-adapter").rename(folder)
    return folder


def bench_help(rounds: int) -> None:
    """How long ``--help`` takes."""
    sides = {
        f"adaptkit {name} --help".replace("  ", " "): [*ADAPTKIT, *name.split(), "--help"] for name in ("", "train")
    }
    compare(sides | {"python -c pass": [sys.executable, "-c", "pass"]}, 5 * rounds, FOLDER / "out")


def bench_quantize(rounds: int) -> None:
    """16 bits to NF4 with doubly quantized constants."""
    model, out, made = checkpoint(), FOLDER / "out", FOLDER / "llama-1.1b-nf4"
    ours = [*ADAPTKIT, "quantize", str(model), "-o"]
    if not made.exists():
        subprocess.run([*ours, str(made)], check=True, stdout=subprocess.DEVNULL)
    copy = f"mkdir '{out}' && cp -r '{model}' '{out}/input' && cp -r '{made}' '{out}/output' && sync"
    compare(
        {
            "adaptkit quantize": [*ours, str(out)],
            "transformers + bitsandbytes": python(PEER_QUANTIZE, model=model, out=out),
            "cp of input and output, and sync": ["sh", "-c", copy],
        },
        rounds,
        out,
    )


def bench_memory(rounds: int) -> None:
    """Quantize two checkpoints of which one has four times the parameters, and matrices of four times the size."""
    small, large = checkpoint(), checkpoint("llama-4.1b", 4096, 11264, "1900MB")
    out = FOLDER / "out"
    sides = {model.name: [*ADAPTKIT, "quantize", str(model), "-o", str(out)] for model in (small, large)}
    compare(sides, rounds, out)


def bench_merge(rounds: int) -> None:
    """A rank-16 adapter on all linear layers, into 16 bits."""
    model, lora, out = checkpoint(), adapter(), FOLDER / "out"
    ours = [*ADAPTKIT, "merge", str(model), str(lora), "-o", str(out)]
    compare(
        {
            "adaptkit merge": ours,
            "adaptkit merge --no-undo": [*ours, "--no-undo"],
            "peft merge_and_unload + save": python(PEER_MERGE, model=model, adapter=lora, out=out),
            "cp of the input, and sync": ["sh", "-c", f"cp -r '{model}' '{out}' && sync"],
        },
        rounds,
        out,
    )


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["help", "quantize", "memory", "merge"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.rounds} rounds")
    sides = {"help": bench_help, "quantize": bench_quantize, "memory": bench_memory, "merge": bench_merge}
    sides[options.what](options.rounds)


if __name__ == "__main__":
    main()
