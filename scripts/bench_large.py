"""Quantize, train, merge and unmerge a random Llama of 7.4 billion parameters, each step as a whole process.

    .venv/bin/python scripts/bench_large.py [--tokens 1024] [--rank 8] [--peers]

Prints seconds and peak resident memory of every process, and for the training step the memory that was predicted and
measured (see docs/memory.md). ``--peers`` also runs transformers + bitsandbytes beside ``quantize``, and peft beside
``merge``, with the ratio to adaptkit. Needs 50 GB in the user's cache folder, of which it keeps the 15 GB checkpoint.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
from pathlib import Path

import bench
import get_smollm2

FOLDER = bench.FOLDER / "large"
HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 4096, 14336, 1024, 32, 49152
_PER_FILE = 8


def make_checkpoint(model: Path) -> None:
    """Make the checkpoint, with SmolLM2's tokenizer; its weights are slices of one random vector."""
    import torch
    from safetensors.torch import save_file

    making = FOLDER / "making"
    source = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(source, making, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((making / "config.json").read_text()) | {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": KEYS // 128, "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    (making / "config.json").write_text(json.dumps(config))
    random = (0.02 * torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0))).bfloat16()
    starts = iter(torch.randint(0, len(random) - HIDDEN * INNER, (9 * LAYERS,)).tolist())

    def weight(rows: int, columns: int) -> torch.Tensor:
        start = next(starts) if rows < VOCABULARY else 0
        return random[start : start + rows * columns].clone().view(rows, columns)

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    files, places = LAYERS // _PER_FILE, {}
    for number in range(files):
        ends = {0: {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}}
        last = {"lm_head.weight": weight(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
        tensors = ends.get(number, {}) | (last if number == files - 1 else {})
        for layer in range(number * _PER_FILE, (number + 1) * _PER_FILE):
            path = f"model.layers.{layer}"
            tensors |= {f"{path}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{path}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, making / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    total = sum(file.stat().st_size for file in making.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (making / "model.safetensors.index.json").write_text(json.dumps(index))
    making.rename(model)


def run(label: str, command: list[object], first: tuple[float, float] | None = None) -> tuple[float, float]:
    """Run and print one process, with the ratio to another one."""
    os.sync()
    seconds, memory = bench.measure([str(part) for part in command])
    ratio = f"  {seconds / first[0]:6.2f} x  {memory / first[1]:6.2f} x" if first else ""
    print(f"{label:44} {seconds:9.1f} s {memory:9.0f} MB{ratio}", flush=True)
    return seconds, memory


def main() -> None:
    """Run every step once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model, data = FOLDER / "llama-7.4b", get_smollm2.default_folder() / "data" / "train.jsonl"
    if not model.exists():  # in another process, whose memory the kernel would count as that of the next ones
        making = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(model,))
        making.start()
        making.join()
    base, adapter, merged, out = (FOLDER / name for name in ("base", "adapter", "merged", "out"))
    for folder in (base, adapter, merged, out):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.tokens} tokens")
    ours = run("adaptkit quantize", [*bench.ADAPTKIT, "quantize", model, "-o", base])
    if options.peers:
        run("transformers + bitsandbytes", bench.python(bench.PEER_QUANTIZE, model=model, out=out), ours)
        shutil.rmtree(out)
    report = FOLDER / "report.json"
    train = [
        *bench.ADAPTKIT,
        "train",
        "--base",
        base,
        "--data",
        data,
        "-o",
        adapter,
        "--steps",
        "1",
        "--pack",
        "--json",
    ]
    train += ["--batch-size", "1", "--max-length", str(options.tokens), "--rank", str(options.rank), "--held-out", "0"]
    run("adaptkit train, one step", ["sh", "-c", f'exec "$@" >{report}', "sh", *train])
    memory = json.loads(report.read_text())["memory"]
    said = ", ".join(f"{memory[name] / 1e9:.2f} GB {name}" for name in ("predicted", "measured"))
    print(f"{'':44} {said}", flush=True)
    ours = run("adaptkit merge", [*bench.ADAPTKIT, "merge", model, adapter, "-o", merged])
    if options.peers:
        run("peft, merge_and_unload", bench.python(bench.PEER_MERGE, model=model, adapter=adapter, out=out), ours)
        shutil.rmtree(out)
    run("adaptkit unmerge", [*bench.ADAPTKIT, "unmerge", merged, "--adapter", adapter, "-o", out])
    for folder in (base, adapter, merged, out):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
