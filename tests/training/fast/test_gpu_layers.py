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


def rotated(x, cos, sin):
    """As transformers computes it: (batch, tokens, heads, dim)."""
    half = x.shape[-1] // 2
    return x * cos[:, :, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, :, None]


@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize("dim", [2, 12, 64])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (9, 3), (1, 1), (70, 5)])
def test_rotations_and_their_gradients_match_torch_bit_for_bit(triton_kernel, heads, key_heads, dim, angles):
    """Queries and keys are column slices of one matrix, as joined layers pass them."""
    generator = torch.Generator().manual_seed(heads + dim)
    row = torch.randn(2, 5, (heads + key_heads) * dim + 3, generator=generator)
    query, key = (side.unflatten(-1, (-1, dim)) for side in row.split([heads * dim, key_heads * dim, 3], -1)[:2])
    cos, sin = (torch.randn(angles, 5, dim, generator=generator) for _ in range(2))
    leaves = [side.clone().requires_grad_() for side in (query, key)]
    expected = [rotated(side, cos, sin) for side in leaves]
    found = triton_kernel("rotate", query, key, cos, sin, False)
    assert all(one.is_contiguous() and torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    torch.autograd.backward(expected, [query, key])
    back = triton_kernel("rotate", query, key, cos, sin, True)
    assert all(torch.equal(one, leaf.grad) for one, leaf in zip(back, leaves, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_in_sixteen_bits_are_near_those_in_float64(triton_kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 7, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    angles = torch.rand(1, 7, 4, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for one, side in zip(triton_kernel("rotate", query, key, cos, sin, False), (query, key), strict=True):
        expected = rotated(side.double(), cos.double(), sin.double())
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=3 * ERROR[dtype] * float(side.abs().max()))


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


@pytest.mark.parametrize("back", [False, True])
def test_rotation_writes_sixteen_bytes_at_a_time(back, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = gpu_layers._rotary.arg_names
    tensors, sizes, static = names[:6], names[6:9], names[9:]
    values = [32, 4, 128, 64, 32, back]
    source = ASTSource(
        fn=gpu_layers._rotary,
        signature=dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "i32") | dict.fromkeys(static, "constexpr"),
        constexprs={(9 + place,): value for place, value in enumerate(values)},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(8)},
    )
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}
    assert "fma.rn.f32" not in ptx


def test_rotation_is_not_recompiled_for_batches_of_a_different_length():
    """By default, Triton compiles again for an argument that is 1 or a multiple of 16."""
    told = {parameter.name for parameter in gpu_layers._rotary.params if parameter.do_not_specialize}
    assert told == {"angles"}
