"""Tables in host memory give the same results, and only tables that are used for nothing but lookups are moved."""

import pytest
import tiny
import torch
from adapted import IDS
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from adaptkit.models import tables
from adaptkit.models.tables import host_tables
from adaptkit.training.fast.tables import hold_in_host_memory, keep_in_host_memory
from adaptkit.training.network.adapt import train_rows, train_whole
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_table_is_large(monkeypatch):
    monkeypatch.setattr(tables, "LEAST_BYTES", 1)


def loaded(made, tied=False, dtype=torch.float32):
    folder = made / f"tables-{tied}"
    if not folder.exists():
        tiny.write_family(folder, "llama", tied=tied)
    return load_model(folder, dtype, CPU)


def move(network, dtype=torch.float32):
    for module in host_tables(network, dtype).values():
        hold_in_host_memory(network, module, module.weight.detach().clone(), CPU)


def test_an_untied_table_can_be_moved_and_a_tied_one_cannot(made):
    assert list(host_tables(loaded(made).network, torch.float32)) == ["model.embed_tokens"]
    assert not host_tables(loaded(made, tied=True).network, torch.float32)


def test_a_small_table_is_not_moved(made, monkeypatch):
    network = loaded(made).network
    size = network.get_input_embeddings().weight.numel()
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(tables, "LEAST_BYTES", size * dtype.itemsize)
        assert host_tables(network, dtype)
        monkeypatch.setattr(tables, "LEAST_BYTES", size * dtype.itemsize + 1)
        assert not host_tables(network, dtype)


def test_a_table_that_lookups_modify_is_not_moved():
    assert not host_tables(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), torch.float32)


def test_tables_are_not_moved_on_a_cpu(made):
    network = loaded(made).network
    keep_in_host_memory(network, torch.float32)
    assert "model.embed_tokens.weight" in dict(network.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_bit_identical(made, dtype):
    def run(moved):
        model = loaded(made, dtype=dtype)
        new_adapter(model, ("*",), AdapterShape(4, 8.0), "normal", 0.0, 0)
        if moved:
            move(model.network, dtype)
        logits = model.network.train()(input_ids=IDS, use_cache=False).logits
        logits.float().square().mean().backward()
        return [logits, *(layer.lora_b.grad for layer in model.adapted().values())]

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


def test_a_table_in_host_memory_is_not_a_parameter_and_stays_there(made):
    model = loaded(made)
    table = model.network.get_input_embeddings().weight
    move(model.network)
    assert [name for name, held in model.network.named_parameters() if held.shape == table.shape] == ["lm_head.weight"]
    held = model.network.get_input_embeddings().weight
    model.network.to("meta")
    assert model.network.get_input_embeddings().weight is held
    assert torch.equal(held, table)


def test_a_subclass_still_postprocesses_the_rows():
    network = nn.Sequential(Gemma3TextScaledWordEmbedding(50, 8, 0, embed_scale=3.0))
    expected = network(IDS % 50)
    hold_in_host_memory(network, network[0], network[0].weight.detach().clone(), CPU)
    assert "weight" not in network[0]._parameters
    assert torch.equal(network(IDS % 50), expected)
    assert isinstance(network[0], Gemma3TextScaledWordEmbedding)


def test_rows_of_a_table_in_host_memory_can_be_trained(made):
    def run(moved):
        model = loaded(made)
        new_adapter(model, ("q_proj",), AdapterShape(4, 8.0), "normal", 0.0, 0)
        train_rows(model, "model.embed_tokens", [3, int(IDS[0, 0])])
        if moved:
            move(model.network)
            assert "weight" not in model.network.get_input_embeddings()._parameters
        logits = model.network.train()(input_ids=IDS, use_cache=False).logits
        logits.square().mean().backward()
        return logits, model.rows["model.embed_tokens"].rows.grad

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)
        assert two.any()


@pytest.mark.parametrize("trained", [True, False])
def test_only_a_frozen_table_is_moved(made, monkeypatch, trained):
    from adaptkit.training.fast import tables as moving

    monkeypatch.setattr(moving, "has_triton", lambda device_type: True)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda table, device, pin_memory: empty_like(table))  # needs no GPU
    model = loaded(made)
    if trained:
        train_whole(model, ["model.embed_tokens.weight"])
    keep_in_host_memory(model.network, torch.float32)
    assert ("model.embed_tokens.weight" in model.whole) == trained
    assert model.network.get_input_embeddings().weight.requires_grad == trained
    assert ("rows_device" in vars(model.network.get_input_embeddings())) != trained


def test_a_table_is_not_moved_if_host_memory_cannot_be_pinned(made, monkeypatch):
    from adaptkit.training.fast import tables as moving

    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(moving, "has_triton", lambda device_type: True)
    monkeypatch.setattr(torch, "empty_like", refuse)
    model = loaded(made)
    keep_in_host_memory(model.network, torch.float32)
    assert "model.embed_tokens.weight" in dict(model.network.named_parameters())
