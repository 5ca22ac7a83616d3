"""The layer agrees with the plain formula, and keeps no 16-bit weight."""

import pytest
import torch
from packing import decode, encode
from torch.nn import functional

from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.network.frozen import PackedWeight, PlainWeight
from adaptkit.training.network.linear import LoraLinear


def nf4_layer(double_quant=True, out_features=96, in_features=128, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(torch.bfloat16)
    spec = TensorSpec("x.weight", "BF16", tuple(weight.shape))
    parts = encode(spec, weight, Encoding("nf4", 64, double_quant))
    packed = decode("x.weight", {name.removeprefix("x.weight"): part for name, part in parts.items()})
    layer = LoraLinear(PackedWeight(packed), torch.randn(out_features, generator=generator))
    a = torch.randn(rank, in_features, generator=generator)
    b = torch.randn(out_features, rank, generator=generator)
    layer.attach(LowRank.of_tensors(a, b, 0.5))
    return layer, packed.dequantize(torch.float32)


@pytest.mark.parametrize("double_quant", [True, False])
def test_value_and_gradients_are_those_of_the_dequantized_weight(double_quant):
    layer, weight = nf4_layer(double_quant)
    x = torch.randn(2, 5, 128, requires_grad=True)
    grad = torch.randn(2, 5, 96)
    y = layer(x)
    y.backward(grad)

    reference = x.detach().double().requires_grad_()
    a = layer.lora_a.detach().double().requires_grad_()
    b = layer.lora_b.detach().double().requires_grad_()
    expected = functional.linear(reference, weight.double(), layer.bias.double()) + 0.5 * (reference @ a.T) @ b.T
    expected.backward(grad.double())
    for found, wanted in (
        (y, expected),
        (x.grad, reference.grad),
        (layer.lora_a.grad, a.grad),
        (layer.lora_b.grad, b.grad),
    ):
        error = ((found.double() - wanted).norm() / wanted.norm()).detach()
        assert float(error) < 2e-6


def test_gradients_agree_with_finite_differences():
    layer, weight = nf4_layer(out_features=8, in_features=64, rank=2)
    plain = LoraLinear(PlainWeight(weight.double()), None)
    plain.attach(LowRank.of_tensors(layer.lora_a.detach(), layer.lora_b.detach(), 0.5))
    plain.double()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: _apply(plain, x, a, b), (x, plain.lora_a, plain.lora_b))


def _apply(layer, x, a, b):
    return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))


def test_the_graph_holds_no_copy_of_the_weight():
    """What autograd saves for the backward pass is as large as inputs and adapter, far smaller than W."""
    layer, _ = nf4_layer(out_features=512, in_features=512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(4, 512, requires_grad=True))
    assert sum(saved) < 4 * 512 + 4 * 4 + 2 * 4 * 512 + 1
    assert sum(saved) < 512 * 512 / 16


def test_dropout_affects_only_the_adapter():
    layer, _ = nf4_layer()
    layer.dropout = 0.5
    x = torch.randn(64, 128)
    with torch.no_grad():
        layer.lora_b.zero_()
        assert torch.equal(layer.train()(x), layer.eval()(x))
        layer.lora_b.normal_()
        torch.manual_seed(0)
        one = layer.train()(x)
        torch.manual_seed(1)
        assert not torch.equal(one, layer(x))
        torch.manual_seed(0)
        assert torch.equal(one, layer(x))


def test_gradients_with_dropout_equal_the_formula_with_the_same_mask():
    layer, weight = nf4_layer()
    layer.dropout = 0.3
    layer.train()
    x = torch.randn(6, 128, requires_grad=True)
    torch.manual_seed(4)
    layer(x).sum().backward()
    torch.manual_seed(4)
    reference = x.detach().clone().requires_grad_()
    dropped = functional.dropout(reference, 0.3)
    y = reference @ weight.T + 0.5 * (dropped @ layer.lora_a.detach().T) @ layer.lora_b.detach().T
    y.sum().backward()
    assert torch.allclose(x.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_wrong_shape_is_refused():
    layer, _ = nf4_layer()
    with pytest.raises(BaseMismatchError, match=r"expected shape .*, as in the base, found "):
        layer.attach(LowRank.of_tensors(torch.zeros(4, 64), torch.zeros(96, 4), 1.0))


def test_an_empty_input_gives_an_empty_output():
    """A router may send no tokens to an expert."""
    layer, _ = nf4_layer()
    x = torch.randn(0, 128, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, 96), (0, 128))


def test_the_weight_attribute_is_the_matrix_that_the_layer_multiplies_by():
    layer, weight = nf4_layer()
    torch.testing.assert_close(layer.weight, weight + 0.5 * layer.lora_b @ layer.lora_a)
    x, grad = torch.randn(5, 128), torch.randn(5, 96)
    found = []
    for y in (layer(x), functional.linear(x, layer.weight, layer.bias)):
        found.append(torch.autograd.grad(y, (layer.lora_a, layer.lora_b), grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_reading_the_weight_attribute_is_refused_with_dora():
    layer, _ = nf4_layer()
    layer._path = "model.layers.0.mixer.dt_proj"
    layer.attach_magnitude()
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mixer\.dt_proj.*DoRA") as caught:
        _ = layer.weight
    assert caught.value.hint == "use --exclude dt_proj"


@pytest.mark.parametrize("uses_dora", [False, True])
@pytest.mark.parametrize("shape", [(7, 128), (2, 5, 128)])
def test_a_network_may_change_the_result_in_place(shape, uses_dora):
    """Llama 4 does so with its experts' inputs."""
    layer, _ = nf4_layer()
    if uses_dora:
        layer.attach_magnitude()
    layer.bias = None
    x = torch.randn(shape)
    found = []
    for change in (lambda y: y.mul_(3.0), lambda y: y * 3.0):
        found.append(torch.autograd.grad(change(layer(x)).square().sum(), (layer.lora_a, layer.lora_b)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
