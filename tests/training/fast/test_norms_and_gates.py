"""Norms and gates that are made again compute the same as the modules that they replace, and are not saved."""

import weakref

import pytest
import torch
from adapted import load_adapted, logits_and_gradients, plain_in
from torch import nn
from torch.nn import functional

from adaptkit.training.fast import norms_and_gates, products
from adaptkit.training.fast.norms_and_gates import replace_norms_and_gates, source_of
from adaptkit.training.fast.products import join_products

REPLACED = {"llama": (5, 2), "qwen3": (9, 2), "gemma": (5, 2), "phi": (0, 0), "mixtral": (5, 0)}
"""Numbers of replaced norms and gates: qwen3 norms queries and keys, phi has neither, mixtral has expert stacks."""
ON_GPU = {"llama": (5, 2), "qwen3": (9, 2), "gemma": (0, 0), "phi": (0, 0)}
"""Gemma's norm has an offset, and its gate another activation than the kernel's."""


def loaded(made, family, dtype=torch.float32):
    model, generator = load_adapted(plain_in(made, family), dtype), torch.Generator().manual_seed(1)
    for name, parameter in model.network.named_parameters():
        if "norm" in name:
            parameter.data.normal_(mean=1.0, std=0.3, generator=generator)
    return model


def replaced(network):
    """Return how many norms and how many gates have a forward pass other than their class's."""
    changed = [type(m).__name__ for m in network.modules() if "forward" in vars(m)]
    return sum("Norm" in name for name in changed), sum("MLP" in name for name in changed)


CASES = [(family, on_gpu) for on_gpu, known in ((False, REPLACED), (True, ON_GPU)) for family in known]


@pytest.mark.parametrize(("family", "on_gpu"), CASES)
def test_results_and_gradients_stay_the_same(family, on_gpu, made):
    """For a GPU that is torch's norm, which runs anywhere."""
    model = loaded(made, family)
    before = logits_and_gradients(model.network)
    replace_norms_and_gates(model.network, on_gpu)
    assert replaced(model.network) == (ON_GPU if on_gpu else REPLACED)[family]
    for one, two in zip(logits_and_gradients(model.network), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_gradients_in_bfloat16_are_as_accurate_as_before(made):
    exact = logits_and_gradients(loaded(made, "llama").network)
    model = loaded(made, "llama", torch.bfloat16)

    def error(found):
        pairs = zip(found[1:], exact[1:], strict=True)
        return sum(float((one.float() - two).norm() ** 2) for one, two in pairs) ** 0.5

    before = error(logits_and_gradients(model.network))
    replace_norms_and_gates(model.network, False)
    assert error(logits_and_gradients(model.network)) < 1.1 * before


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_norm_that_is_trained_is_left_alone(on_gpu, made):
    model = loaded(made, "llama")
    model.network.model.norm.weight.requires_grad_()
    replace_norms_and_gates(model.network, on_gpu)
    assert replaced(model.network) == (4, 2)
    assert logits_and_gradients(model.network)[-1].abs().max() > 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_products_keep_no_output_of_a_norm_on_a_cpu_or_of_a_gate(on_gpu, made):
    model, norms, gates = loaded(made, "llama"), [], []
    replace_norms_and_gates(model.network, on_gpu)
    join_products(model.network, frozenset(), torch.float32, on_gpu)
    for name, module in model.network.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda _, args, y: norms.append(weakref.ref(y.untyped_storage())))
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _, args: gates.append(weakref.ref(args[0].untyped_storage())))
    hidden = model.network.model(input_ids=torch.arange(8)[None], use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert [ref() is None for ref in gates] == [True] * 2
    assert [ref() is None for ref in norms] == [not on_gpu] * 4  # torch's kernel gives no way to make it again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_identical_to_those_of_products_that_save_their_inputs(dtype, made, monkeypatch):
    model = loaded(made, "llama", dtype)
    replace_norms_and_gates(model.network, False)
    join_products(model.network, frozenset(), dtype, False)
    found = logits_and_gradients(model.network)
    monkeypatch.setattr(products, "source_of", lambda x: (None, (x,)))
    assert all(map(torch.equal, found, logits_and_gradients(model.network)))


def test_a_tensor_is_saved_itself_if_it_or_its_input_was_modified_or_nothing_says_how_to_make_it():
    def made():
        x = torch.randn(3, requires_grad=True) * 1.0
        return x, norms_and_gates._kept(lambda x: norms_and_gates._Remade.apply(torch.exp, x), torch.exp, x)

    x, y = made()
    make, inputs = source_of(y)
    assert inputs[0] is x
    assert torch.equal(make(*inputs), y)
    for change in (lambda x, y: y.mul_(2), lambda x, y: x.mul_(2)):
        x, y = made()
        change(x, y)
        assert source_of(y) == (None, (y,))
    assert source_of(x) == (None, (x,))
    with torch.no_grad():
        x, y = made()
    assert source_of(y) == (None, (y,))


class Other(nn.Module):
    """Has a norm's attributes, but a different formula."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        return functional.normalize(x, dim=-1) * self.weight


class ManyHeads(Other):
    """A norm whose input has a dimension for heads, as in xLSTM."""

    def forward(self, x):
        batch, length, heads, size = x.shape
        return functional.rms_norm(x, (size,)).reshape(batch, length, heads * size).unflatten(-1, (heads, size))


@pytest.mark.parametrize("kind", [Other, ManyHeads])
def test_a_module_that_only_looks_like_a_norm_keeps_its_formula(kind):
    for on_gpu in (False, True):
        network, x = nn.Sequential(kind()), torch.randn(2, 3, 4, 8, requires_grad=True)
        before = network(x)
        expected = torch.autograd.grad(before.exp().sum(), x)[0]
        replace_norms_and_gates(network, on_gpu)
        after = network(x)
        assert torch.equal(after, before)
        torch.testing.assert_close(torch.autograd.grad(after.exp().sum(), x)[0], expected)


class Gated(nn.Module):
    """A norm times the gate that its forward pass also takes, as in Qwen3.5's linear attention."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x, gate=None):
        return functional.rms_norm(x, (8,), self.weight, self.variance_epsilon) * functional.silu(gate)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_norm_with_a_gate_is_left_alone(on_gpu):
    network = nn.Sequential(Gated())
    replace_norms_and_gates(network, on_gpu)
    assert "forward" not in vars(network[0])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_output_of_a_norm_may_be_modified_in_place(on_gpu, made):
    model = loaded(made, "llama")
    replace_norms_and_gates(model.network, on_gpu)
    norm = model.network.model.norm
    x = torch.randn(2, 3, 64, requires_grad=True)
    found = [torch.autograd.grad(y.square().sum(), x)[0] for y in (norm(x).mul_(2.0), norm(x) * 2.0)]
    assert torch.equal(*found)


def test_a_gated_layer_with_dropout_on_its_output_is_left_alone(made):
    """seed_oss has such a layer. The adapter's dropout does not count."""
    model = loaded(made, "llama")
    first, second = (layer.mlp for layer in model.network.model.layers)
    for layer in model.adapted().values():
        layer.dropout = 0.5
    kind = type(first)

    class Dropping(kind):
        def forward(self, x):
            return functional.dropout(super().forward(x), 0.1, training=self.training)

    first.__class__ = Dropping
    before, modes = torch.get_rng_state(), [m.training for m in model.network.modules()]
    replace_norms_and_gates(model.network, False)
    assert "forward" not in vars(first)
    assert "forward" in vars(second)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.network.modules()] == modes


class OtherGate(nn.Module):
    """A gated layer with a given formula."""

    def __init__(self, layer, formula):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


FORMULAS = {
    "as in Llama": (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)), True),
    "the other side": (lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)), False),
    "one side only": (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.gate_proj(x)), False),
    "clipped": (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x).clamp(max=7)) * m.up_proj(x).clamp(-7, 7)), False),
    "one more": (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) + 1)), False),
    "scaled": (lambda m, x: m.down_proj(m.act_fn(1.702 * m.gate_proj(x)) * m.up_proj(x)), False),
    "of its size": (lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).view(-1, 96) * m.up_proj(x)), False),
}


@pytest.mark.parametrize(("formula", "is_known"), FORMULAS.values(), ids=FORMULAS)
def test_only_gates_with_the_known_formula_are_replaced(formula, is_known, made):
    layer = next(m for m in loaded(made, "llama").network.modules() if type(m).__name__ == "LlamaMLP")
    network = nn.Sequential(OtherGate(layer, formula))
    replace_norms_and_gates(network, False)
    assert ("forward" in vars(network[0])) == is_known
    assert network[0].up_proj is layer.up_proj
