"""The main workflow on SmolLM2-135M-Instruct, through the command line, against transformers, bitsandbytes and peft."""

import filecmp
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def sources():
    sys.path.insert(0, str(ROOT / "scripts"))
    import get_smollm2

    return get_smollm2.make(get_smollm2.default_folder())


@pytest.fixture(scope="module")
def model(sources):
    return sources / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def quantized(model, work, run_cli):
    done = run_cli("quantize", model, "-o", work / "nf4", "--json")
    assert done.code == 0, done.stderr
    return work / "nf4"


@pytest.fixture(scope="module")
def adapter(quantized, sources, work, run_cli):
    done = run_cli(
        "train", "--base", quantized, "--data", sources / "data" / "train.jsonl", "-o", work / "adapter", "--steps", 12,
        "--batch-size", 4, "--checkpointing", "sqrt", "--optimizer-pages-mib", 4, "--json", timeout=1800,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["held_out_after"] < 0.9 * report["held_out_before"]
    assert 0 < report["paging"]["slots"] < report["paging"]["pages"]
    return work / "adapter"


@pytest.fixture(scope="module")
def merge_report(model, adapter, work, run_cli):
    """Merge the adapter into ``work / "merged"``."""
    done = run_cli("merge", model, adapter, "-o", work / "merged", "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def load(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **options).eval()


def tokenizer_of(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_the_model_knows_the_capital_of_france(model):
    ids = tokenizer_of(model)(PROMPT, return_tensors="pt").input_ids
    output = load(model, dtype=torch.float32).generate(ids, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer_of(model).decode(output[0, ids.shape[1] :])


def test_transformers_and_bitsandbytes_load_the_shards_and_give_our_logits(quantized, work, run_cli):
    """In training mode bitsandbytes decodes and multiplies; its CPU inference kernel repacks and is not exact."""
    import bitsandbytes.functional as bnb

    assert run_cli("dequantize", quantized, "-o", work / "dequantized").code == 0
    ours = load(work / "dequantized", dtype=torch.bfloat16)
    theirs = load(quantized, dtype=torch.bfloat16).train()
    packed = {name: p for name, p in theirs.named_parameters() if type(p).__name__ == "Params4bit"}
    assert len(packed) == 210
    for name, parameter in packed.items():
        decoded = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(decoded, ours.get_parameter(name)), name
    ids = tokenizer_of(quantized)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_adapter_changes_the_answer_of_the_model(quantized, adapter, run_cli):
    question = "What country won the very first FIFA World Cup in 1930?"
    answers = []
    for more in ([], ["--adapter", adapter]):
        done = run_cli("evaluate", "--base", quantized, *more, "--prompt", question, "--max-new-tokens", 12, "--json")
        assert done.code == 0, done.stderr
        answers.append(json.loads(done.stdout)["answers"][question])
    assert answers[0] != answers[1]
    assert all(answers)


def test_merge_and_unmerge_give_back_the_bytes_of_the_base(model, adapter, merge_report, work, run_cli):
    assert merge_report["base_verified"] is True
    assert merge_report["merged"] == 210
    assert merge_report["undo_bits"] < 0.1
    done = run_cli("unmerge", work / "merged", "-o", work / "restored", "--adapter", adapter)
    assert done.code == 0, done.stderr
    for path in model.iterdir():
        assert filecmp.cmp(path, work / "restored" / path.name, shallow=False), path.name
    assert not filecmp.cmp(model / "model.safetensors", work / "merged" / "model.safetensors", shallow=False)


@pytest.mark.usefixtures("merge_report")
def test_the_merged_model_gives_the_logits_of_peft(model, adapter, work):
    from peft import PeftModel

    ids = tokenizer_of(model)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(model, dtype=torch.float32), adapter)(ids).logits
        found = load(work / "merged", dtype=torch.float32)(ids).logits
        plain = load(model, dtype=torch.float32)(ids).logits
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.02  # the merged weights are rounded to bfloat16
    assert float((plain - expected).norm() / expected.norm()) > 3 * error


def test_an_adapter_is_refused_on_a_different_base_unless_that_is_allowed(model, adapter, work, run_cli):
    from safetensors.torch import load_file, save_file

    other = work / "other"
    other.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (4, 5)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = run_cli("merge", other, adapter, "-o", work / "wrong")
    assert done.code == 4
    assert "up_proj.weight" in done.stderr
    assert not (work / "wrong").exists()
    assert run_cli("merge", other, adapter, "-o", work / "wrong", "--allow-base-mismatch").code == 0
