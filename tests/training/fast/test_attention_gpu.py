"""What a GPU computes for packed rows and shared key heads is attention's formula, without a matrix of scores."""

import pytest
import torch
from attention_formula import formula
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adaptkit.training.fast import attention_gpu
from adaptkit.training.fast.attention_gpu import attend_on_gpu
from adaptkit.training.fast.attention_spans import packed_lengths


def packed(*rows):
    """Return the mask of samples of these lengths in each row, built from the number of each token's sample."""
    number = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    return ((number[:, :, None] == number[:, None]) & torch.ones(2 * number.shape[1:], dtype=torch.bool).tril())[
        :, None
    ]


@pytest.fixture
def calls(monkeypatch):
    """Return a list that gets each call of torch's attention."""
    made, original = [], functional.scaled_dot_product_attention

    def recorded(*sides, **options):
        made.append((sides, options))
        return original(*sides, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    return made


ROWS = {
    "one sample": [(40,)],
    "two rows": [(10, 30), (25, 15)],
    "padding": [(30, *[1] * 10), (40,)],
    "only single tokens": [(1,) * 9],
    "single tokens between": [(1, 12, 1, 1, 20, 1)],
}


@pytest.mark.parametrize(("heads", "key_heads", "dim", "value_dim"), [(4, 4, 16, 16), (6, 2, 8, 8), (3, 1, 32, 24)])
@pytest.mark.parametrize("name", ROWS)
def test_result_and_gradients_agree_with_the_formula(name, heads, key_heads, dim, value_dim, calls, monkeypatch):
    monkeypatch.setattr(attention_gpu, "_TOKENS_APART", 6)
    rows, mask = ROWS[name], packed(*ROWS[name])
    generator = torch.Generator().manual_seed(1)
    sizes = [(len(rows), count, mask.shape[-1], width) for count, width in ((heads, dim), (key_heads, dim))]
    sizes.append((len(rows), key_heads, mask.shape[-1], value_dim))
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, wanted = attend_on_gpu(*inputs, 0.3, mask), formula(*doubles, 0.3, mask)
    torch.testing.assert_close(found, wanted.float(), rtol=2e-6, atol=2e-6)
    weights = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, inputs, weights, materialize_grads=True)
    for one, other in zip(gradients, torch.autograd.grad(wanted, doubles, weights.double()), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)
    assert [sides[0].shape[2] for sides, _ in calls] == [length for row in rows for length in row if length > 1]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "key_heads", "dim", "value_dim", "is_shared"),
    [
        (torch.bfloat16, 2, 16, 16, True),
        (torch.bfloat16, 4, 16, 16, False),
        (torch.float32, 2, 16, 16, False),
        (torch.bfloat16, 2, 16, 24, False),
        (torch.bfloat16, 2, 208, 208, False),
        (torch.bfloat16, 2, 256, 256, True),
        (torch.bfloat16, 2, 264, 264, False),
    ],
)
def test_only_flash_attention_gets_shared_key_heads_and_no_kernel_gets_a_mask(
    dtype, key_heads, dim, value_dim, is_shared, is_packed, calls
):
    """With either, torch would fall back to matrices of scores, which grow with the square of the length."""
    sizes = (1, 4, 300, dim), (1, key_heads, 300, dim), (1, key_heads, 300, value_dim)
    inputs = [torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype) for size in sizes]
    found = attend_on_gpu(*inputs, 0.3, packed((140, 160)) if is_packed else None)
    mask = packed((140, 160) if is_packed else (300,))
    wanted = formula(*(side.double() for side in inputs), 0.3, mask)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
    for sides, options in calls:
        assert options == {"is_causal": True, "scale": 0.3, "enable_gqa": is_shared}
        assert [side.shape[1] for side in sides] == ([4, 2, 2] if is_shared else [4, 4, 4])
    assert len(calls) == 1 + is_packed


@pytest.mark.parametrize(
    "mask",
    [
        packed((60, 70, 130)),
        packed((300,)) & ~packed((300,)).tril(-90),
        torch.ones(1, 1, 300, 300, dtype=torch.bool),
        torch.zeros(1, 1, 300, 300, dtype=torch.bool),
        packed((300,))[:, :, :, :280],
    ],
    ids=["short samples", "window", "later tokens", "nothing", "fewer keys"],
)
def test_other_masks_are_left_to_torch(mask, calls):
    sides = [torch.zeros(1, 2, length, 8) for length in (mask.shape[2], mask.shape[3], mask.shape[3])]
    assert attend_on_gpu(*sides, 0.3, mask) is None
    assert not calls


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_lengths_of_samples_are_found(rows):
    longest = max(map(sum, rows))
    filled = [(*row, *[1] * (longest - sum(row))) for row in rows]
    assert packed_lengths(packed(*filled)) == tuple(filled)


@settings(max_examples=200)
@given(st.integers(2, 6), st.data())
def test_one_other_token_makes_it_another_mask(tokens, data):
    """Change one element of a mask of samples: the result describes the changed mask, or is None."""
    rows = data.draw(st.sampled_from([(tokens,), (1, tokens - 1), (tokens - 1, 1), (1,) * tokens]))
    mask = packed(rows)
    query, key = (data.draw(st.integers(0, tokens - 1)) for _ in range(2))
    mask[0, 0, query, key] ^= True
    found = packed_lengths(mask)
    assert found is None or torch.equal(packed(*found), mask)


def test_a_later_token_instead_of_an_earlier_one_is_no_sample():
    mask = packed((6,))
    mask[0, 0, 3, 2], mask[0, 0, 3, 5] = False, True
    assert packed_lengths(mask) is None


def test_a_mask_that_changes_in_place_is_read_again():
    mask = packed((8,))
    assert packed_lengths(mask) == ((8,),)
    assert packed_lengths(mask) is packed_lengths(mask)
    mask[:, :, 4:, :4] = False
    assert packed_lengths(mask) == ((4, 4),)
