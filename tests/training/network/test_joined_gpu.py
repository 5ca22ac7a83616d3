"""Weights joined for a GPU are stored once, decoded together, and keep their names, files and bits.

All but the kernel also runs on a CPU; ``test_joined`` compares results and gradients.
"""

from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from adapted import IDS, load_adapted, logits_and_gradients
from interrupted import stop_after
from packing import decode, encode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.formats._format import Encoding
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training import preparation
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network import joined_gpu, linear
from adaptkit.training.network import packed as packed_room
from adaptkit.training.network.decode import NestedConstants, constants_in_plain_torch, in_plain_torch
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.joined_gpu import JoinedWeight, join_on_gpu
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.narrow import keep_narrow


def is_joined(layer):
    return "multiply" in vars(layer)


def joined_names(model):
    return {name.rpartition(".")[2] for name, layer in model.linears.items() if is_joined(layer)}


def near(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))


def base_of(format_name, rows, seed, block_size=64, double_quant=True, width=64):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
    encoding = Encoding(format_name, block_size, double_quant)
    parts = encode(TensorSpec("x.weight", "F32", tuple(weight.shape)), weight, encoding)
    return PackedWeight(decode("x.weight", {n.removeprefix("x.weight"): p for n, p in parts.items()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("format_name", "block_size"), [("nf4", 64), ("fp4", 32)])
def test_joined_weights_are_decoded_to_the_same_bits_and_stored_once(format_name, block_size, double_quant, dtype):
    """300 rows do not fill whole groups of 256 constants, so the next weight's groups begin inside one."""
    bases = [base_of(format_name, rows, rows, block_size, double_quant) for rows in (300, 7, 512)]
    expected = torch.cat([base.dequantize(dtype) for base in bases])
    shapes = [{name: part.shape for name, part in base.named_buffers()} for base in bases]
    joined = JoinedWeight(bases)
    assert torch.equal(joined.dequantize(dtype), expected)
    assert torch.equal(torch.cat([base.dequantize(dtype) for base in bases]), expected)
    assert [{name: part.shape for name, part in base.named_buffers()} for base in bases] == shapes
    storages = {base.codes.untyped_storage().data_ptr() for base in bases}
    assert len(storages) == 1
    assert bases[0].codes.untyped_storage().nbytes() == sum(base.codes.nbytes for base in bases)


def test_decoding_without_triton_does_not_synchronize_with_the_gpu(monkeypatch):
    """Synchronizing for every weight would keep a GPU idle. Reading a value of a fake tensor fails."""
    monkeypatch.setattr(joined_gpu, "decode_constants", constants_in_plain_torch)
    monkeypatch.setattr(packed_room, "decode", in_plain_torch)
    joined = JoinedWeight([base_of("nf4", rows, rows) for rows in (300, 7)])
    mode, weight = FakeTensorMode(), joined._weight
    with mode:
        unknown, constants = mode.from_tensor, weight.constants
        constants = NestedConstants(unknown(constants.codes), unknown(constants.nested_absmax), constants.offset)
        joined._weight = replace(
            weight, codes=unknown(weight.codes), constants=constants, levels=unknown(weight.levels)
        )
        found = joined.dequantize(torch.bfloat16)
    assert found.shape == (307, 64)


def test_joining_does_not_change_the_state_dict_or_parameter_names(packed):
    model = load_adapted(packed)
    before = {name: part.clone() for name, part in model.network.state_dict().items()}
    parameters = [name for name, _ in model.network.named_parameters()]
    join_on_gpu(model.network)
    after = model.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], part) for name, part in before.items())
    assert [name for name, _ in model.network.named_parameters()] == parameters
    assert joined_names(model) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_the_weight_attribute_of_a_joined_layer_stays_the_same(packed):
    model = load_adapted(packed)
    before = {name: layer.weight.detach().clone() for name, layer in model.linears.items()}
    join_on_gpu(model.network)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in model.linears.items())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"targets": ("q_proj", "v_proj")}, {"q_proj", "v_proj"}),
        ({"targets": ("q_proj", "up_proj")}, set()),
        ({"dora": True}, set()),
    ],
    ids=["some", "one of each", "dora"],
)
def test_only_layers_with_a_plain_adapter_are_joined(packed, options, names):
    model = load_adapted(packed, **options)
    before = logits_and_gradients(model.network)
    join_on_gpu(model.network)
    assert joined_names(model) == names
    near(logits_and_gradients(model.network), before)


def test_a_layer_with_dora_does_not_prevent_joining_the_others(packed):
    model = load_adapted(packed)
    for name, layer in model.adapted().items():
        layer.scaling = 0.5 if name.endswith("v_proj") else layer.scaling
        if name.endswith("k_proj"):
            layer.attach_magnitude()
        if name.endswith("q_proj"):
            layer.attach_bias(torch.ones(layer.base.shape[0]))
    before = logits_and_gradients(model.network)
    join_on_gpu(model.network)
    assert joined_names(model) == {"q_proj", "v_proj", "gate_proj", "up_proj"}
    near(logits_and_gradients(model.network), before)


def unlike(first, second):
    """Return whether each of two layers with the same input is joined; check that results stay the same."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = LoraLinear(first, None), LoraLinear(second, None)
            self.table = torch.nn.Embedding(9, 64)

        def forward(self, input_ids, use_cache=False):
            x = self.table(input_ids)
            return self.one(x), self.two(x)

    both = Both()
    for layer in (both.one, both.two):
        layer.lora_a = torch.nn.Parameter(torch.randn(2, 64))
        layer.lora_b = torch.nn.Parameter(torch.randn(layer.base.shape[0], 2))
    expected = both(torch.arange(5)[None])
    join_on_gpu(both)
    near(both(torch.arange(5)[None]), expected)
    return is_joined(both.one), is_joined(both.two)


def test_only_distinct_4_bit_weights_of_the_same_encoding_are_joined():
    assert unlike(base_of("nf4", 8, 0), base_of("nf4", 16, 1)) == (True, True)
    assert unlike(base_of("nf4", 8, 0), base_of("fp4", 8, 1)) == (False, False)
    assert unlike(base_of("nf4", 8, 0), base_of("nf4", 8, 1, block_size=32)) == (False, False)
    assert unlike(base_of("nf4", 8, 0), base_of("nf4", 8, 1, double_quant=False)) == (False, False)
    assert unlike(base_of("int8", 8, 0), base_of("int8", 8, 1)) == (False, False)
    shared = base_of("nf4", 8, 0)
    assert unlike(shared, shared) == (False, False)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", ["layer", "sqrt"])
def test_gradients_do_not_depend_on_checkpointing(packed, policy, dropout):
    found = []
    for chosen in ("none", policy):
        model = load_adapted(packed, dropout=dropout)
        join_on_gpu(model.network)
        checkpoint_layers(model.network, choose_checkpointing(model.network, chosen, None))
        found.append(gradients_of_all(model))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def gradients_of_all(model):
    torch.manual_seed(3)
    model.network.train()(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return [parameter.grad for parameter in model.network.parameters() if parameter.requires_grad]


def test_a_run_that_was_interrupted_and_resumed_ends_with_the_same_bytes(packed, tmp_path, monkeypatch):
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = TrainConfig(
        base=str(packed), data=(str(data),), steps=4, rank=4, max_length=64, device="cpu", save_every=2,
        compute_dtype="float32",
    )  # fmt: skip
    train(config, tmp_path / "apart")
    monkeypatch.setattr(preparation, "join_layers", join_on_gpu)
    calls, multiplied = [], joined_gpu._multiplied
    monkeypatch.setattr(joined_gpu, "_multiplied", lambda *given: (calls.append(1), multiplied(*given))[1])
    whole = train(config, tmp_path / "whole")
    assert calls
    stop_after(config, tmp_path / "cut", 3)
    again = train(config, tmp_path / "cut")
    assert (again.resumed_from, again.tensors_root) == (3, whole.tensors_root)
    apart, joined = (read_adapter(tmp_path / name) for name in ("apart", "whole"))
    assert sorted(apart.modules) == sorted(joined.modules)


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel on a GPU: all but views and allocations."""

    HOST = ("aten.view", "aten.t.", "aten.transpose", "aten.split", "aten.unsafe_split", "aten.slice", "aten.detach",
            "aten.empty", "aten.new_empty", "aten.alias", "aten._unsafe_view", "aten.unsqueeze", "aten.expand",
            "aten.select", "aten.as_strided", "aten._reshape_alias", "aten.permute")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith(self.HOST):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def void(result):
    """Return None, as for an accumulated gradient, which autograd does not get."""


def launches(layers, monkeypatch):
    """Return the launches of layers with the same input, forward and backward; decoding counts as one, as on a GPU."""
    decoded = []

    def decode(self, dtype):
        decoded.append(1)
        return torch.empty(sum(self.rows) if isinstance(self, JoinedWeight) else self.shape[0], 64, dtype=dtype)

    for owner in (PackedWeight, JoinedWeight):
        monkeypatch.setattr(owner, "dequantize", decode)
    for module in (joined_gpu, linear):  # as accumulation does on a GPU
        monkeypatch.setattr(module, "accumulate", lambda to, grad, scale=1.0: void(to.grad.add_(grad, alpha=scale)))
    for layer in layers:
        layer.lora_a.grad, layer.lora_b.grad = torch.zeros_like(layer.lora_a), torch.zeros_like(layer.lora_b)
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    with Launches() as counted:
        results = [layer(x) for layer in layers]
        forward = counted.found.total() + len(decoded)
    grads = [torch.ones_like(y) for y in results]
    decoded.clear()
    with Launches() as counted:
        torch.autograd.grad(results, x, grads)
    return forward, counted.found.total() + len(decoded)


@pytest.mark.parametrize(
    ("names", "apart", "joined", "narrow"),
    [("qkv", (18, 32), (11, 23), (6, 18)), (("gate", "up"), (12, 21), (9, 17), (5, 13))],
    ids=["qkv", "gate"],
)
def test_joined_layers_take_fewer_launches(packed, names, apart, joined, narrow, monkeypatch):
    model = load_adapted(packed)
    layers = [model.linears[f"model.layers.0.{'self_attn' if len(n) == 1 else 'mlp'}.{n}_proj"] for n in names]
    with monkeypatch.context() as patch:
        assert launches(layers, patch) == apart
    together = join_on_gpu(model.network)
    with monkeypatch.context() as patch:
        assert launches(layers, patch) == joined
    keep_narrow(model.network, torch.bfloat16, together)
    assert launches(layers, monkeypatch) == narrow
