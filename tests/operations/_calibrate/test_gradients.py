"""Gradients measured layer by layer equal those that autograd computes on the whole model."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch
import transformers
from folders import edited_tensors
from torch import nn

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import NonFiniteError
from adaptkit.operations._calibrate import gradients, replay
from adaptkit.operations._calibrate.layerwise import layer_moments

FAMILIES = ["llama", "qwen2", "gemma", "phi", "mixtral", "gpt2", "gemma4_text"]


@pytest.fixture(scope="module")
def family(made):
    """Write a tiny float32 checkpoint of a family, once."""

    def write(name):
        folder = made / f"gradients-{name}"
        if not folder.exists():
            if name == "gpt2":
                tiny.write_gpt2(folder)
            elif name in tiny.ARCHITECTURES:
                tiny.write_architecture(folder, name)
            else:
                tiny.write_family(folder, name, tied=name == "gemma", dtype="float32")
        return folder

    return write


TOKEN = 7


@pytest.fixture
def layer_gradients(tmp_path):
    return partial(gradients.layer_gradients, folder=tmp_path)


def windows(count=5, length=20):
    """Return random tokens without padding, whose embedding is zero: there the norms' gradients are huge."""
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def by_autograd(folder, tokens):
    """Compute E[g²] of linears' outputs for `TOKEN`'s log-likelihood, with transformers and autograd alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head, outputs = model.get_output_embeddings(), {}
    tied = head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and not (tied and module is head):
            module.register_forward_hook(lambda _, args, output, name=name: outputs.setdefault(name, output))
    grads = {}
    for window in tokens:
        outputs.clear()
        likelihood = model(window[None]).logits[0].log_softmax(-1)[:, TOKEN].sum()
        for name, grad in zip(outputs, torch.autograd.grad(likelihood, list(outputs.values())), strict=True):
            grads.setdefault(name, []).append(grad.reshape(-1, grad.shape[-1]).double())
    return {name: torch.cat(found).square().mean(0) for name, found in grads.items()}


def of_all(layers):
    return {name: square for layer in layers for name, square in layer.gradient_square.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_autograd_on_the_whole_model(name, family, monkeypatch, layer_gradients):
    monkeypatch.setattr(replay, "BATCH_TOKENS", 40)  # batches of 2, 2 and 1 windows
    monkeypatch.setattr(gradients, "LOGIT_POSITIONS", 8)
    monkeypatch.setattr(gradients, "_drawn", lambda probabilities, _: torch.full((len(probabilities), 1), TOKEN))
    expected = by_autograd(family(name), windows())
    expected.pop("model.per_layer_model_projection", None)  # outside the layers, so not measured
    found = of_all(layer_gradients(Checkpoint(family(name)), windows()))
    assert set(found) == set(expected)
    for path, square in expected.items():
        scale = float(square.mean())
        assert np.allclose(found[path], square, atol=1e-4 * scale, rtol=1e-3), path


def test_drawn_tokens_follow_the_prediction(family, layer_gradients):
    """The squared gradient by the logits, averaged over drawn tokens, is p (1 - p), whatever the global seed."""
    tokens, checkpoint = windows(60, 40), Checkpoint(family("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(family("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        predicted = model(tokens).logits.softmax(-1)
    variance = (predicted * (1 - predicted)).mean((0, 1))
    found = torch.from_numpy(next(layer_gradients(checkpoint, tokens)).gradient_square["lm_head"])
    assert float(found.sum() / variance.sum()) == pytest.approx(1, abs=0.01)
    likely = variance > variance.median()
    assert float((found / variance)[likely].std()) < 0.6
    torch.manual_seed(5)
    again = next(layer_gradients(checkpoint, tokens)).gradient_square["lm_head"]
    assert np.array_equal(found, again)


def test_head_and_layers_are_measured_last_to_first_with_one_layer_in_memory(family, monkeypatch, layer_gradients):
    networks, loaded = [], []
    build = replay.empty_network
    monkeypatch.setattr(replay, "empty_network", lambda *given: networks.append(build(*given)) or networks[-1])

    def watch(done, total):
        names = {name for name, parameter in networks[0].named_parameters() if not parameter.is_meta}
        loaded.append((done, total, sorted({name.split(".")[2] for name in names if ".layers." in name})))
        assert "lm_head.weight" not in names

    layers = layer_gradients(Checkpoint(family("llama")), windows(), progress=watch)
    prefixes = [".".join(next(iter(layer.inputs)).split(".")[:3]) for layer in layers]
    assert prefixes == ["lm_head", "model.layers.1", "model.layers.0"]
    assert loaded == [(1, 4, ["0"]), (2, 4, ["1"]), (3, 4, ["1"]), (4, 4, ["0"])]


def test_the_second_order_estimate_is_close_to_the_kl_divergence_of_a_small_change(family, layer_gradients):
    """The formula in the docstring of ``gradients``, with both factors measured, against KL between two models."""
    from adaptkit.operations._calibrate.layerwise import layer_moments

    folder, tokens = family("llama"), windows(60, 40)
    checkpoint = Checkpoint(folder)
    squares = of_all(layer_gradients(checkpoint, tokens))
    moments = {n: m for layer in layer_moments(checkpoint, tokens, second_moments=True) for n, m in layer.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(tokens).logits.log_softmax(-1)
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
            weight = model.get_parameter(f"{name}.weight")
            change = 1e-3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight += change
            after = model(tokens).logits.log_softmax(-1)
            weight -= change
            divergence = float((before.exp() * (before - after)).sum(-1).mean())
            rows = ((change @ torch.from_numpy(moments[name].second_moment).double()) * change).sum(1)
            estimate = 0.5 * float((torch.from_numpy(squares[name]) * rows).sum())
            assert 0.6 < estimate / divergence < 1.6, (name, estimate, divergence)


def test_nan_predictions_are_reported(family, copy_of, layer_gradients):

    folder = copy_of(family("llama"))
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="the model's predictions are NaN"):
        of_all(layer_gradients(Checkpoint(folder), windows(1)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_input_moments_equal_those_of_layer_moments(name, family, layer_gradients):
    checkpoint = Checkpoint(family(name))
    forward = {n: m for layer in layer_moments(checkpoint, windows()) for n, m in layer.items()}
    found = {n: m for layer in layer_gradients(checkpoint, windows()) for n, m in layer.inputs.items()}
    assert set(found) == set(forward)
    for path, moments in found.items():
        assert np.allclose(moments.mean_square, forward[path].mean_square, rtol=1e-5), path
