"""The GPU's gate and its gradients match torch's in float64, rounded once; its rotations match torch's bits."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from adaptkit.training.fast import gpu_layers

ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest."""


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 411)])
def test_gate_and_gradients_match_torch(triton_kernel, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(shape, generator=generator).mul(6).to(dtype) for _ in range(3))
    wide = [side.double().requires_grad_() for side in (gate, up)]
    expected = torch.nn.functional.silu(wide[0]) * wide[1]
    expected.backward(grad.double())
    found = triton_kernel("gate_forward", gate, up), *triton_kernel("gate_backward", gate, up, grad)
    x, share = wide[0].detach(), torch.sigmoid(wide[0].detach())
    # The gate's gradient has the factor 1 + x (1 - share), which may be near zero although its terms are not.
    terms = (grad.double() * wide[1].detach() * share).abs() * (1 + (x * (1 - share)).abs())
    results = expected.detach(), wide[0].grad, wide[1].grad
    for one, two, size in zip(found, results, (results[0].abs(), terms, results[2].abs()), strict=True):
        assert one.dtype == dtype
        assert bool(((one.double() - two).abs() <= ERROR[dtype] * size + 1e-6).all())


def test_far_from_zero_the_gate_gives_zero_or_the_product(triton_kernel):
    gate, up = torch.tensor([-1e4, 1e4, -100.0, 0.0]), torch.full((4,), 2.0)
    assert triton_kernel("gate_forward", gate, up).tolist() == [0.0, 2e4, 0.0, 0.0]
    by_gate, by_up = triton_kernel("gate_backward", gate, up, torch.ones(4))
    assert by_gate.tolist() == [0.0, 2.0, 0.0, 1.0]
    assert by_up.tolist() == [0.0, 1e4, 0.0, 0.0]


def test_column_slices_of_a_matrix_are_read_and_overwritten_in_place(triton_kernel):
    """Joined layers pass such slices, and expect gradients of the same layout."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 5, 1500, generator=generator)
    gate, up, grad = both[..., :700], both[..., 700:1400], torch.randn(2, 5, 700, generator=generator)
    apart = gate.contiguous(), up.contiguous()
    assert torch.equal(triton_kernel("gate_forward", gate, up), triton_kernel("gate_forward", *apart))
    pairs = triton_kernel("gate_backward", gate, up, grad), triton_kernel("gate_backward", *apart, grad)
    assert all(torch.equal(one, two) for one, two in zip(*pairs, strict=True))
    for side, first in zip(pairs[0], (0, 700), strict=True):
        assert (side.stride(), side.storage_offset()) == (both.stride(), first)
        rest = torch.as_strided(side, (2, 5, 100), both.stride(), 1400)
        assert torch.equal(rest, both[..., 1400:])


@pytest.mark.parametrize("dtype", ERROR)
def test_look_up_returns_the_rows_of_the_table(triton_kernel, dtype):
    table = torch.randn(50, 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ids in (torch.tensor([[3, 49, 0], [3, 7, 12]]), torch.tensor([4], dtype=torch.int32), torch.empty(0, 5).long()):
        found = triton_kernel("look_up", table, ids)
        assert torch.equal(found, table[ids.long()])


def test_look_up_returns_nan_for_ids_out_of_range(triton_kernel):
    """torch would abort the kernel; here nothing outside the table is read."""
    found = triton_kernel("look_up", torch.ones(50, 8), torch.tensor([-1, 50, 2**40, 49]))
    assert found.isnan().all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("kernel", [gpu_layers._gate, gpu_layers._gate_gradients])
def test_gate_kernels_read_and_write_sixteen_bytes_at_a_time(kernel, monkeypatch, tmp_path):
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


def test_look_up_reads_and_writes_sixteen_bytes_at_a_time(monkeypatch, tmp_path):
    """This matters also for a table in host memory, which is read over the bus."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    types = {
        "table": "*bf16",
        "numbers": "*i64",
        "rows": "*bf16",
        "entries": "i32",
        "width": "i32",
        "block": "constexpr",
    }
    source = ASTSource(
        fn=gpu_layers._look_up,
        signature=types,
        constexprs={(5,): 1024},
        attrs={(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 4)},
    )
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}
    assert "ld.global.v4.b32" in ptx
