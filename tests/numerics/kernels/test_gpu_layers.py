"""A GPU's gate and its gradients are those of torch in float64, rounded once."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from adaptkit.numerics.kernels import _gpu_layers

ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""Triton's interpreter cuts digits of bfloat16 off, where a GPU rounds to the nearest."""


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 411)])
def test_gate_and_gradients_are_those_of_torch(triton_kernel, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(shape, generator=generator).mul(6).to(dtype) for _ in range(3))
    wide = [side.double().requires_grad_() for side in (gate, up)]
    expected = torch.nn.functional.silu(wide[0]) * wide[1]
    expected.backward(grad.double())
    found = triton_kernel("gate_forward", gate, up), *triton_kernel("gate_backward", gate, up, grad)
    for one, two in zip(found, (expected.detach(), wide[0].grad, wide[1].grad), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), two, rtol=ERROR[dtype], atol=1e-6)


def test_far_from_zero_it_is_zero_or_the_product(triton_kernel):
    gate, up = torch.tensor([-1e4, 1e4, -100.0, 0.0]), torch.full((4,), 2.0)
    assert triton_kernel("gate_forward", gate, up).tolist() == [0.0, 2e4, 0.0, 0.0]
    by_gate, by_up = triton_kernel("gate_backward", gate, up, torch.ones(4))
    assert by_gate.tolist() == [0.0, 2.0, 0.0, 1.0]
    assert by_up.tolist() == [0.0, 1e4, 0.0, 0.0]


def test_columns_of_one_matrix_are_read_and_written_where_they_lie(triton_kernel):
    """As joined layers give them, and want their gradients."""
    both = torch.randn(2, 5, 1500, generator=torch.Generator().manual_seed(0))
    gate, up, grad = both[..., :700], both[..., 700:1400], torch.randn(2, 5, 700)
    apart = gate.contiguous(), up.contiguous()
    assert torch.equal(triton_kernel("gate_forward", gate, up), triton_kernel("gate_forward", *apart))
    pairs = triton_kernel("gate_backward", gate, up, grad), triton_kernel("gate_backward", *apart, grad)
    assert all(torch.equal(one, two) for one, two in zip(*pairs, strict=True))
    for side, first in zip(pairs[0], (0, 700), strict=True):
        assert (side.stride(), side.storage_offset()) == (both.stride(), first)
        rest = torch.as_strided(side, (2, 5, 100), both.stride(), 1400)
        assert torch.equal(rest, both[..., 1400:])


@pytest.mark.parametrize("kernel", [_gpu_layers._gate, _gpu_layers._gate_gradients])
def test_a_gpu_reads_and_writes_sixteen_bytes_at_a_time(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    *tensors, gate_stride, up_stride, width, chunk = kernel.arg_names
    sizes = dict.fromkeys((gate_stride, up_stride, width), "i32")
    source = ASTSource(
        fn=kernel,
        signature=dict.fromkeys(tensors, "*bf16") | sizes | {chunk: "constexpr"},
        constexprs={(len(tensors) + 3,): 1024},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(tensors) + 3)},
    )
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    assert set(re.findall(r"(?:ld|st)\.global\S*", ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert "cvt.rn.bf16" in ptx
