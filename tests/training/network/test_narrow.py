"""16-bit copies of the adapter equal casting it at each use, also after it changed."""

import pytest
import tiny
import torch
from adapted import IDS, load_adapted, logits_and_gradients

from adaptkit.training import preparation
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory.activations import layer_sizes
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.joined_gpu import join_on_gpu
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.narrow import keep_narrow, narrowed, narrowed_below

BFLOAT16 = torch.bfloat16


def loaded(packed, dora=False):
    return load_adapted(packed, BFLOAT16, dora=dora, rank_pattern={"q_proj": 3, "down_proj": 5})


@pytest.mark.parametrize("dora", [False, True])
def test_results_and_gradients_are_bit_identical_after_every_update(packed, dora):
    one, two = (loaded(packed, dora=dora) for _ in range(2))
    join_on_gpu(one.network)
    keep_narrow(two.network, BFLOAT16, join_on_gpu(two.network))
    vectors = [Trainable.of(model).values for model in (one, two)]  # which moves the parameters
    for _ in range(3):
        found = [logits_and_gradients(model.network) for model in (one, two)]
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        for vector in vectors:
            vector.mul_(1.1).add_(0.001)


def test_layers_do_not_cast_the_adapter(packed, monkeypatch):
    model = loaded(packed)
    keep_narrow(model.network, BFLOAT16, join_on_gpu(model.network))
    halves = {p.data_ptr() for p in model.network.parameters() if p.requires_grad}
    casts, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda t, *a, **k: (t.data_ptr() in halves and a[0] == BFLOAT16 and casts.append(t), to(t, *a, **k))[1],
    )
    logits_and_gradients(model.network)
    assert not casts


def test_copies_of_joined_layers_are_concatenated_along_rows(packed):
    model = loaded(packed)
    keep_narrow(model.network, BFLOAT16, join_on_gpu(model.network))
    halves = [model.linears[f"model.layers.1.self_attn.{name}_proj"].lora_a for name in "qkv"]
    below = narrowed_below(halves, BFLOAT16)
    assert below.shape == (11, 64)
    assert below.data_ptr() == narrowed(halves[0], BFLOAT16).data_ptr()
    assert torch.equal(below, torch.cat([half.detach() for half in halves]).to(BFLOAT16))
    for layer in model.adapted().values():
        for half in (layer.lora_a, layer.lora_b):
            assert torch.equal(narrowed(half, BFLOAT16), half.to(BFLOAT16))
            assert narrowed(half, torch.float32) is half


def test_copies_of_layers_that_are_not_joined_are_concatenated_on_request(packed):
    model = loaded(packed)
    keep_narrow(model.network, BFLOAT16)
    halves = [model.linears[f"model.layers.1.self_attn.{name}_proj"].lora_a for name in "kv"]
    assert torch.equal(narrowed_below(halves, BFLOAT16), torch.cat([half.detach() for half in halves]).to(BFLOAT16))


def test_copies_are_not_in_the_state_dict_and_not_made_for_float32(packed):
    model = loaded(packed)
    names = list(model.network.state_dict())
    keep_narrow(model.network, torch.float32)
    assert not hasattr(model.network, "narrow_adapters")
    keep_narrow(model.network, BFLOAT16)
    assert list(model.network.state_dict()) == names
    assert model.network.narrow_adapters.dtype == BFLOAT16


def test_copies_are_not_measured_as_activations_of_a_layer(packed):
    """They are counted once, with the weights; all layers use parts of one buffer."""
    one, two = (loaded(packed) for _ in range(2))
    join_on_gpu(one.network)
    keep_narrow(two.network, BFLOAT16, join_on_gpu(two.network))
    plain, narrow = (layer_sizes(model.network, (2, 17), torch.device("cpu")) for model in (one, two))
    assert [size.kept_bytes for size in narrow] == [size.kept_bytes for size in plain]
    assert all(less.peak_bytes <= more.peak_bytes for less, more in zip(narrow, plain, strict=True))


def test_copies_are_updated_whether_the_network_or_its_base_model_is_called(packed):
    from adaptkit.data.batches import Batch

    model = loaded(packed)
    keep_narrow(model.network, BFLOAT16)
    half = model.linears["model.layers.0.mlp.up_proj"].lora_b
    batch = Batch(IDS, IDS, torch.ones_like(IDS))
    calls = (lambda: summed_loss(model, batch), lambda: model.network(input_ids=IDS, use_cache=False))
    for call in calls:
        half.data.mul_(1.5)
        assert not torch.equal(narrowed(half, BFLOAT16), half.to(BFLOAT16))
        with torch.no_grad():
            call()
        assert torch.equal(narrowed(half, BFLOAT16), half.to(BFLOAT16))


def test_gradients_do_not_depend_on_checkpointing(packed):
    found = []
    for policy in ("none", "layer", "sqrt"):
        model = loaded(packed)
        keep_narrow(model.network, BFLOAT16, join_on_gpu(model.network))
        checkpoint_layers(model.network, choose_checkpointing(model.network, policy, None))
        model.network.train()(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
        found.append([parameter.grad for parameter in model.network.parameters() if parameter.requires_grad])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_run_with_copies_ends_with_the_same_bytes(packed, tmp_path, monkeypatch):
    data = tiny.write_instructions(tmp_path / "rows.jsonl", rows=8)
    config = TrainConfig(
        base=str(packed), data=(str(data),), steps=4, rank=4, max_length=64, device="cpu", save_every=2,
        compute_dtype="bfloat16", eval_every=2,
    )  # fmt: skip
    monkeypatch.setattr(preparation, "join_layers", join_on_gpu)
    plain = train(config, tmp_path / "plain")
    monkeypatch.setattr(
        preparation, "join_layers", lambda network: keep_narrow(network, BFLOAT16, join_on_gpu(network))
    )
    assert train(config, tmp_path / "narrow").tensors_root == plain.tensors_root
