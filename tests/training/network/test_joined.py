"""Joined layers give the results of separate ones, and round each sum only once."""

import gc
import weakref
from types import MethodType

import pytest
import torch
from adapted import load_adapted, logits_and_gradients, packed_in
from packing import decode, encode
from torch import nn
from torch.nn import functional

from adaptkit.data.batches import Batch
from adaptkit.formats._format import Encoding
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.config import TrainConfig
from adaptkit.training.distributed import World
from adaptkit.training.gradients import Gradients
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.frozen import PackedWeight, PlainWeight
from adaptkit.training.network.joined import _can_join, _widened, join_layers
from adaptkit.training.network.joined_gpu import join_on_gpu
from adaptkit.training.network.linear import LoraLinear

LLAMA = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
GROUPS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "phi": [{"q_proj", "k_proj", "v_proj"}, {"dense"}, {"fc1"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
}
"""Layers of a block that read the same input; qwen2's and phi's have biases, gpt2's are Conv1D."""


@pytest.fixture(params=[join_layers, join_on_gpu], ids=["cpu", "gpu"])
def join(request):
    """Both implementations; the one for a GPU also runs on a CPU."""
    return request.param


RANKS = {"llama": {"q_proj": 3, "up_proj": 6}, "qwen2": {"k_proj": 30}, "phi": {"v_proj": 1}, "gpt2": {"c_fc": 3}}


def loaded(made, family, dtype=torch.float32, dropout=0.0):
    model = load_adapted(packed_in(made, family), dtype, dropout=dropout, rank_pattern=RANKS[family])
    generator = torch.Generator().manual_seed(1)
    for layer in model.adapted().values():
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", GROUPS)
def test_joining_does_not_change_results_or_gradients(join, family, dropout, made):
    model = loaded(made, family, dropout=dropout)
    before = logits_and_gradients(model.network)
    join(model.network)
    for one, two in zip(logits_and_gradients(model.network), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_a_failed_pass_leaves_no_tensors_in_memory(join, made):
    """Otherwise their memory would be missing when a batch is retried after running out of memory."""
    model = loaded(made, "llama")
    join(model.network)
    config = TrainConfig(base="base", data=("rows",))
    trainable, kept = Trainable.of(model), []
    gradients = Gradients(model, trainable.gradients, config, World(torch.device("cpu")))
    layers = model.network.model.layers
    layers[0].register_forward_hook(lambda layer, given, output: kept.append(weakref.ref(output)))

    def short(x):
        raise torch.OutOfMemoryError("between gate and up")

    layers[-1].mlp.forward = MethodType(lambda mlp, x: short(mlp.gate_proj(x)) * mlp.up_proj(x), layers[-1].mlp)
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids, ids, torch.ones_like(ids))
    with pytest.raises(torch.OutOfMemoryError):
        gradients.collect([batch], 32, 0)
    gc.collect()
    assert [reference() for reference in kept] == [None]


@pytest.mark.parametrize("family", GROUPS)
def test_layers_that_read_the_same_input_are_one_product(family, made, monkeypatch):
    from adaptkit.training.network import joined

    model = loaded(made, family)
    join_layers(model.network)
    names = {layer: name.rpartition(".")[2] for name, layer in model.adapted().items()}
    seen, multiplied = [], joined.multiplied
    monkeypatch.setattr(joined, "multiplied", lambda group, *xs: (seen.append(group), multiplied(group, *xs))[1])
    logits_and_gradients(model.network)
    assert [{names[layer] for layer in group} for group in seen] == GROUPS[family] * 2


def effects(layers, xs, forward=lambda layer, x: layer(x)):
    """Return the average share of the adapters' changes that reaches their layers' output: ⟨effect, Δ⟩ / ⟨Δ, Δ⟩."""
    found = []
    for layer, x in zip(layers, xs, strict=True):
        with torch.no_grad():
            after = forward(layer, x.clone()).double()
            b, layer.lora_b.data = layer.lora_b.data, torch.zeros_like(layer.lora_b)
            before = forward(layer, x.clone()).double()
            layer.lora_b.data = b
        a, b = layer.lora_a.detach().to(x.dtype).double(), b.to(x.dtype).double()
        delta = layer.scaling * (x.double() @ a.T) @ b.T
        found.append(float(((after - before) * delta).sum() / delta.square().sum()))
    return sum(found) / len(found)


def as_peft(layer, x):
    """Add the adapter's share to the rounded product."""
    product = x @ layer.base.dequantize(x.dtype).T
    return product + layer.scaling * (x @ layer.lora_a.to(x.dtype).T) @ layer.lora_b.to(x.dtype).T


@pytest.mark.parametrize("join", [None, join_layers, join_on_gpu], ids=["alone", "joined", "joined for a GPU"])
def test_a_small_change_is_not_lost_to_rounding(join, made):
    """PEFT adds it to the rounded product, where a large part is lost."""
    model = loaded(made, "llama", torch.bfloat16)
    layers = list(model.adapted().values())
    for layer in layers:
        layer.lora_b.data.mul_(0.0003)
    inputs = {64: torch.randn(2000, 64).bfloat16(), 128: torch.randn(2000, 128).bfloat16()}
    xs = [inputs[layer.base.shape[1]] for layer in layers]
    assert effects(layers, xs, as_peft) < 0.7
    if join is not None:
        join(model.network)
    assert 0.9 < effects(layers, xs) < 1.1


def layer_of(format_name, shape=(24, 128), block_size=32, double_quant=True, rank=5):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator)
    base = PlainWeight(weight.T.contiguous().T)
    if format_name != "plain":
        spec = TensorSpec("x.weight", "F32", shape)
        parts = encode(spec, weight, Encoding(format_name, block_size, double_quant))
        base = PackedWeight(decode("x.weight", {n.removeprefix("x.weight"): p for n, p in parts.items()}))
    layer = LoraLinear(base, None)
    a, b = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    layer.attach(LowRank.of_tensors(a, b, 0.7))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format_name", "shape", "block_size", "double_quant"),
    [("nf4", (24, 128), 32, True), ("nf4", (24, 128), 128, False), ("fp4", (400, 64), 64, True)],
)
def test_widening_puts_the_scaled_b_beside_the_decoded_weight(format_name, shape, block_size, double_quant, dtype):
    layer = layer_of(format_name, shape, block_size, double_quant)
    assert _can_join(layer)
    width = shape[1]
    found = _widened(layer.base, layer.scaling, layer.lora_b, width + 3, width + 32, dtype)
    expected = torch.zeros(shape[0], width + 32, dtype=dtype)
    expected[:, :width] = layer.base.dequantize(dtype)
    expected[:, width + 3 : width + 8] = (layer.lora_b.detach() * torch.tensor(0.7)).to(dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("format_name", "width"), [("nf4", 96), ("int8", 128), ("plain", 128)])
def test_weights_that_are_not_decoded_by_rows_are_not_joined(format_name, width):
    """4-bit weights with blocks that span two rows, 8-bit weights, and unquantized ones."""
    assert not _can_join(layer_of(format_name, (24, width), 64))


class Twins(nn.Module):
    """Two layers that may or may not get the same input."""

    def __init__(self, use):
        super().__init__()
        self.one, self.two = (layer_of("nf4", (24, 64), 64) for _ in range(2))
        self.table, self.use = nn.Embedding(9, 64), use
        self.two.lora_b.data.mul_(3)

    def forward(self, input_ids, use_cache=False):
        return self.use(self, self.table(input_ids))


USES = {
    "both": (lambda twins, x: (twins.one(x), twins.two(x)), 2),
    "again": (lambda twins, x: (twins.one(x), twins.two(x), twins.one(x), twins.two(x)), 2),
    "twice": (lambda twins, x: (twins.one(x), twins.one(x), twins.two(x)), 2),
    "other": (lambda twins, x: (twins.one(x), twins.two(x + 1)), 1),
    "never": (lambda twins, x: (twins.one(x),), 1),
}


@pytest.mark.parametrize("name", USES)
def test_joined_layers_give_the_same_results_however_they_are_called(join, name):
    use, size = USES[name]
    twins = Twins(use)
    ids = torch.arange(7)[None]

    def found():
        results = twins(ids)
        trained = [*twins.one.parameters(), *twins.two.parameters()]
        total = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)]

    before = found()
    join(twins)
    joined = getattr(twins.one.multiply, "joined", None)
    assert (len(joined.members) if joined else 1) == size
    for one, two in zip(found(), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def test_gradients_are_correct_if_only_one_of_the_joined_layers_is_called(join):
    """A later pass may skip a layer that ran in the probe."""
    twins = Twins(USES["both"][0])
    join(twins)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        twins.one(x)  # results of a pass without gradients must not be used in one with gradients
    y = twins.two(x)
    grads = torch.autograd.grad(y.square().sum(), (x, twins.one.lora_b, twins.two.lora_b))
    assert not grads[1].any()
    weight = twins.two.base.dequantize(torch.float32) + 0.7 * twins.two.lora_b.detach() @ twins.two.lora_a.detach()
    reference = x.detach().requires_grad_()
    expected = torch.autograd.grad(functional.linear(reference, weight).square().sum(), reference)
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-4, atol=1e-5 * float(expected[0].abs().max()))


def test_an_input_that_was_modified_in_place_is_a_new_input(join):
    twins = Twins(USES["both"][0])
    join(twins)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = twins.two(2 * x)
        twins.one(x)
        torch.testing.assert_close(twins.two(x.mul_(2)), expected)


def test_no_results_are_cached_once_all_layers_were_called(join):
    twins = Twins(USES["both"][0])
    join(twins)
    x = torch.randn(3, 64)
    twins.one(x), twins.two(x)
    assert twins.one.multiply.joined._waiting == {}


def test_an_empty_input_gives_empty_or_zero_gradients(join):
    twins = Twins(USES["both"][0])
    join(twins)
    x = torch.randn(0, 64, requires_grad=True)
    (twins.one(x).sum() + twins.two(x).sum()).backward()
    assert x.grad.shape == (0, 64)
    assert not twins.one.lora_a.grad.any()


def test_an_input_without_a_gradient_needs_no_backward_product_with_the_weight(monkeypatch):
    from adaptkit.training.network import joined

    twins = Twins(USES["both"][0])
    x, trained = torch.randn(3, 64), [*twins.one.parameters(), *twins.two.parameters()]

    def found(x):
        return torch.autograd.grad(sum(y.square().sum() for y in (twins.one(x), twins.two(x))), trained)

    before = found(x)
    join_layers(twins)
    decoded, decode = [], joined.widen
    monkeypatch.setattr(joined, "widen", lambda *given: (decoded.append(1), decode(*given)))
    after = found(x)
    assert len(decoded) == 2
    for one, two in zip(after, before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    for one, two in zip(found(x.clone().requires_grad_()), before, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    assert len(decoded) == 6


def test_inputs_and_layers_are_freed_without_the_garbage_collector(join):
    """A reference cycle would keep large tensors alive until the collector runs."""
    gc.collect()
    gc.disable()
    try:
        twins = Twins(USES["both"][0])
        join(twins)
        x = torch.randn(3, 64, requires_grad=True) * 1.0
        left = [weakref.ref(x), weakref.ref(twins.one), weakref.ref(twins.one.base.codes.untyped_storage())]
        twins.one(x)
        twins.two(x + 1)
        twins.two(x + 2)
        del x
        assert left[0]() is None
        del twins
        assert [ref() is None for ref in left] == [True] * 3
    finally:
        gc.enable()


def test_inference_mode_gives_the_logits_of_no_grad(join, made):
    model = loaded(made, "llama")
    join(model.network)
    with torch.inference_mode():
        found = model.network(input_ids=torch.arange(9)[None], use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(found, model.network(input_ids=torch.arange(9)[None], use_cache=False).logits)
