"""On a GPU blocks decode to the bits that they decode to on a CPU."""

from dataclasses import replace

import pytest
import torch
from packing import decode, encode

from adaptkit.formats._format import Encoding
from adaptkit.numerics.absmax import GROUP
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training.network.decode import NestedConstants, decode_constants

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

BLOCKWISE = ["nf4", "fp4"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("count", [1, 255, 256, 100_001])
def test_nested_constants_do_not_depend_on_the_device(count):
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    nested, levels = torch.rand(-(-count // GROUP), generator=generator), torch.rand(256, generator=generator)
    expected = decode_constants(NestedConstants(codes, nested, 0.37), levels)
    found = decode_constants(NestedConstants(codes.cuda(), nested.cuda(), 0.37), levels.cuda())
    assert torch.equal(found.cpu(), expected)


def on_a_gpu(weight):
    constants = weight.constants
    if isinstance(constants, NestedConstants):
        constants = NestedConstants(constants.codes.cuda(), constants.nested_absmax.cuda(), constants.offset)
    else:
        constants = constants.cuda()
    return replace(weight, codes=weight.codes.cuda(), constants=constants, levels=weight.levels.cuda())


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "scale"), [((64, 128), 1.0), ((300, 4096), 0.02), ((7, 33), 1e-6), ((64, 64), 1e-37)]
)
def test_a_packed_weight_is_the_same_on_both_devices(name, double_quant, dtype, shape, scale):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    stated = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    parts = encode(TensorSpec("x.weight", stated, shape), weight, Encoding(name, 64, double_quant))
    parts = {suffix.removeprefix("x.weight"): part for suffix, part in parts.items()}
    here = decode("x.weight", parts)
    there = on_a_gpu(here)
    for target in DTYPES:
        again = there.dequantize(target).cpu()
        assert torch.equal(again.view(INTS[target]), here.dequantize(target).view(INTS[target]))
