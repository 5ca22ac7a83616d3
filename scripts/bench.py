"""Compare time and memory of adaptkit's commands with those of common alternatives, each as a whole process.

    .venv/bin/python scripts/bench.py help|quantize|formats|memory|merge|diff [--rounds 3]

The checkpoint is a random Llama of 1.1 billion parameters, bfloat16, five shards, made once in the user's cache;
``memory`` also uses one of four times that size, both in total and per matrix.
Alternatives: transformers + bitsandbytes (``from_pretrained(load_in_4bit)`` and ``save_pretrained``), peft
(``merge_and_unload`` and ``save_pretrained``), and a plain copy followed by a sync. Sides alternate in each round;
medians are printed with the ratio to adaptkit. Peak memory is that of the process, as measured by the kernel.
``diff`` compares two adapters for that checkpoint; its alternative forms both changes of every weight in float32.
Singular values of such matrices take minutes, so they are measured for one weight of each shape, and scaled up.
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


MAKE_RANDOM_ADAPTER = """
import json, pathlib, torch
from safetensors.torch import save_file
hidden, inter, keys = {hidden}, {intermediate}, {keys}
shapes = {{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
          "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
          "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden), "mlp.down_proj": (hidden, inter)}}
for seed, folder in [({seed}, pathlib.Path({folder!r}))]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {{}}
    for layer in range({layers}):
        for name, (out, into) in shapes.items():
            key = f"base_model.model.model.layers.{{layer}}.{{name}}.lora_"
            tensors[f"{{key}}A.weight"] = torch.randn(16, into, generator=generator) / 45
            tensors[f"{{key}}B.weight"] = torch.randn(out, 16, generator=generator) / 500
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {{"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": sorted(shapes)}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
"""

TIME_DIFF = """
import collections, pathlib, statistics, time, torch
from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.operations._diff.modules import differ_in_module
from adaptkit.operations._threads import map_in_threads
one, two = (read_adapter(pathlib.Path(path)).modules for path in ({first!r}, {second!r}))

def dense(module, spectra):
    x, y = ((t.lora_b @ t.lora_a).mul_(t.scaling) for t in (one[module], two[module]))
    norms = torch.linalg.vector_norm(x), torch.linalg.vector_norm(y)
    found = [norms, torch.dot(x.view(-1), y.view(-1)) / norms[0] / norms[1]]
    return found + [torch.linalg.svdvals(matrix) for matrix in (x, y, x - y)] if spectra else found

def figures():  # all that the command says of each module: angles, interference and signs, too
    return list(map_in_threads(lambda name: differ_in_module(name, one[name], two[name]), one, 2))

def products(module):
    (a, b), (c, d) = ((term.a.astype("f8"), term.b.astype("f8")) for term in (one[module], two[module]))
    return [((y.T @ z) * (w @ x.T)).sum() for w, y, x, z in ((a, b, a, b), (a, b, c, d), (c, d, c, d))]

def norms():
    return list(map_in_threads(products, one, 2))

def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

sides = {{"adaptkit, all figures": figures, "adaptkit, norms and cosine": norms,
         "dense, norms and cosine": lambda: [dense(module, False) for module in one]}}
times = {{name: [] for name in sides}}
for _ in range({rounds}):
    for name, work in sides.items():
        times[name].append(seconds(work))
found = {{name: statistics.median(runs) for name, runs in times.items()}}
shapes = collections.defaultdict(list)
for module in one:
    shapes[one[module].shape].append(module)
scaled = sum(len(modules) * seconds(lambda: dense(modules[0], True)) for modules in shapes.values())
found[f"dense, with singular values ({{len(shapes)}} of {{len(one)}})"] = scaled
for name, value in found.items():
    ratios = [value / found[side] for side in ("adaptkit, all figures", "adaptkit, norms and cosine")]
    print(f"{{name:44}} {{value:9.3f}} s {{ratios[0]:10.1f}} {{ratios[1]:10.1f}}")
"""


def python(code: str, **names: Path) -> list[str]:
    """Return a command that runs a snippet with paths filled in."""
    return [sys.executable, "-c", code.format(**{name: str(path) for name, path in names.items()})]


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the peak resident megabytes of the process.

    All sides may use cached bytecode, as after a pip installation, even if this shell's environment disables it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
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
    """Make a random checkpoint once; by default, the one of 1.1 B parameters."""
    model = FOLDER / name
    if not model.exists():
        making = FOLDER / "making"
        code = MAKE_MODEL.format(model=str(making), hidden=hidden, intermediate=intermediate, shard=shard)
        subprocess.run([sys.executable, "-c", code], check=True)
        making.rename(model)
    return model


def adapter() -> Path:
    """Make a rank-16 adapter for all linear layers of the default checkpoint, once."""
    folder = FOLDER / "adapter"
    if not folder.exists():
        subprocess.run(python(MAKE_ADAPTER, model=checkpoint(), adapter=FOLDER / "making-adapter"), check=True)
        (FOLDER / "making-adapter").rename(folder)
    return folder


def random_adapter(
    name: str, hidden: int, intermediate: int, seed: int = 0, layers: int = 22, keys: int | None = None
) -> Path:
    """Make a rank-16 adapter for all linear layers of a checkpoint of these sizes, without that checkpoint."""
    folder = FOLDER / name
    if not (folder / "adapter_config.json").exists():
        sizes = {"hidden": hidden, "intermediate": intermediate, "layers": layers, "keys": keys or hidden // 8}
        code = MAKE_RANDOM_ADAPTER.format(folder=str(folder), seed=seed, **sizes)
        subprocess.run([sys.executable, "-c", code], check=True)
    return folder


def bench_help(rounds: int) -> None:
    """Time ``--help``."""
    sides = {
        f"adaptkit {name} --help".replace("  ", " "): [*ADAPTKIT, *name.split(), "--help"] for name in ("", "train")
    }
    compare(sides | {"python -c pass": [sys.executable, "-c", "pass"]}, 5 * rounds, FOLDER / "out")


def bench_quantize(rounds: int) -> None:
    """Time quantizing 16 bits to NF4 with doubly quantized constants."""
    model, out, made = checkpoint(), FOLDER / "out", FOLDER / "llama-1.1b-nf4"
    ours = [*ADAPTKIT, "quantize", str(model), "-o"]
    shutil.rmtree(made, ignore_errors=True)
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


def bench_formats(rounds: int) -> None:
    """Time quantizing 16 bits to NF4 and to formats that servers run."""
    model, out = checkpoint(), FOLDER / "out"
    forms = {"nf4": [], "w4a16": ["--block-size", "128"], "fp8": [], "int8": [], "mxfp4": [], "nvfp4": []}
    ours = [*ADAPTKIT, "quantize", str(model), "-o", str(out), "--format"]
    compare({f"adaptkit quantize --format {form}": [*ours, form, *more] for form, more in forms.items()}, rounds, out)


def bench_memory(rounds: int) -> None:
    """Measure quantize and merge on two checkpoints, one with four times the parameters and matrix sizes."""
    small, large = checkpoint(), checkpoint("llama-4.1b", 4096, 11264, "1900MB")
    out = FOLDER / "out"
    for model in (small, large):  # caches the architecture: the process that queries transformers would be the largest
        subprocess.run([*ADAPTKIT, "quantize", str(model), "-o", str(out), "--dry-run", "--quiet"], check=True)
    sides = {f"quantize {model.name}": [*ADAPTKIT, "quantize", str(model), "-o", str(out)] for model in (small, large)}
    adapters = {small: random_adapter("memory-small", 2048, 5632), large: random_adapter("memory-large", 4096, 11264)}
    for model, lora in adapters.items():
        sides[f"merge {model.name}"] = [*ADAPTKIT, "merge", str(model), str(lora), "-o", str(out)]
    compare(sides, rounds, out)


def bench_merge(rounds: int) -> None:
    """Time merging a rank-16 adapter for all linear layers into 16 bits, and unmerging it."""
    model, lora, out, merged = checkpoint(), adapter(), FOLDER / "out", FOLDER / "merged"
    ours = [*ADAPTKIT, "merge", str(model), str(lora), "-o"]
    shutil.rmtree(merged, ignore_errors=True)
    subprocess.run([*ours, str(merged)], check=True, stdout=subprocess.DEVNULL)
    compare(
        {
            "adaptkit merge --no-undo": [*ours, str(out), "--no-undo"],
            "adaptkit merge": [*ours, str(out)],
            "adaptkit unmerge": [*ADAPTKIT, "unmerge", str(merged), "--adapter", str(lora), "-o", str(out)],
            "peft merge_and_unload + save": python(PEER_MERGE, model=model, adapter=lora, out=out),
            "cp of the input, and sync": ["sh", "-c", f"cp -r '{model}' '{out}' && sync"],
        },
        rounds,
        out,
    )
    shutil.rmtree(merged)


def bench_diff(rounds: int) -> None:
    """Time comparing two rank-16 adapters for all 154 linear layers, factored and dense, and the whole command."""
    folders = {name: random_adapter(f"diff-{name}", 2048, 5632, seed) for seed, name in enumerate(("first", "second"))}
    print(f"{'':44} {'':11} {'to all':>10} {'to norms':>10}   ratios", flush=True)
    subprocess.run(python(TIME_DIFF.replace("{rounds}", str(rounds)), **folders), check=True)
    paths = " ".join(f"'{folder}'" for folder in folders.values())
    command = " ".join([*ADAPTKIT, "diff", paths, "--quiet"])  # exits with 1, since the adapters differ
    sides = {"adaptkit diff": ["sh", "-c", f"{command} || test $? -eq 1"]}
    compare(sides | {"python -c 'import torch'": [sys.executable, "-c", "import torch"]}, rounds, FOLDER / "out")


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["help", "quantize", "formats", "memory", "merge", "diff"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.rounds} rounds")
    sides = {"help": bench_help, "quantize": bench_quantize, "memory": bench_memory, "merge": bench_merge}
    sides["formats"] = bench_formats
    (sides | {"diff": bench_diff})[options.what](options.rounds)


if __name__ == "__main__":
    main()
