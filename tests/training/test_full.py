"""Full fine-tuning trains transformers' own model, and writes a checkpoint with the layout of its base."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import peft_adapters
import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import BaseMismatchError, NonFiniteError, UsageError
from adaptkit.operations.verify import verify
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.evaluation.evaluate import EvaluateOptions, evaluate
from adaptkit.training.loop import train
from adaptkit.training.memory.activations import predicted_memory, save_activations
from adaptkit.training.memory.adamw import moment_bytes
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.adapt import parameter_places, train_whole
from adaptkit.training.network.model import load_model
from adaptkit.training.network.start import add_trainable, resolve_method
from adaptkit.training.plan import plan
from adaptkit.training.plan_options import PlanOptions
from adaptkit.training.result import records_of, write_result

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).view(2, 40)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    tiny.write_llama(root / "tied", shards=3)
    tiny.write_llama(root / "untied", tied=False)
    tiny.write_gpt2(root / "gpt2", shards=2)
    tiny.write_family(root / "experts", "mixtral")
    tiny.write_family(root / "fused", "qwen3_moe", fused_experts=True)
    tiny.write_family(root / "phi", "phi")
    return root


FAMILIES = ["tied", "untied", "gpt2", "experts", "fused", "phi"]


def begun(base, dtype="float32"):
    config = resolve_method(TrainConfig(base=str(base), data=("none",), method="full"), Checkpoint(base))
    model = load_model(base, getattr(torch, dtype), CPU)
    add_trainable(model, config, None, load_tokenizer(base))
    return model, config, Trainable.of(model)


def written(folder, model, config):
    with Output(folder, "plan") as out:
        out.publish(write_result(out, model, config, None, records_of(model.checkpoint, None), None, []))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_base_does_not_stay_in_memory_beside_the_trained_weights(family, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = AutoConfig.for_model(family, **sizes, num_local_experts=2, vocab_size=2048)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16, CPU)
    train_whole(model, parameter_places(model))
    file = tmp_path / "model.safetensors"
    found = re.findall(rf"^\S+ .* {file}\n(?:\w+:.*\n)*?Rss: *(\d+) kB", Path("/proc/self/smaps").read_text(), re.M)
    assert found
    assert sum(map(int, found)) * 1024 < file.stat().st_size / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["tied", "untied", "phi"])
def test_plan_and_the_run_predict_the_same_memory_beside_activations(bases, family, dtype):
    model, config, trainable = begun(bases / family, dtype)
    kept = save_activations(model.network, replace(config, checkpointing="layer"), (2, 64), CPU)
    state = moment_bytes(trainable.values.numel(), 32)
    parts = predicted_memory(model.network, trainable.values.numel(), state, kept).parts()
    options = PlanOptions(method="full", max_length=64, batch_size=2, compute_dtype=dtype, device="cpu")
    found = dict(plan(bases / family, options).memory)
    assert parts["logits"] > 4 * model.network.get_output_embeddings().weight.numel()
    del parts["activations"], found["activations"]
    assert found == parts


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_transformers_model(bases, family):
    model, _, trainable = begun(bases / family)
    plain = AutoModelForCausalLM.from_pretrained(bases / family, dtype=torch.float32).train()
    model.network.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    plain(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    assert trainable.values.numel() == sum(p.numel() for p in expected.values())
    for name, parameter in expected.items():
        found = model.whole[name].parameter.grad
        found = found.T if model.whole[name].transposed else found
        assert float((found - parameter.grad).norm()) <= 1e-5 * float(parameter.grad.norm()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_model_is_written_with_the_bytes_of_its_base(bases, family, tmp_path):
    model, config, _ = begun(bases / family, "bfloat16")
    folder = written(tmp_path / "tuned", model, config)
    for path in (bases / family).iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert verify(folder).kind == "checkpoint"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_a_written_checkpoint(bases, family, tmp_path):
    model, config, trainable = begun(bases / family)
    generator = torch.Generator().manual_seed(3)
    trainable.values.add_(torch.randn(trainable.values.shape, generator=generator), alpha=0.02)
    if Checkpoint(bases / family).config["dtype"] == "bfloat16":
        trainable.values.copy_(trainable.values.bfloat16())  # so that writing rounds nothing
    folder = written(tmp_path / "tuned", model, config)
    with peft_adapters.quiet():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(bases / family, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.network.eval()(IDS).logits
        assert float((loaded(IDS).logits - expected).abs().max()) < 1e-5
        assert float((before(IDS).logits - expected).abs().max()) > 1e-2


def test_logits_in_bfloat16_equal_those_of_a_frozen_bfloat16_model(bases):
    model, _, trainable = begun(bases / "tied", "bfloat16")
    assert trainable.values.dtype == torch.float32
    frozen = load_model(bases / "tied", torch.bfloat16, CPU).network
    plain = AutoModelForCausalLM.from_pretrained(bases / "tied", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        found = model.network.eval()(IDS).logits
        assert torch.equal(found, frozen(IDS).logits)
        assert float((found - plain(IDS).logits).abs().max()) < 0.05


def test_a_run_lowers_the_loss_and_preserves_the_file_layout(bases, instructions, tmp_path):
    base = bases / "tied"
    config = TrainConfig(
        base=str(base), data=(str(instructions),), method="full", steps=12, batch_size=4, learning_rate=2e-3,
        compute_dtype="float32", device="cpu",
    )  # fmt: skip
    report = train(config, tmp_path / "tuned")
    assert report.held_out_after < 0.9 * report.held_out_before
    options = EvaluateOptions(compute_dtype="float32", device="cpu")
    losses = [evaluate(folder, None, [instructions], options).loss for folder in (base, tmp_path / "tuned")]
    assert losses[1] < 0.9 * losses[0]
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(tmp_path / "tuned" / path.name, "pt") as after:
            assert [(n, after.get_tensor(n).dtype) for n in after.keys()] == [  # noqa: SIM118
                (n, before.get_tensor(n).dtype)
                for n in before.keys()  # noqa: SIM118
            ]


def test_a_quantized_base_is_refused_with_a_hint_to_dequantize(llama_nf4):
    config = TrainConfig(base=str(llama_nf4), data=("none",), method="full")
    with pytest.raises(UsageError, match="is quantized; method full") as caught:
        resolve_method(config, Checkpoint(llama_nf4))
    assert "dequantize" in caught.value.hint


def test_a_weight_too_large_for_its_stored_type_is_an_error(bases, tmp_path):
    model, config, trainable = begun(bases / "tied")
    trainable.values[5] = float("inf")
    with pytest.raises(NonFiniteError, match="too large for BF16"):
        written(tmp_path / "tuned", model, config)
    assert not (tmp_path / "tuned").exists()


def test_weights_that_could_not_be_written_back_are_refused_before_training(tmp_path, monkeypatch):
    """HRM's files store gate and up as one matrix, its layers as two."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "hrm_text", {"num_key_value_heads": 4, "head_dim": 16})
    base = tiny.write_architecture(tmp_path / "base", "hrm_text")
    data = tiny.write_instructions(tmp_path / "rows.jsonl")
    config = TrainConfig(base=str(base), data=(str(data),), method="full", max_length=64, device="cpu")
    with pytest.raises(BaseMismatchError, match=r"assembles .* in an unsupported way") as caught:
        plan_run(config, tmp_path / "tuned")
    assert caught.value.hint == "train a LoRA adapter of it instead"
