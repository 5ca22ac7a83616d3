"""Packed experts compute what transformers computes with dequantized ones, and are never kept unpacked."""

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import tiny
import torch
from folders import edited_tensors
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint
from adaptkit.errors import CheckpointError
from adaptkit.formats._find import quantized_names
from adaptkit.models.activations import kind_of
from adaptkit.models.architecture import empty_network
from adaptkit.models.assembly import Assembly
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network import experts
from adaptkit.training.network.experts import ExpertList, PackedModule, read_weight
from adaptkit.training.network.frozen import PackedWeight, PlainWeight
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter, new_stack_adapters
from adaptkit.training.network.packed import read_quantized
from adaptkit.training.network.sharding import _make_shardable

CPU = torch.device("cpu")
IDS = torch.arange(3, 43).view(2, 20)
FAMILIES = ["mixtral", "mixtral-fused", "qwen2_moe", "qwen3_moe", "qwen3_moe-fused"]
UNNAMED = ["granitemoe", "jetmoe"]
"""Families whose files do not call the experts so."""
STACKS = {"mixtral-fused": 4, "qwen3_moe-fused": 4, "granitemoe": 4, "jetmoe": 8}
"""Number of quantized stacks; the others have 24 quantized matrices."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: a source, the checkpoint with packed experts, and its dequantized copy in float32."""
    root = tmp_path_factory.mktemp("experts")
    made = {}
    for family in [*FAMILIES, *UNNAMED]:
        name, _, fused = family.partition("-")
        source = tiny.write_family(root / family, name, fused_experts=bool(fused), dtype="float32")
        packed, plain = root / f"{family}-nf4", root / f"{family}-plain"
        quantize(source, packed, QuantizeOptions(moe="quantize"))
        dequantize(packed, plain)
        checkpoint, tensors = Checkpoint(packed), load_file(plain / "model.safetensors")
        for tensor in quantized_names(checkpoint):
            tensors[tensor] = read_quantized(checkpoint, tensor).dequantize(torch.float32)
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        made[family] = SimpleNamespace(source=source, packed=packed, plain=plain)
    return made


def packed_matrices(network):
    return [part for name, part in network.named_modules() if isinstance(part, PackedWeight) and ".packed." in name]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*itertools.product(FAMILIES, ["eager", "grouped_mm", "batched_mm"]), *((family, "") for family in UNNAMED)],
)
def test_logits_are_those_of_transformers_with_the_dequantized_experts(folders, family, implementation):
    plain = AutoModelForCausalLM.from_pretrained(folders[family].plain, dtype=torch.float32)
    model = load_model(folders[family].packed, torch.float32, CPU)
    for network in (plain, model.network) if implementation else ():
        network.set_experts_implementation(implementation)
    assert len(packed_matrices(model.network)) == STACKS.get(family, 24)
    with torch.no_grad():
        assert torch.allclose(model.network(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_experts_are_loaded_too(folders, family):
    plain = AutoModelForCausalLM.from_pretrained(folders[family].source, dtype=torch.float32)
    model = load_model(folders[family].source, torch.float32, CPU)
    with torch.no_grad():
        assert torch.allclose(model.network(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-6)


def gradients(folder, policy, implementation):
    model = load_model(folder, torch.float32, CPU)
    model.network.set_experts_implementation(implementation)
    new_adapter(model, ("*_proj",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, layer in sorted(model.adapted().items()):
        layer.lora_b.data.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.02)
    checkpoint_layers(model.network, choose_checkpointing(model.network, policy, measure=None))
    model.network.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.network.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def expected_gradients(folders):
    return cache(lambda family, implementation: gradients(folders[family].plain, "none", implementation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "is_packed"), list(zip(FAMILIES, (True, False, True, False, True), strict=True)))
def test_experts_unpacked_one_by_one_give_the_bits_of_whole_stacks(folders, family, is_packed, dtype, monkeypatch):
    """On a 16-bit base, whose stacks are only changed by their LoRA, too."""

    def gradients():
        model = load_model(folders[family].packed if is_packed else folders[family].source, dtype, CPU)
        new_adapter(model, ("q_proj",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
        new_stack_adapters(model, ("*.experts.*",), AdapterShape(4, 8.0), seed=0)
        generator = torch.Generator().manual_seed(0)
        trained = {name: p for name, p in sorted(model.network.named_parameters()) if p.requires_grad}
        for parameter in trained.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        loss = model.network.train()(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in trained.items()}

    found = gradients()
    monkeypatch.setattr(experts, "multiplies_groups", lambda module: False)
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert value.abs().max() > 0, name


@pytest.mark.parametrize("part", ["packed", "source"])
@pytest.mark.parametrize("family", ["mixtral", "mixtral-fused"])
def test_experts_that_are_parameters_as_when_the_base_is_sharded_give_the_same_bits(folders, family, part):
    folder = getattr(folders[family], part)
    model, sharded = (load_model(folder, torch.float32, CPU) for _ in range(2))
    for one in (model, sharded):
        new_stack_adapters(one, ("*.experts.*",), AdapterShape(4, 8.0), seed=0)
    for module in list(sharded.network.modules()):
        _make_shardable(module)
    with torch.no_grad():
        assert torch.equal(sharded.network(IDS).logits, model.network(IDS).logits)


@pytest.mark.parametrize(
    ("family", "policy", "implementation"),
    [
        ("mixtral", "none", "eager"),
        ("mixtral", "sqrt", "grouped_mm"),
        ("mixtral", "layer", "batched_mm"),
        ("qwen3_moe-fused", "none", "grouped_mm"),
        ("qwen3_moe-fused", "sqrt", "batched_mm"),
        ("qwen3_moe-fused", "layer", "eager"),
    ],
)
def test_gradients_are_those_through_the_dequantized_experts(
    folders, expected_gradients, family, policy, implementation
):
    found = gradients(folders[family].packed, policy, implementation)
    expected = expected_gradients(family, implementation)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-5
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_the_graph_keeps_no_unpacked_experts(folders, monkeypatch):
    model = load_model(folders["qwen3_moe-fused"].packed, torch.float32, CPU)
    model.network.set_experts_implementation("eager")
    new_adapter(model, ("q_proj",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    unpacked, dequantize_really = [], PackedWeight.dequantize

    def watched(weight, *args):
        result = dequantize_really(weight, *args)
        if len(weight.shape) == 3:
            unpacked.append(StorageWeakRef(result.untyped_storage()))
        return result

    monkeypatch.setattr(PackedWeight, "dequantize", watched)
    loss = model.network.train()(IDS, labels=IDS, use_cache=False).loss
    assert len(unpacked) == 4
    assert all(storage.expired() for storage in unpacked)
    loss.backward()
    assert len(unpacked) == 8  # each stack once more, however many of its experts were used
    assert all(storage.expired() for storage in unpacked)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe-fused"])
@pytest.mark.parametrize("policy", ["none", "layer"])
def test_only_experts_that_have_tokens_are_unpacked_once_in_every_pass(folders, family, policy, monkeypatch):
    model = load_model(folders[family].packed, torch.float32, CPU)
    new_adapter(model, ("q_proj",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    checkpoint_layers(model.network, choose_checkpointing(model.network, policy, measure=None))
    unpacked, picked, write_really = [], set(), experts._write_expert

    def watched(stack, expert, target):
        unpacked.append((id(stack), expert))
        write_really(stack, expert, target)

    for layer in model.network.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args: picked.update(product(map(id, module.packed.values()), args[1].unique().tolist()))
        )
    monkeypatch.setattr(experts, "_write_expert", watched)
    ids = torch.full((1, 3), 7)  # equal tokens, of which two experts of four get all
    model.network.train()(ids, labels=ids, use_cache=False).loss.backward()
    assert len(picked) == 2 * 2 * 2
    assert Counter(unpacked) == dict.fromkeys(picked, 2 if policy == "none" else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_release_the_mapped_pages_of_packed_experts(folders, family, monkeypatch):
    given = set()
    monkeypatch.setattr(MappedCheckpoint, "release_pages", lambda _, part: given.add((part.data_ptr(), part.nbytes)))
    model = load_model(folders[family].packed, torch.float32, CPU)
    checkpoint_layers(model.network, choose_checkpointing(model.network, "layer", measure=None))
    model.network.eval()(IDS, use_cache=False)
    codes = [matrix.codes for matrix in packed_matrices(model.network)]
    assert codes
    assert {(part.data_ptr(), part.nbytes) for part in codes} <= given


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_packed_experts_are_of_one_kind(folders, family):
    """Otherwise each of them would be probed and measured."""
    for root in (folders[family].packed, folders[family].source):
        model = load_model(root, torch.float32, CPU)
        new_stack_adapters(model, ("*.experts.*",), AdapterShape(4, 8.0), seed=0)
        first, second = model.network.model.layers
        assert isinstance(first.mlp.experts, PackedModule)
        assert kind_of(first) == kind_of(second)


def test_a_list_of_experts_dequantizes_to_its_matrices_stacked_in_order():
    matrices = [[torch.randn(3, 4), torch.randn(2, 4)] for _ in range(11)]
    stack = ExpertList([[PlainWeight(matrix) for matrix in row] for row in matrices])
    expected = torch.stack([torch.cat(row) for row in matrices])
    assert stack.shape == tuple(expected.shape)
    assert torch.equal(stack.dequantize(torch.float32), expected)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_packed_matrices_of_a_list_dequantize_to_its_stack(folders, tmp_path, name):
    quantize(folders["mixtral"].source, tmp_path / name, QuantizeOptions(moe="quantize", format=name))
    network = load_model(tmp_path / name, torch.float32, CPU).network
    packed = network.model.layers[1].mlp.experts.packed["gate_up_proj"]
    expected = torch.stack([torch.cat([matrix.dequantize(torch.float32) for matrix in row]) for row in packed.experts])
    assert torch.equal(packed.dequantize(torch.float32), expected)


def test_packed_experts_are_ordered_by_number_and_not_alphabetically(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES["mixtral"], "num_local_experts", 12)
    source = tiny.write_family(tmp_path / "source", "mixtral")
    quantize(source, tmp_path / "nf4", QuantizeOptions(moe="quantize"))
    checkpoint = Checkpoint(tmp_path / "nf4")
    stack = read_weight(Assembly(empty_network(checkpoint), checkpoint), "model.layers.1.mlp.experts.down_proj")
    names = [f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(12)]
    expected = torch.stack([read_quantized(checkpoint, name).dequantize(torch.float32) for name in names])
    assert torch.equal(stack.dequantize(torch.float32), expected)


def test_packed_and_plain_experts_form_one_stack(folders, tmp_path):
    """``--skip`` can leave some experts plain."""
    skipped = QuantizeOptions(moe="quantize", skip=("*.experts.1.*",))
    quantize(folders["mixtral"].source, tmp_path / "nf4", skipped)
    dequantize(tmp_path / "nf4", tmp_path / "plain", DequantizeOptions(dtype="float32"))
    plain, model = (load_model(tmp_path / name, torch.float32, CPU) for name in ("plain", "nf4"))
    assert len(packed_matrices(model.network)) == 18
    with torch.no_grad():
        assert torch.allclose(model.network(IDS).logits, plain.network(IDS).logits, rtol=0, atol=1e-5)


def test_an_expert_that_is_missing_or_of_the_wrong_shape_is_an_error(folders, copy_of):
    folder = copy_of(folders["mixtral"].source)
    with edited_tensors(folder / "model.safetensors") as tensors:
        removed = tensors.pop("model.layers.1.block_sparse_moe.experts.3.w3.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: found 4 of .*w1.*3 of"):
        load_model(folder, torch.float32, CPU)
    tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"] = removed[:, :32].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected shape .*, as .* has, found "):
        load_model(folder, torch.float32, CPU)


def test_packed_experts_that_transformers_would_rebuild_are_refused_by_name(folders):
    from transformers.core_model_loading import Transpose

    checkpoint, name = Checkpoint(folders["mixtral"].packed), "model.layers.0.mlp.experts.down_proj"
    assembly = Assembly(empty_network(checkpoint), checkpoint)
    for file_name in assembly.sources[name]:
        place = assembly._places[file_name]
        assembly._places[file_name] = replace(place, operations=(*place.operations, Transpose(1, 2)))
    with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight: transformers rebuilds .*experts\.down_proj"):
        read_weight(assembly, name)
