"""A DoRA layer computes what peft computes, and saves no weight for the backward pass."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional

from adaptkit.models.activations import Alive
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.dora import row_norms, squared_rows
from adaptkit.training.network.frozen import PlainWeight
from adaptkit.training.network.linear import LoraLinear


def layers(dropout=0.0, seed=0):
    """Return our layer and peft's, with the same weights, in float32."""
    torch.manual_seed(seed)
    plain = nn.Linear(48, 32)
    a, b = torch.randn(4, 48) * 0.3, torch.randn(32, 4) * 0.3
    magnitude = plain.weight.detach().norm(dim=1) * (1 + 0.2 * torch.randn(32))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=True)
    theirs = Linear(plain, "default", config, r=4, lora_alpha=6)
    theirs.lora_A["default"].weight.data.copy_(a)
    theirs.lora_B["default"].weight.data.copy_(b)
    theirs.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
    ours = LoraLinear(PlainWeight(plain.weight.detach()), plain.bias.detach())
    ours.attach(LowRank.of_tensors(a, b, 1.5), dropout)
    ours.attach_magnitude(magnitude)
    return ours.train(), theirs.train()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_value_and_gradients_equal_those_of_peft_with_the_same_dropout_mask(dropout):
    ours, theirs = layers(dropout)
    inputs = [torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    upstream = torch.randn(2, 9, 32)
    outputs = []
    for layer, x in zip((ours, theirs), inputs, strict=True):
        torch.manual_seed(5)
        outputs.append(layer(x))
        outputs[-1].backward(upstream)
    pairs = [
        (outputs[0], outputs[1]),
        (inputs[0].grad, inputs[1].grad),
        (ours.lora_a.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_b.grad, theirs.lora_B["default"].weight.grad),
        (ours.magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad),
    ]
    for found, expected in pairs:
        assert float((found - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())


def test_norms_are_those_of_weight_plus_adapter_and_initialize_the_magnitudes():
    ours, _ = layers()
    weight, a, b = ours.base.weight.double(), ours.lora_a.detach().double(), ours.lora_b.detach().double()
    expected = (weight + 1.5 * b @ a).norm(dim=1)
    found = row_norms(ours.base.weight, a.float(), b.float(), 1.5, squared_rows(ours.base.weight))
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    ours.attach_magnitude()
    assert torch.allclose(ours.magnitude.detach().double(), expected, rtol=1e-6)
    x = torch.randn(3, 48)
    plain = functional.linear(x.double(), weight + 1.5 * b @ a, ours.bias.double())
    assert torch.allclose(ours(x).double(), plain, atol=1e-5)


def test_squares_of_rows_need_no_second_matrix():
    weight = torch.randn(3000, 40, generator=torch.Generator().manual_seed(3))
    with Alive([weight]) as alive:
        squares = squared_rows(weight)
    exact = weight.double().square().sum(dim=1)
    torch.testing.assert_close(squares.double(), exact, rtol=1e-6, atol=0)
    assert alive.peak < 0.25 * 4 * weight.numel()


def test_the_graph_saves_only_input_output_and_adapter():
    ours, _ = layers()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours(torch.randn(3, 48, requires_grad=True))
    assert sum(saved) <= 3 * (48 + 4 + 32) + 4 * (48 + 32) + 2 * 32
    assert max(saved) < 48 * 32
