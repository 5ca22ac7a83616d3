"""The GPU's cross-entropy matches torch's in float64, and its gradient overwrites the logits."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from adaptkit.training.fast import gpu_entropy

GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
@pytest.mark.parametrize("columns", [2, 4096, 9001])
def test_loss_and_gradient_match_torch(triton_kernel, dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(5, columns, generator=generator) * 8).to(dtype)
    wanted = torch.randint(0, columns, (5,), generator=generator)
    logits[0, 0], wanted[0] = -torch.inf, 1
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, wanted, reduction="sum")
    expected.backward()
    loss, left = triton_kernel("cross_entropy", logits.clone(), wanted, False)
    assert torch.equal(left, logits)
    again, gradient = triton_kernel("cross_entropy", logits.clone(), wanted, True)
    assert float(loss) == float(again) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=0, atol=GRADIENT_ERROR[dtype])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_give_a_loss_of_nan(triton_kernel, bad):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = bad
    assert torch.isnan(triton_kernel("cross_entropy", logits, torch.tensor([1, 2, 3]), True)[0])


@pytest.mark.parametrize("kind", ["*bf16", "*fp32", "*fp16"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_gpu_reads_and_overwrites_rows_sixteen_bytes_at_a_time(kind, keep, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    static = {"columns": 32000, "keep": keep, "chunk": 4096}
    signature = {"logits": kind, "wanted": "*i64", "losses": "*fp32"} | dict.fromkeys(static, "constexpr")
    source = ASTSource(
        fn=gpu_entropy._row,
        signature=signature,
        constexprs={(3 + place,): value for place, value in enumerate(static.values())},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(3)},
    )
    options = {"num_warps": 8, "enable_fp_fusion": True}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert bool(re.search(r"st\.global\.v4", ptx)) == keep
