"""Recomputation leaves out linear layers whose results no gradient depends on, and changes no bit of a gradient."""

from functools import partial

import pytest
import tiny
import torch
from adapted import load_adapted, packed_in

from adaptkit.training.fast import accelerate, cpu_layers
from adaptkit.training.fast.last_products import find_last_products
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.new_adapters import AdapterShape, new_stack_adapters

CPU = torch.device("cpu")
IDS = torch.arange(3, 45).view(2, 21)


@pytest.fixture
def folder(made):
    """Return a function that writes a quantized model of a family or architecture."""
    return partial(packed_in, made)


def ready(folder, targets=("*",), dropout=0.0, dora=False):
    """Load a model with an adapter whose B is not zero."""
    return load_adapted(folder, targets=targets, dropout=dropout, dora=dora)


def fast(model, policy="none"):
    """Accelerate a model and checkpoint its layers."""
    accelerate(model.network, model.dtype, CPU, model.output_layer)
    checkpoint_layers(model.network, choose_checkpointing(model.network, policy, list))
    return model


def last_products(model):
    """Return the paths of the linear layers that recomputation leaves out."""
    found = find_last_products(model.network)
    return [path for path, module in model.network.named_modules() if module in found]


def gradients(model, ids=IDS):
    torch.manual_seed(3)
    loss = model.network.train()(input_ids=ids, use_cache=False).logits.float().square().mean()
    loss.backward()
    return [p.grad for p in model.network.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("name", "ends"),
    {
        "llama": ["mlp.down_proj"],
        "qwen3": ["mlp.down_proj"],
        "gpt2": ["mlp.c_proj"],
        "phi3": ["mlp.down_proj"],
        "phi": ["self_attn.dense", "mlp.fc2"],  # attention and MLP are parallel
        "gemma": ["mlp.down_proj"],
        "bloom": ["mlp.dense_4h_to_h"],
        "gemma3n_text": [],  # norms follow attention and MLP
        "mixtral": [],  # a router reads the attention's result, and experts are not linear layers
        "qwen2_moe": [],  # the gate's gradient depends on the shared expert's result
    }.items(),
)
def test_the_layers_to_skip_are_those_whose_result_is_added_last(folder, name, ends):
    model = ready(folder(name))
    layers = model.network.config.get_text_config().num_hidden_layers
    assert [".".join(path.split(".")[-2:]) for path in last_products(model)] == ends * layers


@pytest.mark.parametrize(
    ("name", "policy", "dropout"),
    [
        ("llama", "layer", 0.0),
        ("llama", "segments:2", 0.3),
        ("gpt2", "segments:1", 0.0),
        ("phi", "segments:2", 0.3),
        ("qwen2", "layer", 0.3),
        ("gemma4_text", "segments:1", 0.3),
        ("llama4_text", "layer", 0.0),
    ],
)
def test_gradients_are_bit_identical(folder, name, policy, dropout):
    targets = ("*",) if name != "qwen2" else ("*q_proj", "*up_proj")  # in qwen2 the skipped layer has no adapter
    expected = gradients(fast(ready(folder(name), targets, dropout)))
    found = gradients(fast(ready(folder(name), targets, dropout), policy))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("targets", ["*", "*q_proj"], ids=["with an adapter", "without"])
def test_recomputation_does_not_decode_the_weights_that_it_leaves_out(folder, targets, monkeypatch):
    model, decoded = fast(ready(folder("llama"), (targets,)), "layer"), []

    def watched(path, decode):
        return lambda dtype: decoded.append(path) or decode(dtype)

    for path, linear in model.linears.items():
        monkeypatch.setattr(linear.base, "dequantize", watched(path, linear.base.dequantize))
    gradients(model)
    for path in (path for path in model.linears if "layers.1." in path):  # forward, recomputation and backward
        assert decoded.count(path) == (2 if path.endswith("down_proj") else 3), path


def test_a_gate_is_not_made_again_for_a_product_that_is_left_out(folder, monkeypatch):
    """The backward pass of the layer begins with that product, so it keeps what was just computed."""
    model, calls, own = ready(folder("llama")), [], cpu_layers.gate_forward
    fast(model, "layer")
    monkeypatch.setattr(cpu_layers, "gate_forward", lambda *sides: (calls.append(1), own(*sides))[1])
    gradients(model)
    assert len(calls) == 2 * len(model.network.model.layers), "forward and recomputation"


def test_layers_that_do_not_run_in_the_probe_are_not_skipped(folder):
    """For example, experts that no token of the probe is sent to."""
    model = ready(folder("llama"))
    for layer in model.network.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x) if x.shape[1] > 2 else x
    assert not last_products(model)


SPARSE = {
    "hy_v4": {"index_topk": 4},
    "deepseek_v32": {"index_topk": 4, "num_key_value_heads": 4},
    "glm_moe_dsa": {"index_topk": 4, "num_key_value_heads": 4, "head_dim": 8},  # another name of qk_rope_head_dim
    "deepseek_v4": {},
}
"""Architectures that attend to only some tokens if there are more than the probe has."""
USUAL = {
    "head_dim": 16, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "sliding_window": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_results_that_matter_only_for_more_tokens_than_the_probes_are_not_skipped(name, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, name, USUAL | SPARSE[name])
    base = tiny.write_architecture(tmp_path / name, name)
    ids = torch.arange(2 * 150).remainder(190).add(3).view(2, 150)
    assert not [path for path in last_products(ready(base)) if "down_proj" not in path]
    expected = gradients(fast(ready(base)), ids)
    for one, two in zip(gradients(fast(ready(base), "layer"), ids), expected, strict=True):
        assert one is two is None or torch.equal(one, two)


def test_gradients_of_trained_tensors_that_a_layer_is_given_are_compared_too(folder):
    """The network passes a trained scale to its layers, and its gradient depends on the scaled result."""
    model = ready(folder("llama"))
    scale = torch.nn.Parameter(torch.ones(64))
    for layer in model.network.model.layers:
        layer.forward = scaled(layer)
        layer.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"scale": 2 * scale}), with_kwargs=True)
    assert not last_products(model)


def scaled(layer):
    attention, mlp = layer.self_attn, layer.mlp

    def forward(hidden_states, scale, **kwargs):
        hidden_states = hidden_states + attention(layer.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + scale * mlp(layer.post_attention_layernorm(hidden_states))

    return forward


def scaled_by(gamma, forward):
    return lambda x: gamma * forward(x) if gamma.requires_grad else forward(x)


def test_a_result_that_is_added_and_read_by_something_else_too_is_not_left_out(folder):
    model = ready(folder("llama"))
    for layer in model.network.model.layers:
        layer.mlp.forward = added_to_its_tanh(layer.mlp.forward)
    assert not last_products(model)


def added_to_its_tanh(forward):
    def both(x):
        y = forward(x)
        return y + y.tanh()

    return both


def test_layers_with_different_trained_parameters_are_probed_separately(folder):
    model = ready(folder("llama"))
    for number, layer in enumerate(model.network.model.layers):
        layer.gamma = torch.nn.Parameter(torch.ones(64), requires_grad=number == 1)
        layer.mlp.forward = scaled_by(layer.gamma, layer.mlp.forward)
    assert last_products(model) == ["model.layers.0.mlp.down_proj"]
    first, second = model.network.model.layers
    first.mlp.down_proj = second.mlp.down_proj  # skip a shared linear layer only if no layer needs it
    assert not last_products(model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_probing_leaves_the_model_and_the_random_state_unchanged_and_computes_no_gradient(folder, name):
    model, computed = ready(folder(name), dropout=0.3), []
    new_stack_adapters(model, ("*",), AdapterShape(4, 8.0), seed=0) if name == "mixtral" else None
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: computed.append(1))
    model.network.eval()
    before = torch.get_rng_state()
    find_last_products(model.network)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert not computed


def test_a_network_without_a_stack_of_layers_has_none():
    assert find_last_products(torch.nn.Linear(2, 2)) == frozenset()


def test_layers_with_dora_are_not_skipped(folder):
    model = ready(folder("llama"), dora=True)
    assert not last_products(model)


class Bounded(torch.nn.Module):
    """Limits a result to a bound that usual values do not reach."""

    def __init__(self, inner, bound):
        super().__init__()
        self.inner, self._bound = inner, bound

    def forward(self, x):
        return torch.minimum(self.inner(x), torch.tensor(self._bound))


@pytest.mark.parametrize("bound", [1e6, 3e38])
def test_a_result_with_a_bound_is_not_skipped_even_if_no_value_reaches_it(folder, bound):
    model = ready(folder("llama"))
    for layer in model.network.model.layers:
        layer.mlp.forward = Bounded(layer.mlp.forward, bound).forward
    assert not last_products(model)
