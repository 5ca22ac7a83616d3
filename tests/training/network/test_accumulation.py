"""Gradients that layers accumulate themselves are those that autograd would accumulate."""

import pytest
import torch
from adapted import load_adapted, packed_in

from adaptkit.numerics.lora import LowRank
from adaptkit.training.network import joined
from adaptkit.training.network.accumulation import accumulate, accumulating
from adaptkit.training.network.frozen import PlainWeight
from adaptkit.training.network.joined import join_layers
from adaptkit.training.network.linear import LoraLinear


def loaded(made):
    model = load_adapted(packed_in(made, "llama"))
    join_layers(model.network)
    return model


def losses(model):
    for seed in (5, 6):
        ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(seed))
        yield model.network.train()(input_ids=ids, use_cache=False).logits.square().mean()


def test_accumulated_gradients_equal_those_of_autograd(made, monkeypatch):
    model = loaded(made)
    trained = [p for p in model.network.parameters() if p.requires_grad]
    expected = [torch.autograd.grad(loss, trained) for loss in losses(model)]
    kept = [torch.zeros_like(p) for p in trained]
    for parameter, grad in zip(trained, kept, strict=True):
        parameter.grad = grad
    given = []
    monkeypatch.setattr(joined, "accumulate", lambda *args: given.append(accumulate(*args)))
    for loss in losses(model):
        with accumulating():
            torch.autograd.backward(loss)
    assert given == [None] * 2 * len(trained), "autograd has nothing to add"
    for parameter, grad, first, second in zip(trained, kept, *expected, strict=True):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, first + second, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))
        assert grad.abs().max() > 0


def test_gradients_go_to_autograd_where_none_are_accumulated(made):
    """Outside of ``accumulating``, and for parameters without ``grad``, layers return their gradients."""
    model = loaded(made)
    trained = [p for p in model.network.parameters() if p.requires_grad]
    loss, again = losses(model)
    with accumulating():
        found = torch.autograd.grad(loss, trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with accumulating():
        pass
    asked = torch.autograd.grad(again, trained)
    assert all(grad.abs().max() > 0 for grad in (*found, *asked))
    assert not any(parameter.grad.any() for parameter in trained)


def test_an_error_ends_accumulation():
    parameter = torch.nn.Parameter(torch.ones(3, 1))
    parameter.grad = torch.zeros(3, 1)
    try:
        with accumulating():
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(accumulate(parameter, torch.ones(3, 1), 2.0), torch.full((3, 1), 2.0))
    assert not parameter.grad.any()


def test_a_bfloat16_gradient_is_cast_to_float32_before_it_is_scaled():
    """Neither the factor 1.01 nor the product may be rounded to bfloat16."""
    parameter = torch.nn.Parameter(torch.zeros(3, 1))
    grad = torch.tensor([[1.0], [1.0078125], [-3.0]], dtype=torch.bfloat16)
    expected = grad.float() * 1.01
    torch.testing.assert_close(accumulate(parameter, grad, 1.01), expected, rtol=1e-7, atol=0)
    parameter.grad = torch.zeros(3, 1)
    with accumulating():
        assert accumulate(parameter, grad, 1.01) is None
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_layer_that_is_not_joined_accumulates_too(dropped):
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(PlainWeight(torch.randn(6, 8, generator=generator)), None)
    layer.attach(
        LowRank.of_tensors(torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator), 0.7)
    )
    x = torch.randn(5, 8, generator=generator, requires_grad=True)

    def loss():
        return layer.multiply(x, x * 2.0 if dropped else x).square().sum()

    expected = torch.autograd.grad(loss(), [x, layer.lora_a, layer.lora_b])
    for parameter in (layer.lora_a, layer.lora_b):
        parameter.grad = torch.ones_like(parameter)
    with accumulating():
        torch.autograd.backward(loss())
    torch.testing.assert_close(x.grad, expected[0])
    for parameter, grad in zip((layer.lora_a, layer.lora_b), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, grad + 1)
