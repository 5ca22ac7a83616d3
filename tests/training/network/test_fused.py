"""Fused norms and gates compute the same as the modules that they replace, and save less."""

import pytest
import torch
from adapted import load_adapted, logits_and_gradients, plain_in
from torch import nn
from torch.nn import functional

from adaptkit.training.network.fused import fuse_layers

REPLACED = {"llama": (5, 2), "qwen3": (9, 2), "gemma": (5, 0), "phi": (0, 0), "mixtral": (5, 0)}
"""Numbers of replaced norms and gates: qwen3 also norms queries and keys, gemma's gate is not SiLU, phi has neither,
and mixtral has expert stacks."""


def loaded(made, family, dtype=torch.float32):
    model, generator = load_adapted(plain_in(made, family), dtype), torch.Generator().manual_seed(1)
    for name, parameter in model.network.named_parameters():
        if "norm" in name:
            parameter.data.normal_(mean=1.0, std=0.3, generator=generator)
    return model


def fused(network):
    """Return how many norms and how many gates have a forward pass other than their class's."""
    changed = [type(m).__name__ for m in network.modules() if "forward" in vars(m)]
    return sum("Norm" in name for name in changed), sum("MLP" in name for name in changed)


@pytest.mark.parametrize("family", REPLACED)
def test_fusing_does_not_change_results_or_gradients(family, made):
    model = loaded(made, family)
    before = logits_and_gradients(model.network)
    fuse_layers(model.network)
    assert fused(model.network) == REPLACED[family]
    for one, two in zip(logits_and_gradients(model.network), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_gradients_in_bfloat16_are_as_accurate_as_before(made):
    exact = logits_and_gradients(loaded(made, "llama").network)
    model = loaded(made, "llama", torch.bfloat16)

    def error(found):
        pairs = zip(found[1:], exact[1:], strict=True)
        return sum(float((one.float() - two).norm() ** 2) for one, two in pairs) ** 0.5

    before = error(logits_and_gradients(model.network))
    fuse_layers(model.network)
    assert fused(model.network) == REPLACED["llama"]
    assert error(logits_and_gradients(model.network)) < 1.1 * before


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen3", 9), ("gemma", 0), ("phi", 0)])
def test_torchs_rms_norm_computes_the_same(family, norms, made):
    """It is used on GPUs; torch also has a slower one for CPUs."""
    model = loaded(made, family)
    before = logits_and_gradients(model.network)
    fuse_layers(model.network, on_gpu=True)
    assert fused(model.network) == (norms, 0)
    for one, two in zip(logits_and_gradients(model.network), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_a_norm_that_is_trained_is_left_alone(made):
    model = loaded(made, "llama")
    model.network.model.norm.weight.requires_grad_()
    fuse_layers(model.network)
    assert fused(model.network) == (4, 2)
    assert logits_and_gradients(model.network)[-1].abs().max() > 0


class Other(nn.Module):
    """Has a norm's attributes, but a different formula."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        return functional.normalize(x, dim=-1) * self.weight


def test_a_module_that_only_looks_like_a_norm_is_left_alone():
    network = nn.Sequential(Other())
    fuse_layers(network)
    assert "forward" not in vars(network[0])


def test_less_is_saved_for_the_backward_pass(made):
    def kept(network):
        known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(input_ids=torch.arange(64)[None], use_cache=False)
        return sum(size for place, (size, _) in storages.items() if place not in known)

    model = loaded(made, "llama", torch.bfloat16)
    before = kept(model.network)
    fuse_layers(model.network)
    assert kept(model.network) < 0.65 * before


class Gated(nn.Module):
    """A norm times the gate that its forward pass also takes, as in Qwen3.5's linear attention."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x, gate=None):
        return functional.rms_norm(x, (8,), self.weight, self.variance_epsilon) * functional.silu(gate)


def test_a_norm_with_a_gate_is_left_alone():
    network = nn.Sequential(Gated())
    fuse_layers(network)
    assert "forward" not in vars(network[0])


class ManyHeads(nn.Module):
    """A norm whose input has a dimension for heads, as in xLSTM."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        batch, length, heads, size = x.shape
        return functional.rms_norm(x, (size,)).reshape(batch, length, heads * size) * self.weight


def test_a_norm_that_changes_the_shape_is_left_alone():
    network = nn.Sequential(ManyHeads())
    fuse_layers(network)
    assert "forward" not in vars(network[0])


def test_the_output_of_a_norm_may_be_modified_in_place(made):
    model = loaded(made, "llama")
    fuse_layers(model.network)
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
    fuse_layers(model.network)
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
    fuse_layers(network)
    assert ("forward" in vars(network[0])) == is_known
    assert network[0].up_proj is layer.up_proj


def test_recognizing_a_gate_decodes_no_weight(made):
    """For a large model, decoding in float32 would take longer than a training step."""
    layer = next(m for m in loaded(made, "llama").network.modules() if type(m).__name__ == "LlamaMLP")
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(layer, name).multiply = None
    fuse_layers(layer)
    assert "forward" in vars(layer)
