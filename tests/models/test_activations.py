"""Activations are measured as the memory that stays alive; policies and budgets follow the documented formulas."""

import pytest
import torch
from torch import nn

from adaptkit.errors import ConfigError, UsageError
from adaptkit.models.activations import (
    Alive,
    Checkpointing,
    LayerSize,
    fit_budget,
    fit_memory,
    kind_of,
    measure_layers,
    parse_policy,
)
from adaptkit.models.casting import hold

MIB = 1 << 20


@pytest.mark.parametrize(
    ("policy", "length", "whole"),
    [("none", 1, 30), ("layer", 1, 0), ("auto", 1, 0), ("sqrt", 5, 0), ("segments:4", 8, 0), ("segments:40", 1, 0)],
)
def test_policies_are_parsed(policy, length, whole):
    assert parse_policy(policy, 30) == Checkpointing(30, length, whole)
    assert parse_policy("budget:12", 30) == 12 * MIB


@pytest.mark.parametrize(
    "policy", ["", "segments:0", "segments:²", "segments:x", "layers", "segments", "budget", "budget:0", "budget:1.5"]
)
def test_invalid_policies_are_refused(policy):
    with pytest.raises(ConfigError, match="sqrt, segments:K or budget:MIB"):
        parse_policy(policy, 30)


@pytest.mark.parametrize(
    ("checkpointing", "said"),
    [
        (Checkpointing(0, 1), "no layers to checkpoint"),
        (Checkpointing(1, 1, 1), "0 of 1 layer checkpointed"),
        (Checkpointing(6, 1, 6), "0 of 6 layers checkpointed"),
        (Checkpointing(6, 1), "6 of 6 layers checkpointed"),
        (Checkpointing(6, 1, 1), "the first 5 of 6 layers checkpointed"),
        (Checkpointing(6, 1, 2), "the first 4 of 6 layers checkpointed"),
        (Checkpointing(6, 3), "6 of 6 layers checkpointed in segments of 3"),
    ],
)
def test_a_checkpointing_is_described_in_words(checkpointing, said):
    assert str(checkpointing) == said


def sizes(count=16, h=1, a=20, w=5):
    return [LayerSize(h * MIB, a * MIB, (a + w) * MIB)] * count


@pytest.mark.parametrize(
    ("checkpointing", "expected"),
    [
        (Checkpointing(16, 1, 16), 16 * 21 + 5),
        (Checkpointing(16, 1), 16 + 25),
        (Checkpointing(16, 4), 4 + 3 + 25),
        (Checkpointing(16, 16), 1 + 15 + 25),
        (Checkpointing(16, 1, 1), 15 + max(21 + 5, 25)),
        (Checkpointing(16, 1, 8), 8 + 8 * 21 + 5),
    ],
)
def test_the_peak_is_the_sum_of_what_is_alive_at_once(checkpointing, expected):
    assert checkpointing.bytes_needed(sizes()) == expected * MIB


def test_offloading_leaves_two_inputs_of_segments_on_the_device():
    assert Checkpointing(16, 1).bytes_needed(sizes(), offloaded=True) == (2 + 25) * MIB


def test_recomputation_is_counted_in_forward_passes():
    assert Checkpointing(16, 1, 16).recomputed == 0
    assert Checkpointing(16, 1).recomputed == 1
    assert Checkpointing(16, 4).recomputed == 1 + 12 / 16
    assert Checkpointing(16, 1, 4).recomputed == 0.75


def test_a_budget_is_used_to_recompute_as_little_as_possible():
    seen = []
    for budget in range(32, 345):
        found = fit_budget(budget * MIB, sizes())
        assert found.bytes_needed(sizes()) <= budget * MIB
        seen.append(found.recomputed)
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (1.75, 0)
    assert fit_budget(341 * MIB, sizes()) == Checkpointing(16, 1, 16)
    assert fit_budget(42 * MIB, sizes()).whole == 1
    assert fit_budget(40 * MIB, sizes()).length > 1


def test_where_memory_is_too_small_the_checkpointing_that_needs_least_is_chosen():
    assert fit_memory(0, sizes()) == fit_memory(32 * MIB, sizes()) == fit_budget(32 * MIB, sizes())
    assert fit_memory(1 << 40, sizes()).recomputed == 0


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_suffices():
    with pytest.raises(
        UsageError,
        match=r"budget:31 is not enough: .* at least 32 MiB \(16 of 16 layers checkpointed in segments of 4\)",
    ) as caught:
        fit_budget(31 * MIB, sizes())
    assert "budget:32" in caught.value.hint


class Layer(nn.Module):
    """Saves x for the weight's gradient, and the product for the square's; also makes a temporary matrix."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))

    def forward(self, x, mask):
        return (x @ self.weight).square() + mask


def test_layers_are_measured_by_what_stays_alive():
    layers, mask, x = [Layer(64) for _ in range(3)], torch.zeros(64), torch.zeros(1024, 64)
    ran = []

    def call():
        hidden = x
        for layer in layers:
            ran.append(layer)
            hidden = layer(hidden, mask)

    found = measure_layers(layers, call)
    one = 1024 * 64 * 4
    assert len(found) == 3
    assert len(set(found)) == len(ran) == 1, "layers of one kind are measured once"
    assert (found[0].input_bytes, found[0].kept_bytes) == (one, one)
    assert 4 * one <= found[0].peak_bytes <= 6 * one  # output, its gradient, the product, its gradient, 2 x, …
    assert all(layer.weight.grad is None and "forward" not in vars(layer) for layer in layers)
    wider = measure_layers([layers[0], Layer(64)], lambda: layers[0](x[:1].clone(), mask))
    assert wider[1] == wider[0] == LayerSize(256, 256, wider[0].peak_bytes)


def test_the_gradient_of_a_trained_weight_is_counted_once():
    """As in a run: each gradient is added to another tensor and freed before the next one is computed."""
    layers = [nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(3)]) for _ in range(2)]
    frozen, trained = layers
    frozen.requires_grad_(False)

    def call():
        hidden = torch.zeros(2, 512)
        for layer in layers:
            hidden = layer(hidden)

    few, many = measure_layers(layers, call)
    of_one = trained[0].weight.nbytes
    assert few.peak_bytes < of_one / 10
    assert of_one <= many.peak_bytes < 1.1 * of_one
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_freed_memory_is_not_alive():
    with Alive() as alive:
        kept = torch.ones(1000)
        for _ in range(5):
            torch.ones(5000)
        view = kept[10:]
    assert alive.total() == 4000
    assert 24_000 <= alive.peak < 48_000
    del kept, view
    assert alive.total() == 0


def test_the_peak_includes_tensors_that_were_made_after_the_last_total():
    with Alive() as alive:
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(900, dtype=torch.uint8)
        assert (alive.total(), alive.peak) == (900, 1000)
        third = torch.empty(150, dtype=torch.uint8)
    assert alive.peak == second.nbytes + third.nbytes


def test_the_peak_of_very_many_tensors_is_approximately_right():
    with Alive() as alive:
        held = [torch.empty(16) for _ in range(2000)]
        del held[:1000]
        for _ in range(3000):
            torch.empty(16)
        held += [torch.empty(16) for _ in range(1500)]
        assert alive.total() == 2500 * 64
    assert 2500 * 64 * (1 - 2**-6) <= alive.peak <= 2501 * 64


def test_layers_that_do_not_run_are_an_error():
    network = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(UsageError, match="does not run all of its layers"):
        measure_layers(list(network), lambda: None)


def test_layers_whose_parameters_are_cast_are_of_one_kind_unless_they_differ():
    """A parametrized module is of a class of its own."""
    layers = [nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(2)] + [nn.Linear(4, 8, dtype=torch.bfloat16)]
    for layer in layers:
        hold(layer, "weight", nn.Parameter(layer.weight.detach().float()), torch.bfloat16)
    assert type(layers[0]) is not type(layers[1])
    assert kind_of(layers[0]) == kind_of(layers[1]) != kind_of(layers[2])
