"""Packed weights stored one after the other are decoded by one launch, to the bits that each gives alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.numerics.absmax import dynamic_map
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.kernels.codebook import FP4, NF4

BOOKS = {"nf4": NF4, "fp4": FP4}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = dynamic_map()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["nf4", "fp4"]), st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.sampled_from([32, 64, 4096]), st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_consecutive_packed_weights_decode_to_the_bits_of_each_alone(
    triton_kernel, name, parts, block_size, dtype, seed
):
    generator, parts = torch.Generator().manual_seed(seed), [min(blocks, 1024 * 64 // block_size) for blocks in parts]
    groups, expected, found = [-(-blocks // 256) for blocks in parts], [], []
    for blocks, nests in zip(parts, groups, strict=True):
        codes = torch.randint(0, 256, (blocks * block_size // 2,), generator=generator, dtype=torch.uint8)
        small = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        nested, offset = (torch.rand(size, generator=generator) * 0.1 for size in (nests, 1))
        absmax = reference.decode_constants(small, nested, float(offset), LEVELS)
        expected.append(reference.decode_4bit(codes, absmax, blocks * block_size, block_size, BOOKS[name], dtype))
        found.append((codes, small, nested, offset))
    codes, *constants = (torch.cat(side) for side in zip(*found, strict=True))
    places = torch.tensor([[sum(side[:index]) for index in range(len(parts))] for side in (parts, groups)])
    arguments = (*constants, places, LEVELS), sum(parts) * block_size, block_size, BOOKS[name], dtype
    found = triton_kernel("decode_parts_4bit", codes, *arguments)
    assert torch.equal(found.view(torch.uint8), torch.cat(expected).view(torch.uint8))
