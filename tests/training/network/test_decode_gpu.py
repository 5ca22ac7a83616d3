"""Triton and plain torch decode blocks to the bits of the definition, which the CPU's kernels give, too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_on_tensors import reference

from adaptkit.numerics.absmax import dynamic_levels
from adaptkit.numerics.kernels.codebook import FP4, NF4
from adaptkit.training.network.decode import Blocks, NestedConstants, constants_in_plain_torch, decode, in_plain_torch

BOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
LEVELS = torch.from_numpy(dynamic_levels())


def expected_weights(codes, absmax, count, block_size, book, dtype):
    return reference.decode_4bit(codes, absmax, count, block_size, book, dtype)


def random_codes(count, generator):
    return torch.randint(0, 256, ((count + 1) // 2,), generator=generator, dtype=torch.uint8)


def in_all_ways(triton_kernel, blocks, dtype):
    yield triton_kernel("by_triton", blocks, dtype)
    yield in_plain_torch(blocks, dtype)
    yield decode(blocks, dtype)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(BOOKS)), st.integers(1, 700), st.sampled_from([32, 64, 4096]), st.sampled_from(DTYPES),
    st.integers(0, 40), st.booleans(), st.sampled_from([1.0, 0.0, -0.0, 1e-45, -1e-39, 6e-8, 65519.0, 65520.0, 3e38]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_every_way_gives_the_bits_of_the_definition(
    triton_kernel, name, blocks, block_size, dtype, less, nested, unusual, seed
):
    generator, blocks = torch.Generator().manual_seed(seed), min(blocks, 2048 * 64 // block_size)
    count = blocks * block_size - less % 32
    codes = random_codes(count, generator)
    if nested:
        small = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        constants = NestedConstants(small, torch.rand(-(-blocks // 256), generator=generator) * 0.1, 0.0371)
        absmax = reference.decode_constants(small, constants.nested_absmax, constants.offset, LEVELS)
        assert torch.equal(constants_in_plain_torch(constants, LEVELS), absmax)
        found = triton_kernel("decode_constants", small, constants.nested_absmax, constants.offset, LEVELS)
        assert torch.equal(found, absmax)
    else:  # constants as files of other tools may have them
        constants = absmax = torch.randn(blocks, generator=generator) * 0.1
        absmax[::3] = unusual
    expected = expected_weights(codes, absmax, count, block_size, BOOKS[name], dtype)
    for found in in_all_ways(triton_kernel, Blocks(codes, constants, LEVELS, count, block_size, BOOKS[name]), dtype):
        assert found.dtype == dtype
        assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1])
def test_a_non_finite_constant_decodes_to_non_finite_weights(triton_kernel, name, bits):
    absmax = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    codes = torch.arange(32, dtype=torch.uint8)
    for dtype in DTYPES:
        expected = expected_weights(codes, absmax, 64, 64, BOOKS[name], dtype)
        for found in in_all_ways(triton_kernel, Blocks(codes, absmax, LEVELS, 64, 64, BOOKS[name]), dtype):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
