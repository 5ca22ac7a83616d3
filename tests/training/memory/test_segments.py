"""Every checkpointing policy gives the same bits, and saves less for the backward pass."""

import gc
from collections import UserDict
from functools import cache

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from adaptkit.checkpoint.reader import MappedCheckpoint
from adaptkit.errors import UsageError
from adaptkit.models.activations import Checkpointing
from adaptkit.training.fast import accelerate
from adaptkit.training.memory.activations import Activations, layer_sizes
from adaptkit.training.memory.offload import OffloadedTensors
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing, is_recomputing
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter


def checkpoint(network, policy, offloaded=None):
    if isinstance(policy, str):
        policy = choose_checkpointing(network, policy, measure=None)
    checkpoint_layers(network, policy, offloaded)
    return policy.segments


POLICIES = ["layer", "sqrt", "segments:1", "segments:4"]
IDS = torch.arange(40).reshape(2, 20) % 50 + 3


def gradients(folder, policy, dropout, twice=False, offloaded=None, by=checkpoint):
    model = load_model(folder, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", dropout, seed=0)
    for number, layer in enumerate(model.adapted().values()):
        generator = torch.Generator().manual_seed(number)
        layer.lora_b.data.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.02)
    count = by(model.network, policy, offloaded)
    model.network.train()
    torch.manual_seed(11)
    for _ in range(2 if twice else 1):
        logits = model.network(input_ids=IDS, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in model.network.named_parameters() if p.requires_grad}
    return found, count, float(torch.rand(()))


@pytest.fixture(scope="module")
def unsegmented(deep_nf4):
    return cache(lambda dropout: gradients(deep_nf4, "none", dropout, twice=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_bit_identical_to_those_without_checkpointing(deep_nf4, unsegmented, policy, dropout):
    expected, _, random_after = unsegmented(dropout)
    found, count, random_found = gradients(deep_nf4, policy, dropout, twice=True)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(float(grad.abs().sum()) > 0 for grad in expected.values())
    assert random_found == random_after
    assert count == {"layer": 7, "sqrt": 3}.get(policy, int(policy.partition(":")[2] or 0))


@pytest.mark.parametrize("policy", ["none", "layer", "segments:2"])
@pytest.mark.parametrize(("targets", "first"), [(("*",), 0), (("model.layers.4.*", "model.layers.5.*"), 4)])
def test_layer_inputs_require_gradients_only_where_they_do_without_checkpointing(deep_nf4, policy, targets, first):
    """A layer whose input needs a gradient uses different products, which round differently on some processors."""
    model = load_model(deep_nf4, torch.float32, torch.device("cpu"))
    new_adapter(model, targets, AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    checkpoint(model.network, policy)
    asked = {}

    def look(number, inputs, output):
        if output.requires_grad:
            asked[number] = inputs[0].requires_grad

    for number, layer in enumerate(model.network.model.layers):
        layer.mlp.register_forward_hook(lambda _, inputs, output, number=number: look(number, inputs, output))
        layer.input_layernorm.register_forward_hook(
            lambda _, inputs, output, number=number: look(("norm", number), inputs, output)
        )
    model.network.train()(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    layers = range(first, 7)
    assert asked == {number: True for number in layers} | {
        ("norm", number): True for number in layers if number > first
    }


def test_offloading_and_last_layers_without_checkpoints_change_no_bit(deep_nf4, unsegmented):
    """Two steps use the same ``OffloadedTensors``."""
    expected, _, random_after = unsegmented(0.1)
    offloaded = OffloadedTensors(torch.device("cpu"))
    for checkpointing in ("segments:3", Checkpointing(7, 2, whole=2)):
        found, count, random_found = gradients(deep_nf4, checkpointing, 0.1, twice=True, offloaded=offloaded)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (random_found, count) == (random_after, 3), checkpointing


def saved_bytes(folder, policy, by=checkpoint):
    """Return the bytes that autograd saves in a forward pass through the layers."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    by(model.network, policy)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        model.network.train().model(input_ids=IDS, use_cache=False)
    return sum(saved)


def test_checkpointing_saves_less_for_the_backward_pass(deep_nf4):
    everything = saved_bytes(deep_nf4, "none")
    for policy in ("layer", "sqrt"):
        assert saved_bytes(deep_nf4, policy) < everything / 10


@pytest.mark.parametrize("whole", [7, 3])
def test_shrinking_checkpoints_all_layers_and_changes_no_bit(deep_nf4, unsegmented, whole):
    everything, least = (saved_bytes(deep_nf4, policy) for policy in ("none", "layer"))
    expected, _, _ = unsegmented(0.1)

    def ready(network, *, allowed=True):
        kept = Activations(Checkpointing(7, 1, whole), 0, 0, None, network if allowed else None)
        checkpoint_layers(network, kept.checkpointing)
        return kept

    def shrunk(network, policy, offloaded=None):
        kept = ready(network)
        assert kept.shrink()
        assert not kept.shrink()
        return str(kept.checkpointing)

    found, said, _ = gradients(deep_nf4, "", 0.1, twice=True, by=shrunk)
    assert said == "7 of 7 layers checkpointed"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert saved_bytes(deep_nf4, "", by=shrunk) == least < everything * whole / 7
    assert not ready(load_model(deep_nf4, torch.float32, torch.device("cpu")).network, allowed=False).shrink()


def test_auto_checkpoints_every_layer_if_layers_cannot_be_measured(deep_nf4):
    def measure():
        raise UsageError("this network cannot be followed")

    network = load_model(deep_nf4, torch.float32, torch.device("cpu")).network
    assert choose_checkpointing(network, "auto", measure, room=1 << 40) == Checkpointing(7, 1)
    assert choose_checkpointing(network, "auto", measure) == Checkpointing(7, 1)


def kept_inputs(folder, policy):
    """Return how many layer inputs stay alive until the backward pass, and after it."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = StorageWeakRef(storage)

    model = load_model(folder, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    for layer in model.network.model.layers:
        layer.register_forward_pre_hook(lambda _, args: note(args[0]))
    checkpoint(model.network, policy)
    hidden = model.network.train().model(input_ids=IDS, use_cache=False).last_hidden_state
    before = sum(not reference.expired() for reference in storages.values())
    hidden.sum().backward()
    del hidden
    gc.collect()
    return before, sum(not reference.expired() for reference in storages.values())


def test_only_the_inputs_of_segments_stay_alive(deep_nf4):
    assert kept_inputs(deep_nf4, "layer") == (7, 0)
    assert kept_inputs(deep_nf4, "sqrt") == (3, 0)


def test_a_model_without_a_stack_of_layers_trains_without_checkpointing():
    assert checkpoint(nn.Linear(2, 2), "none") == checkpoint(nn.Linear(2, 2), "auto") == 0
    with pytest.raises(UsageError, match="no list of layers") as caught:
        checkpoint(nn.Linear(2, 2), "layer")
    assert "none" in caught.value.hint


class Weighing(nn.Module):
    """A layer that returns hidden states, a number for each of them, None, and its second argument."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, hidden, told):
        inner = torch.tanh(self.inner(hidden))
        return hidden + inner, inner.sum(-1), None, told


class Stack(nn.Module):
    def __init__(self, uses_others):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Weighing() for _ in range(5))
        self.uses_others = uses_others

    def forward(self, hidden):
        total, told = 0.0, torch.ones(2)
        for layer in self.layers:
            hidden, weights, nothing, same = layer(hidden, told)
            assert nothing is None
            assert torch.equal(same, told)
            total = total + weights.square().sum() * self.uses_others
        return hidden.sum() + total


@pytest.mark.parametrize("uses_others", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["layer", "sqrt"])
def test_further_outputs_of_layers_keep_their_gradient(policy, uses_others):
    """Bloom's and MPT's layers always return attention weights, too."""
    found = []
    for chosen in ("none", policy):
        network = Stack(uses_others)
        checkpoint(network, chosen)
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        network(x).backward()
        found.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


class Sharing(Weighing):
    """A layer with a given function of its result and a mapping that all layers share."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, hidden, shared):
        return self.act(torch.tanh(self.inner(hidden)), shared)


class Sharers(nn.Module):
    def __init__(self, *acts):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Sharing(act) for act in acts)

    def forward(self, hidden):
        shared = UserDict()
        for layer in self.layers:
            hidden = layer(hidden, shared)
        return hidden.square().sum()


def left(x, shared):
    shared["a"] = [x.sin(), x.cos()]
    return x


def replaced(x, shared):
    first, second = shared["a"]
    shared["a"] = [second * x, first]
    return x + second


def taken(x, shared):
    return x * shared["a"][0] + shared["a"][1]


def ignored(x, shared):
    return torch.ones_like(x)


@pytest.mark.parametrize("policy", ["layer", "sqrt", "segments:1"])
@pytest.mark.parametrize("acts", [(left, taken, replaced, taken, taken), (left, ignored, taken)])
def test_tensors_that_layers_pass_on_in_a_shared_mapping_keep_their_gradient(policy, acts):
    found = []
    for chosen in ("none", policy):
        network = Sharers(*acts)
        checkpoint(network, chosen)
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        network(x).backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for one, two in zip(*found, strict=True):
        assert (one is None or not one.any()) == (two is None or not two.any())
        assert one is None or two is None or torch.equal(one, two)


@pytest.mark.parametrize("act", [lambda x, m: m["a"].append(x) or x, lambda x, m: m.pop("a")[0]])
def test_a_layer_that_modifies_entries_of_other_layers_is_refused(act):
    network = Sharers(left, act, ignored)
    checkpoint(network, "layer")
    with pytest.raises(UsageError, match="modify a mapping that other layers share"):
        network(torch.ones(2, 6))


def test_layers_that_do_not_return_hidden_states_first_are_refused():
    class Odd(Weighing):
        def forward(self, hidden, told):
            return {"hidden": hidden}

    network = Stack(0.0)
    network.layers = nn.ModuleList([Odd()])
    checkpoint(network, "layer")
    with pytest.raises(UsageError, match="hidden states first"):
        network(torch.ones(2, 6))


@pytest.mark.parametrize("policy", ["layer", "sqrt"])
def test_each_of_two_passes_has_segments_of_its_own(deep_nf4, policy):
    """Both may still be needed for a backward pass."""
    model = load_model(deep_nf4, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    checkpoint(model.network, policy)
    model.network.train()
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]

    def loss(ids):
        return model.network(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()

    def found(value):
        model.network.zero_grad(set_to_none=True)
        value.backward()
        return [parameter.grad for parameter in parameters]

    alone = [found(loss(ids)) for ids in (IDS, IDS + 1)]
    for value, expected in zip([loss(ids) for ids in (IDS, IDS + 1)], alone, strict=True):
        assert all(map(torch.equal, found(value), expected))


class PlainLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + self.linear(hidden).tanh()


class PlainNetwork(nn.Module):
    def __init__(self, width, dtype):
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(width) for _ in range(4))
        self.to(dtype)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "arranged"),
    [
        (33, lambda hidden: hidden),  # a row of 33 is not a multiple of what memory is aligned to
        (64, lambda hidden: hidden.transpose(0, 1).contiguous().transpose(0, 1)),
        (64, lambda hidden: hidden[:1].expand(hidden.shape)),
    ],
)
def test_inputs_of_segments_are_kept_in_the_form_that_products_depend_on(width, arranged, dtype):
    """The same values in other strides, or at another alignment, are multiplied in another order."""
    torch.manual_seed(0)
    network, hidden = PlainNetwork(width, dtype), arranged(torch.randn(3, 33, width).to(dtype))
    gradients = []
    for length in (0, 1):
        if length:
            checkpoint_layers(network, Checkpointing(4, length))
        network.zero_grad()
        network(hidden).float().square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_layers_are_recomputing_only_while_they_run_again_for_their_backward_pass():
    """Also after one of them fails."""
    network, seen = PlainNetwork(8, torch.float32), []
    for layer in network.layers:
        layer.linear.register_forward_hook(lambda *_: seen.append(is_recomputing()))
    checkpoint_layers(network, Checkpointing(4, 2))
    loss = network(torch.randn(3, 8)).sum()
    assert seen == [False] * 4
    loss.backward()
    again = [False, True, True]  # of each segment: the first layer, for the second one's input; then both
    assert seen[4:] == 2 * again
    assert not is_recomputing()
    with torch.no_grad():
        network(torch.randn(3, 8))
    assert seen[10:] == [False] * 4
    loss = network(torch.randn(3, 8)).sum()
    handle = network.layers[3].linear.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    assert not is_recomputing()


def test_a_checkpointed_layer_keeps_its_names_weights_and_hooks_and_layers_of_a_kind_stay_alike():
    network, calls = PlainNetwork(8, torch.float32), []
    before, names = dict(network.named_parameters()), [name for name, _ in network.named_modules()]
    network.layers[1].register_forward_pre_hook(lambda layer, _: calls.append(layer))
    checkpoint_layers(network, Checkpointing(4, 1))
    assert dict(network.named_parameters()) == before
    assert [name for name, _ in network.named_modules()] == names
    assert len({type(layer) for layer in network.layers}) == 1
    assert all(isinstance(layer, PlainLayer) for layer in network.layers)
    network(torch.randn(3, 8))
    assert calls == [network.layers[1]]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("policy", "checked"), [("none", 0), ("layer", 7), ("sqrt", 7), (Checkpointing(7, 2, 3), 4)])
def test_checkpointed_layers_release_the_mapped_pages_of_their_packed_weights(
    deep_nf4, policy, checked, fast, monkeypatch
):
    given = []
    monkeypatch.setattr(MappedCheckpoint, "release_pages", lambda _, part: given.append((part.data_ptr(), part.nbytes)))
    model = load_model(deep_nf4, torch.float32, torch.device("cpu"))
    new_adapter(model, ("*",), AdapterShape(2, 4.0), "kaiming", 0.0, seed=0)
    if fast:
        accelerate(model.network, model.dtype, torch.device("cpu"), model.output_layer)
    assert not given
    checkpoint(model.network, policy)
    before, given[:] = set(given), []  # released when the layers were checkpointed
    model.network.train()(input_ids=IDS, use_cache=False).logits.sum().backward()
    layers = model.network.model.layers[:checked]
    codes = [m.codes for layer in layers for m in layer.modules() if isinstance(m, PackedWeight)]
    assert len(codes) == 7 * checked
    assert set(given) == before == {(part.data_ptr(), part.nbytes) for part in codes}


@pytest.mark.parametrize(
    ("length", "has_pairs", "starts"),
    [(20, False, None), (20, True, [0, 10]), (21, True, [0, 11]), (700, False, [0, 512]), (700, True, [0, 350])],
)
def test_layers_are_measured_with_two_samples_in_a_row_or_with_as_many_as_their_length_needs(
    llama_nf4, length, has_pairs, starts
):
    network, seen = load_model(llama_nf4, torch.float32, torch.device("cpu")).network, []
    network.base_model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    layer_sizes(network, (1, length), torch.device("cpu"), has_pairs)
    positions = seen[0].get("position_ids")
    assert (positions is None) == (starts is None)
    if positions is not None:
        assert (positions[0] == 0).nonzero().flatten().tolist() == starts
