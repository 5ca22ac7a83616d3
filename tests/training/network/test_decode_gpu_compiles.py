"""Triton kernels can be compiled for a GPU without having one, and their instructions checked."""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from adaptkit.training.network import decode_gpu

STATIC = {
    "decode_4bit": {"block": 64, "group": 32},
    "decode_nested_4bit": {"block": 64, "group": 32, "nest": 256},
    "decode_constants": {"chunk": 1024, "group": 256},
}
POINTERS = {"levels": "*fp32", "steps": "*fp32", "absmax": "*fp32",
            "nested": "*fp32", "offset": "fp32", "constants": "*u8",
            "nested_levels": "*fp32"}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", STATIC)
def test_products_and_sums_are_not_contracted(name, kind, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel = getattr(decode_gpu, f"_{name}")
    static = STATIC[name] | ({"kind": kind} if "kind" in kernel.arg_names else {})
    types = POINTERS | {
        "codes": "*i8" if "8" in name else "*u8",
        "out": "*u16" if static.get("kind") else "*fp32",
    }
    signature = {n: "constexpr" if n in static else types.get(n, "i32") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in static.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    assert "st.global" in ptx
    assert not re.search(r"\bfma|\.ftz|\.approx|\.full|\brcp", ptx)
    assert "div" not in ptx


@pytest.mark.parametrize("name", ["decode_4bit", "decode_nested_4bit"])
def test_decoded_weights_are_written_sixteen_bytes_at_a_time(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel, static = getattr(decode_gpu, f"_{name}"), STATIC[name] | {"kind": 1}
    types = POINTERS | {"codes": "*u8", "out": "*u16"}
    signature = {n: "constexpr" if n in static else types.get(n, "i32") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in static.items()}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n == "count"]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}
