"""On a GPU, all kinds of training have the losses of a CPU, and the host rarely waits for the GPU."""

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch

from adaptkit.data.batches import collate
from adaptkit.data.encoding import Sample
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.fast import accelerate, attention_gpu
from adaptkit.training.loop import train
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import load_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PAGED = {"optimizer_pages_mib": 0.02, "page_kib": 4}
OFFLOADED = {"checkpointing": "sqrt", "offload_checkpoints": True}
OPTIONS = {
    "rslora": {"rslora": True, "lora_plus_ratio": 4.0},
    "dora": {"dora": True},
    "samples of like length": {"group_by_length": True},
    "packed rows": {"pack": True, "max_length": 128},
    "whole modules": {"modules_to_save": ("norm",)},
    "the head": {"modules_to_save": ("lm_head",)},
    "tokens": {"trainable_tokens": ("<|im_start|>",)},
    "without checkpoints": {"checkpointing": "none"},
    "all weights": {"method": "full", "optimizer": "adamw8bit"} | PAGED,
    "8 bits in pages": {"optimizer": "adamw8bit"} | PAGED,
    "answers and measurements": {"eval_every": 1, "sample_prompts": ("hello",), "sample_every": 2, "sample_tokens": 3},
    "all that waits": PAGED | OFFLOADED,
}
NETWORKS = ["mistral", "qwen2", "gemma", "phi3", "mixtral", "bloom", "mamba", "llama4_text", "gemma3"]


@pytest.fixture
def config(instructions):
    return {
        "data": (str(instructions),), "rank": 4, "steps": 3, "batch_size": 4, "micro_batch_size": 2, "save_every": 0,
        "learning_rate": 2e-3, "warmup": 0.0, "compute_dtype": "float32",
    }  # fmt: skip


@pytest.fixture
def base(made):
    """Return a function that writes a network once, and returns its quantized or plain folder."""

    def path(name, layers=2, packed=True):
        plain, quantized = made / f"{name}-{layers}-on-gpu", made / f"{name}-{layers}-on-gpu-nf4"
        if not plain.exists():
            if name == "llama":
                tiny.write_llama(plain, layers=layers)
            else:
                (tiny.write_family if name in tiny.FAMILIES else tiny.write_architecture)(plain, name)
            quantize(plain, quantized)
        return str(quantized if packed else plain)

    return path


def losses(config, output, device):
    train(TrainConfig(**config, device=device), output, note=lambda line: None)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines for key in ("loss", "held_out_loss") if key in line]


def agrees_with_a_cpu(config, tmp_path):
    found = losses(config, tmp_path / "gpu", "cuda")
    config.pop("offload_checkpoints", None)  # on a CPU they are in host memory anyway
    expected = losses(config, tmp_path / "cpu", "cpu")
    assert found == pytest.approx(expected, rel=1e-3)
    assert len(found) > 3


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_with_each_option_are_those_of_a_cpu(base, config, option, tmp_path):
    has_adapter = OPTIONS[option].get("method") != "full"
    if not has_adapter:
        config.pop("rank")
    agrees_with_a_cpu(config | {"base": base("llama", packed=has_adapter)} | OPTIONS[option], tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_of_each_network_are_those_of_a_cpu(base, config, name, tmp_path):
    agrees_with_a_cpu(config | {"base": base(name)} | PAGED | OFFLOADED, tmp_path)


@pytest.mark.parametrize(("lengths", "is_apart"), [((37, 20), False), ((150, 140, 1), True)])
def test_packed_samples_have_the_losses_that_they_have_alone(base, lengths, is_apart, monkeypatch):
    """The check for packed rows is skipped for batches of single samples, and for no others."""
    model = load_model(Path(base("llama", packed=False)), torch.float32, torch.device("cuda"))
    accelerate(model.network, model.dtype, torch.device("cuda"), model.output_layer, trains=False)
    ids = [tuple(3 + (index * (7 + at)) % 200 for index in range(length)) for at, length in enumerate(lengths)]
    samples = [Sample(one, one) for one in ids]
    alone = [float(summed_loss(model, collate([(sample,)], 2))) for sample in samples]
    with_padding = collate([tuple(samples), (samples[0],)], 2)
    cut, cuts = attention_gpu._cuts, []
    monkeypatch.setattr(attention_gpu, "_cuts", lambda lengths: cuts.append(lengths) or cut(lengths))
    assert float(summed_loss(model, with_padding)) == pytest.approx(sum(alone) + alone[0], rel=1e-4)
    assert bool(cuts) == is_apart


def waits(config, output):
    """Return how often the host waits for the device in a step."""
    counted = []
    for steps in (1, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                losses(config | {"steps": steps, "held_out": 0.0}, output / str(steps), "cuda")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counted.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert counted[0] > 0
    return (counted[1] - counted[0]) / 2


@pytest.mark.parametrize(
    ("option", "most"),
    [({}, 4), ({"neftune_alpha": 5.0}, 4), ({"pack": True, "max_length": 128}, 8)],
    ids=["plain", "noise", "packed"],
)
def test_the_number_of_waits_in_a_step_does_not_depend_on_the_number_of_layers(base, config, option, most, tmp_path):
    """The host waits for the losses and for the norm.

    In each of two micro-batches, it also waits for transformers' check of whether positions restart; if rows are
    packed, for their lengths too.
    """
    found = [waits(config | option | {"base": base("llama", layers)}, tmp_path / str(layers)) for layers in (2, 6)]
    assert found[0] == found[1] <= most
