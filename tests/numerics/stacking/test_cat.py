"""Concatenation is exact, except that B is rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import dense, term

from adaptkit.discovery import load, names
from adaptkit.numerics import stacking
from adaptkit.numerics.stacking._method import NoOptions

CAT = load(stacking, "cat", "METHOD")
SHAPE = (7, 11)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3), st.integers(0, 99)), min_size=1, max_size=4))
def test_the_result_is_the_sum_up_to_one_rounding_of_b(parts):
    terms = [term(*SHAPE, *part) for part in parts]
    stacked = CAT.combine(terms, NoOptions(), "m")
    assert stacked.rank == sum(change.rank for change in terms)
    assert stacked.scaling == 1.0
    exact = sum(dense(change) for change in terms)
    size = sum(abs(change.scaling) * (change.lora_b.double().abs() @ change.lora_a.double().abs()) for change in terms)
    error = (stacked.lora_b.double() @ stacked.lora_a.double() - exact).abs()
    assert (error <= 2.0**-24 * size + 1e-40).all()


def test_ranks_are_in_the_order_of_the_adapters():
    terms = [term(*SHAPE, 2, 0.5, 1), term(*SHAPE, 3, 2.0, 2)]
    stacked = CAT.combine(terms, NoOptions(), "m")
    assert torch.equal(stacked.lora_a, torch.cat([terms[0].lora_a, terms[1].lora_a]))
    assert torch.equal(stacked.lora_b[:, :2], terms[0].lora_b * 0.5)
    assert torch.equal(stacked.lora_b[:, 2:], terms[1].lora_b * 2.0)


@pytest.mark.parametrize("name", names(stacking))
def test_every_method_names_its_source(name):
    assert "arXiv" in load(stacking, name, "METHOD").source
