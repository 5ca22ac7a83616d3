"""An accelerated network computes what the plain one does, whatever is left out."""

import pytest
import torch
from adapted import IDS, load_adapted, logits_and_gradients, packed_in

from adaptkit.data.batches import Batch
from adaptkit.models import tables as large_tables
from adaptkit.training import fast
from adaptkit.training.fast import PARTS, accelerate, tables
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.loss import cross_entropy, summed_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")
"""All that is prepared for a GPU, except for kernels, also runs on a CPU."""
FAMILIES = ("llama", "qwen3", "gemma", "mixtral", "phi")


def accelerated(model, device=CPU, **options):
    accelerate(model.network, model.dtype, device, model.output_layer, **options)
    return model


def near(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("family", "device"), list(zip(FAMILIES, (CPU, GPU, CPU, GPU, CPU), strict=True)), ids=str)
def test_logits_and_gradients_are_those_of_the_plain_network(family, dropout, device, made):
    folder = packed_in(made, family)
    expected = logits_and_gradients(load_adapted(folder, dropout=dropout).network)
    near(logits_and_gradients(accelerated(load_adapted(folder, dropout=dropout), device).network), expected)


def trained_step(model, policy):
    """Return the loss of two samples of unequal length, and what it adds to gradients that are there."""
    ids = IDS.clone()
    labels = ids.clone()
    labels[0, :5] = labels[1, 11:] = -100
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    checkpoint_layers(model.network.train(), choose_checkpointing(model.network, policy, None))
    loss = summed_loss(model, Batch(ids, labels, (labels != -100).long()), 1 / 3) / 3
    loss.backward()
    return [loss.detach(), *(parameter.grad - 1 for parameter in trained)]


@pytest.mark.parametrize(
    ("family", "part", "device"),
    [
        *((family, None, device) for family in FAMILIES for device in (CPU, GPU)),
        *zip((*FAMILIES, "llama"), PARTS, (CPU, GPU) * 3, strict=True),
    ],
    ids=str,
)
def test_a_step_with_checkpointed_layers_is_the_plain_one_whatever_is_left_out(family, part, device, made):
    folder, without = packed_in(made, family), frozenset({part} - {None})
    without |= {"entropy"} if device == GPU else set()  # a kernel: see test_gpu_entropy
    expected = trained_step(load_adapted(folder), "none")
    near(trained_step(accelerated(load_adapted(folder), device, without=without), "layer"), expected)


def test_with_everything_left_out_a_network_keeps_its_bits(made):
    folder = packed_in(made, "llama")
    expected = logits_and_gradients(load_adapted(folder).network)
    found = logits_and_gradients(accelerated(load_adapted(folder), GPU, without=frozenset(PARTS)).network)
    assert all(map(torch.equal, found, expected))


def active(model):
    """Return the parts that a llama whose only adapter is on its queries has; its last products have none."""
    layer = model.network.model.layers[0]
    signs = {
        "attention": model.network.config._attn_implementation != "sdpa",
        "tables": "weight" not in model.network.get_input_embeddings()._parameters,
        "last_products": "multiply" in vars(layer.mlp.down_proj),
        "norms_and_gates": "forward" in vars(layer.input_layernorm) and "forward" in vars(layer.mlp),
        "products": "multiply" in vars(layer.self_attn.q_proj),
        "entropy": model.output_layer.cross_entropy is not cross_entropy,
    }
    assert isinstance(layer.mlp.down_proj, LoraLinear)
    assert set(signs) == set(PARTS)
    return {part for part, is_there in signs.items() if is_there}


@pytest.fixture
def on_a_gpu(made, monkeypatch):
    """Return a function that loads a model for a pretended GPU with Triton, with a table large enough to be moved."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for module in (fast, tables):
        monkeypatch.setattr(module, "has_triton", lambda device_type: True)
    monkeypatch.setattr(large_tables, "LEAST_BYTES", 1)
    monkeypatch.setattr(tables, "pinned", lambda make, table, device: make(table, device=device))
    folder = packed_in(made, "llama")
    return lambda: load_adapted(folder, targets=("*q_proj",))


@pytest.mark.parametrize("part", PARTS)
def test_exactly_what_is_named_is_left_out(part, on_a_gpu):
    left = {part, "last_products"} if part == "products" else {part}  # products are what recomputation leaves out
    assert active(accelerated(on_a_gpu(), GPU, without=frozenset({part}))) == set(PARTS) - left


def test_all_is_used_unless_the_base_is_sharded(on_a_gpu):
    assert active(accelerated(on_a_gpu(), GPU)) == set(PARTS)
    assert active(accelerated(on_a_gpu(), GPU, is_sharded=True)) == set(PARTS) - {"tables"}


@pytest.mark.parametrize(
    "options",
    [{"device": CPU}, {"device": GPU, "trains": False, "without": frozenset({"entropy"})}],  # used if there is Triton
    ids=["cpu", "evaluation"],
)
def test_a_cpu_and_an_evaluation_use_fewer_parts(options, made):
    model = accelerated(load_adapted(packed_in(made, "llama"), targets=("*q_proj",)), **options)
    expected = {"attention", "products", *(() if "trains" in options else ("last_products", "norms_and_gates"))}
    assert active(model) == expected
