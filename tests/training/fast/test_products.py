"""Products of layers with the same input give the results of the plain layers, and round each sum only once.

``on_gpu`` says what they do for a GPU: all but the kernels also runs on a CPU.
"""

import gc
import weakref
from types import MethodType, SimpleNamespace

import pytest
import torch
from adapted import IDS, load_adapted, logits_and_gradients, packed_in
from packing import decode, encode
from torch import nn
from torch.nn import functional

from adaptkit.data.batches import Batch
from adaptkit.formats._format import Encoding
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.fast import products
from adaptkit.training.fast.products import join_products
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.loss import summed_loss

BFLOAT16 = torch.bfloat16
LLAMA = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
GROUPS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "phi": [{"q_proj", "k_proj", "v_proj"}, {"dense"}, {"fc1"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
}
"""Layers of a block that read the same input; qwen2's and phi's have biases, gpt2's are Conv1D."""
RANKS = {"llama": {"q_proj": 3, "up_proj": 6}, "qwen2": {"k_proj": 30}, "phi": {"v_proj": 1}, "gpt2": {"c_fc": 3}}


@pytest.fixture
def join(monkeypatch):
    """Return a function that joins the products of a network, and returns their groups."""

    def joined(network, on_gpu, dtype=torch.float32):
        found = []

        class Kept(products._Group):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                found.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(products, "_Group", Kept)
            join_products(network, frozenset(), dtype, on_gpu)
        return found

    return joined


def loaded(made, family, dtype=torch.float32, dropout=0.0):
    model = load_adapted(packed_in(made, family), dtype, dropout=dropout, rank_pattern=RANKS[family])
    generator = torch.Generator().manual_seed(1)
    for layer in model.adapted().values():
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    return model


def near(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", GROUPS)
def test_results_and_gradients_are_those_of_the_plain_layers(join, family, dropout, made):
    model = loaded(made, family, dropout=dropout)
    before = logits_and_gradients(model.network)
    join(model.network, False)
    near(logits_and_gradients(model.network), before)


@pytest.mark.parametrize("family", GROUPS)
def test_layers_that_read_the_same_input_are_one_product(join, family, made, monkeypatch):
    model, seen, product = loaded(made, family), [], products._Product
    join(model.network, False)
    names = {id(layer.lora_a): name.rpartition(".")[2] for name, layer in model.adapted().items()}

    def apply(x, dropped, group, *factors):
        seen.append({names[id(a)] for a in group.a})
        return product.apply(x, dropped, group, *factors)

    monkeypatch.setattr(products, "_Product", SimpleNamespace(apply=apply))
    logits_and_gradients(model.network)
    assert seen == GROUPS[family] * 2


def test_results_that_a_failed_pass_left_are_dropped_before_the_next_one(join, made):
    """Otherwise their memory would be missing when a batch is retried after running out of memory."""
    model, kept, alive = loaded(made, "llama"), [], []
    join(model.network, False)
    layers = model.network.model.layers
    layers[0].register_forward_hook(lambda layer, given, output: kept.append(weakref.ref(output)))

    def short(x):
        raise torch.OutOfMemoryError("between gate and up")

    own = layers[-1].mlp.forward
    layers[-1].mlp.forward = MethodType(lambda mlp, x: short(mlp.gate_proj(x)) * mlp.up_proj(x), layers[-1].mlp)
    batch = Batch(IDS, IDS, torch.ones_like(IDS))
    with pytest.raises(torch.OutOfMemoryError):
        summed_loss(model, batch)
    gc.collect()
    layers[-1].mlp.forward = own
    layers[0].register_forward_pre_hook(lambda *_: alive.extend(reference() is not None for reference in kept))
    summed_loss(model, batch)
    assert alive == [False]


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


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_small_change_is_not_lost_to_rounding(join, is_joined, made):
    """PEFT adds it to the rounded product, where a large part is lost."""
    model = loaded(made, "llama", BFLOAT16)
    layers = list(model.adapted().values())
    for layer in layers:
        layer.lora_b.data.mul_(0.0003)
    inputs = {64: torch.randn(2000, 64).bfloat16(), 128: torch.randn(2000, 128).bfloat16()}
    xs = [inputs[layer.base.shape[1]] for layer in layers]
    assert effects(layers, xs, as_peft) < 0.7
    if is_joined:
        join(model.network, False)
    assert 0.9 < effects(layers, xs) < 1.1


def packed_weight():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(7)) * 8
    parts = encode(TensorSpec("x.weight", "F32", (24, 64)), weight, Encoding("nf4", 64, True))
    return PackedWeight(decode("x.weight", {n.removeprefix("x.weight"): p for n, p in parts.items()}))


class Twins(nn.Module):
    """Two layers that may or may not get the same input."""

    device = torch.device("cpu")

    def __init__(self, use):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.one, self.two = (LoraLinear(packed_weight(), None) for _ in range(2))
        for layer, factor in ((self.one, 1), (self.two, 3)):
            a, b = torch.randn(5, 64, generator=generator), torch.randn(layer.base.shape[0], 5, generator=generator)
            layer.attach(LowRank.of_tensors(a, b * factor, 0.7))
        self.table, self.use = nn.Embedding(9, 64), use

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache=False):
        return self.use(self, self.table(input_ids))


USES = {
    "both": (lambda twins, x: (twins.one(x), twins.two(x)), [2]),
    "again": (lambda twins, x: (twins.one(x), twins.two(x), twins.one(x), twins.two(x)), [2]),
    "twice": (lambda twins, x: (twins.one(x), twins.one(x), twins.two(x)), [2]),
    "other": (lambda twins, x: (twins.one(x), twins.two(x + 1)), [1, 1]),
    "never": (lambda twins, x: (twins.one(x),), [1, 1]),
}
BOTH = USES["both"][0]


@pytest.mark.parametrize("name", USES)
def test_results_are_the_same_however_the_layers_are_called(join, name):
    use, sizes = USES[name]
    twins = Twins(use)

    def found():
        results = twins(torch.arange(7)[None])
        total = sum(result.square().sum() for result in results)
        adapters = [*twins.one.parameters(), *twins.two.parameters()]
        return [*results, *torch.autograd.grad(total, adapters, allow_unused=True, materialize_grads=True)]

    before = found()
    assert [len(group.a) for group in join(twins, False)] == sizes
    near(found(), before)


def test_gradients_are_correct_if_only_one_of_the_joined_layers_is_called(join):
    """A later pass may skip a layer that ran in the probe."""
    twins = Twins(BOTH)
    join(twins, False)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        twins.one(x)  # results of a pass without gradients must not be used in one with gradients
    y = twins.two(x)
    grads = torch.autograd.grad(y.square().sum(), (x, twins.one.lora_b, twins.two.lora_b))
    assert not grads[1].any()
    weight = twins.two.base.dequantize(torch.float32) + 0.7 * twins.two.lora_b.detach() @ twins.two.lora_a.detach()
    reference = x.detach().requires_grad_()
    near(grads[:1], torch.autograd.grad(functional.linear(reference, weight).square().sum(), reference))


def test_an_input_that_was_modified_in_place_is_a_new_input(join):
    twins = Twins(BOTH)
    join(twins, False)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = twins.two(2 * x)
        twins.one(x)
        torch.testing.assert_close(twins.two(x.mul_(2)), expected)


def test_a_network_may_change_a_result_in_place(join):
    twins = Twins(BOTH)
    join(twins, False)
    x, found = torch.randn(3, 64), []
    for change in (lambda y: y.mul_(3.0), lambda y: y * 3.0):
        total = change(twins.one(x)).square().sum() + change(twins.two(x)).sum()
        found.append(torch.autograd.grad(total, (twins.one.lora_a, twins.two.lora_b)))
    assert all(map(torch.equal, *found))


def test_an_empty_input_gives_empty_or_zero_gradients(join):
    twins = Twins(BOTH)
    join(twins, False)
    x = torch.randn(0, 64, requires_grad=True)
    (twins.one(x).sum() + twins.two(x).sum()).backward()
    assert x.grad.shape == (0, 64)
    assert not twins.one.lora_a.grad.any()


def test_an_input_without_a_gradient_needs_no_backward_product_with_the_weight(join, monkeypatch):
    twins, decoded = Twins(BOTH), []
    adapters, x = [*twins.one.parameters(), *twins.two.parameters()], torch.randn(3, 64)

    def found(x):
        return torch.autograd.grad(sum(y.square().sum() for y in (twins.one(x), twins.two(x))), adapters)

    before = found(x)
    join(twins, False)
    own = PackedWeight.dequantize
    monkeypatch.setattr(PackedWeight, "dequantize", lambda w, dtype: (decoded.append(1), own(w, dtype))[1])
    near(found(x), before)
    assert len(decoded) == 2
    near(found(x.clone().requires_grad_()), before)
    assert len(decoded) == 6


def test_an_input_is_freed_without_the_garbage_collector(join):
    """A reference cycle would keep a large tensor alive until the collector runs."""
    gc.collect()
    gc.disable()
    try:
        twins = Twins(BOTH)
        join(twins, False)
        x = torch.randn(3, 64, requires_grad=True) * 1.0
        left = [weakref.ref(x), weakref.ref(twins.one), weakref.ref(twins.one.base.codes.untyped_storage())]
        twins.one(x)
        twins.two(x + 1)
        twins.two(x + 2)
        del x
        assert left[0]() is None
        del twins
    finally:
        gc.enable()
    gc.collect()
    assert [ref() is None for ref in left] == [True] * 3


def test_inference_mode_gives_the_logits_of_no_grad(join, made):
    model = loaded(made, "llama")
    join(model.network, False)
    with torch.inference_mode():
        found = model.network(input_ids=torch.arange(9)[None], use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(found, model.network(input_ids=torch.arange(9)[None], use_cache=False).logits)


@pytest.mark.parametrize(
    ("dtype", "policy", "dropout"),
    [(torch.float32, "layer", 0.3), (BFLOAT16, "sqrt", 0.3), (BFLOAT16, "layer", 0.0)],
)
def test_gradients_do_not_depend_on_checkpointing(join, packed, policy, dropout, dtype):
    found = []
    for chosen in ("none", policy):
        model = load_adapted(packed, dtype, dropout=dropout)
        join(model.network, True, dtype)
        checkpoint_layers(model.network, choose_checkpointing(model.network, chosen, None))
        torch.manual_seed(3)
        model.network.train()(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
        found.append([parameter.grad for parameter in trained(model.network)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_added_to_those_that_parameters_have(join, packed, dropout):
    model = load_adapted(packed, dropout=dropout)
    join(model.network, False)
    given, kept, expected = [], [], []
    for parameter in trained(model.network):
        expected.append(torch.zeros_like(parameter))
        kept.append(torch.zeros_like(parameter))

    def loss(seed):
        torch.manual_seed(seed)
        return model.network.train()(input_ids=IDS + seed, use_cache=False).logits.square().mean()

    for seed in (5, 6):
        for sum_, grad in zip(expected, torch.autograd.grad(loss(seed), trained(model.network)), strict=True):
            sum_.add_(grad)
    for parameter, grad in zip(trained(model.network), kept, strict=True):
        parameter.grad = grad
        parameter.register_hook(lambda grad: given.extend([] if grad is None else [grad]))
    for seed in (5, 6):
        loss(seed).backward()
    assert not given, "autograd has nothing to add"
    for parameter, grad, wanted in zip(trained(model.network), kept, expected, strict=True):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
        assert wanted.any()


def test_a_bfloat16_gradient_is_cast_to_float32_before_it_is_scaled():
    """Neither the factor 1.01 nor the product may be rounded to bfloat16."""
    parameter = nn.Parameter(torch.zeros(3, 1))
    grad = torch.tensor([[1.0], [1.0078125], [-3.0]], dtype=BFLOAT16)
    expected = grad.float() * 1.01
    torch.testing.assert_close(products._added(parameter, grad, 1.01), expected, rtol=1e-7, atol=0)
    parameter.grad = torch.zeros(3, 1)
    assert products._added(parameter, grad, 1.01) is None
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=0)


# Adapters that are cast all at once for a GPU.


def in_16_bits(packed):
    return load_adapted(packed, BFLOAT16, rank_pattern={"q_proj": 3, "down_proj": 5})


def test_casting_all_at_once_changes_no_bit_also_after_updates(join, packed):
    one, two = (in_16_bits(packed) for _ in range(2))
    join(one.network, True, torch.float32)
    join(two.network, True, BFLOAT16)
    vectors = [Trainable.of(model).values for model in (one, two)]  # which moves the parameters
    for _ in range(3):
        found = []
        for model in (one, two):
            logits = model.network.train()(input_ids=IDS, use_cache=False).logits
            logits.float().square().mean().backward()
            found.append([logits, *(parameter.grad for parameter in trained(model.network))])
        assert all(map(torch.equal, *found))
        for vector in vectors:
            vector.mul_(1.1).add_(0.001)


def is_current(group):
    return torch.equal(group.cast_a(BFLOAT16), torch.cat(group.a).to(BFLOAT16)) and all(
        torch.equal(narrow, b.to(BFLOAT16)) for narrow, b in zip(group.cast_b(BFLOAT16), group.b, strict=True)
    )


def test_products_use_copies_that_are_in_one_aligned_block_of_memory(join, packed):
    model = in_16_bits(packed)
    groups, block = join(model.network, True, BFLOAT16), model.network.narrow_adapters
    assert block.dtype == BFLOAT16
    for group in groups:
        assert is_current(group)
        for copy in (group.cast_a(BFLOAT16), *group.cast_b(BFLOAT16)):
            assert copy.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
            assert copy.is_contiguous()
            assert copy.storage_offset() * copy.itemsize % 16 == 0
        assert group.cast_a(torch.float32).dtype == group.cast_b(torch.float32)[0].dtype == torch.float32


def test_copies_are_updated_whether_the_network_or_its_base_model_is_called(join, packed):
    model = in_16_bits(packed)
    groups = join(model.network, True, BFLOAT16)
    batch = Batch(IDS, IDS, torch.ones_like(IDS))
    for call in (lambda: summed_loss(model, batch), lambda: model.network(input_ids=IDS, use_cache=False)):
        for parameter in trained(model.network):
            parameter.data.mul_(1.5)
        assert not any(map(is_current, groups))
        with torch.no_grad():
            call()
        assert all(map(is_current, groups))
