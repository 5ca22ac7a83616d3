"""The memory that a run is predicted to need is what the process takes."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaptkit.models.activations import Checkpointing
from adaptkit.models.memory import overhead_bytes
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.fast import accelerate
from adaptkit.training.memory.activations import Activations, predicted_memory, save_activations
from adaptkit.training.memory.segments import checkpoint_layers
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter
from adaptkit.training.plan import plan
from adaptkit.training.plan_options import PlanOptions

CPU = torch.device("cpu")
IDS = torch.arange(64).reshape(2, 32)
CHOICES = {"none": Checkpointing(4, 1, 4), "layer": Checkpointing(4, 1), "sqrt": Checkpointing(4, 2)}


@pytest.fixture(scope="module")
def wide(made):
    """A plain model whose weights are many pages, and its size in 4 bits is mostly that of its layers."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    folder = made / "wide"
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16().save_pretrained(folder)
    return folder


def begun(wide, packed, checkpointing):
    """A model on a base in files of its own, so that no other test's pages count."""
    quantize(wide, packed)
    model = load_model(packed, torch.bfloat16, CPU)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    accelerate(model.network, model.dtype, CPU, model.output_layer)
    checkpoint_layers(model.network, checkpointing)
    return model, predicted_memory(model.network, 0, 0, Activations(checkpointing, 0, 0)).weights


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpointing", [*CHOICES.values(), Checkpointing(4, 1, 2)], ids=str)
def test_the_predicted_weights_are_the_pages_of_the_base_that_stay_resident(wide, tmp_path, checkpointing):
    model, predicted = begun(wide, tmp_path / "packed", checkpointing)
    model.network.train()(input_ids=IDS, use_cache=False).logits.sum().backward()
    report = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"^\S+ .* {tmp_path}/packed/model.safetensors\n(?:\w+:.*\n)*?Rss: *(\d+) kB", report, re.M)
    one = max(weight.base.codes.nbytes for weight in model.linears.values()) if checkpointing.whole < 4 else 0
    whole = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert 1024 * sum(map(int, found)) == pytest.approx(predicted - one, abs=0.1 * whole)  # the system maps neighbours


@pytest.mark.parametrize("policy", CHOICES)
def test_plan_and_the_run_count_the_same_weights(wide, tmp_path, policy):
    _, predicted = begun(wide, tmp_path / "packed", CHOICES[policy])
    options = PlanOptions(rank=4, max_length=32, batch_size=2, checkpointing=policy, device="cpu")
    assert plan(wide, options).memory["weights"] == predicted


@pytest.mark.parametrize("policy", CHOICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_and_the_run_count_the_same_memory_outside_of_tensors(wide, tmp_path, policy, dtype):
    model = load_model(wide, getattr(torch, dtype), CPU)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    accelerate(model.network, model.dtype, CPU, model.output_layer)
    config = TrainConfig(base="base", data=("data",), checkpointing=policy)
    found = save_activations(model.network, config, (2, 32), CPU)
    options = {"method": "lora", "rank": 4, "max_length": 32, "batch_size": 2, "compute_dtype": dtype}
    planned = {
        device: plan(wide, PlanOptions(checkpointing=policy, device=device, **options)).memory["overhead"]
        for device in ("cpu", "cuda")
    }
    assert planned["cpu"] == pytest.approx(found.overhead_bytes, rel=0.01)
    assert planned["cuda"] == 0


def test_kept_products_count_in_16_bits_only_and_gaps_where_layers_keep_everything():
    plain, wide = overhead_bytes(4, 0, 2), overhead_bytes(4, 0, 4)
    assert 64 * 250_000 < plain - wide < 64 * 270_000
    assert overhead_bytes(4, 120_000, 2) - plain == 10_000
    assert overhead_bytes(5, 0, 2) > plain
