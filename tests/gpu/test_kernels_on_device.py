"""On a GPU every format gives the bytes that it gives on a CPU."""

import pytest
import torch
from packing import decode, encode

from adaptkit.formats._format import Encoding, writable
from adaptkit.numerics.absmax import DoubleQuantized, dequantize_absmax, quantize_absmax
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.spec import TensorSpec
from adaptkit.triton_needs import what_triton_lacks

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

FORMATS = {name: Encoding(name).codec for name in writable()}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.mark.skipif(bool(what_triton_lacks()), reason="needs Triton")
def test_a_gpu_uses_the_triton_kernels():
    assert kernels_for(torch.device("cuda")).__name__.endswith(".gpu")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "scale"),
    [(count, 0.02) for count in (1, 63, 64, 65, 1_000_003)]
    + [(4096 * 16, scale) for scale in (1.0, 1e-6, 1e-37, 1e-39)],
)
def test_bytes_do_not_depend_on_the_device(name, dtype, scale, count):
    weight = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale).to(dtype)
    weight[64:128] = 0
    codes, absmax, moments = FORMATS[name].quantize(weight, 64, measure=True)
    found = FORMATS[name].quantize(weight.cuda(), 64, measure=True)
    assert torch.equal(found[0].cpu(), codes)
    assert torch.equal(found[1].cpu(), absmax)
    torch.testing.assert_close(found[2].cpu(), moments, rtol=2e-7, atol=0)
    for target in DTYPES:
        back = FORMATS[name].dequantize(codes, absmax, count, 64, target)
        again = FORMATS[name].dequantize(*found[:2], count, 64, target)
        assert torch.equal(again.cpu().view(INTS[target]), back.view(INTS[target]))


@pytest.mark.parametrize("count", [1, 255, 256, 100_001])
def test_double_quantized_constants_do_not_depend_on_the_device(count):
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(count))
    absmax[::97] *= 100
    expected, found = quantize_absmax(absmax), quantize_absmax(absmax.cuda())
    assert torch.equal(found.codes.cpu(), expected.codes)
    assert torch.equal(found.nested_absmax.cpu(), expected.nested_absmax)
    assert found.offset == expected.offset
    on_device = DoubleQuantized(expected.codes.cuda(), expected.nested_absmax.cuda(), expected.offset)
    assert torch.equal(dequantize_absmax(on_device).cpu(), dequantize_absmax(expected))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (300, 4096), (7, 33)])
def test_a_packed_weight_is_the_same_on_both_devices(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    parts = encode(TensorSpec("x.weight", "BF16", shape), weight, Encoding(name, 64, True))
    parts = {suffix.removeprefix("x.weight"): part for suffix, part in parts.items()}
    here = decode("x.weight", parts)
    moved = {suffix: part if "state" in suffix else part.cuda() for suffix, part in parts.items()}
    there = decode("x.weight", moved)
    for target in DTYPES:
        assert torch.equal(
            there.dequantize(target).cpu().view(INTS[target]), here.dequantize(target).view(INTS[target])
        )
