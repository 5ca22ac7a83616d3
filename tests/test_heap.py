"""Freed memory: kept for the next buffer, and given back when that is asked for. Code of products: few are kept."""

import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys
from adaptkit.heap import keep_freed_memory, return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
keep_freed_memory()
sizes = [*[36_000] * 1500, 30_000_000]
blocks = [libc.malloc(size) for size in sizes]
for block, size in zip(blocks, sizes):
    ctypes.memset(block, 1, size)
held = resident()
for block in blocks:
    libc.free(ctypes.c_void_p(block))
kept = resident()
return_freed_memory()
print(held, kept, resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc, which is not here"
)
def test_freed_memory_is_kept_until_it_is_returned():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    held, kept, left = map(float, done.stdout.split())
    assert held - kept < 10
    assert held - left > 70


PRODUCTS = """
import torch
for rows in [*range(11, 111), 11, 110]:
    torch.ones(rows, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
"""


@pytest.mark.parametrize(
    ("begun", "setting", "again"),
    [
        ("", None, 2),
        ("from adaptkit.heap import keep_few_products; keep_few_products()", None, 1),
        ("from adaptkit.heap import keep_few_products; keep_few_products()", "500", 2),
    ],
    ids=["oneDNN by itself", "few", "as the user wants"],
)
def test_the_code_of_few_products_is_kept(begun, setting, again):
    """The last one's, of a hundred, and no longer the first one's."""
    environment = os.environ | {"ONEDNN_VERBOSE": "profile_create"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    environment |= {} if setting is None else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": setting}
    command = [sys.executable, "-c", begun + PRODUCTS]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    if ",matmul," not in told:
        pytest.skip("torch computes such products without oneDNN here")
    assert told.count("create:cache_hit,cpu,matmul,") == again


def test_the_command_line_keeps_few():
    """Every command does, before it loads torch."""
    code = """
import os, sys
from adaptkit.cli.main import main
sys.argv = ["adaptkit", "--version"]
try:
    main()
finally:
    print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], "torch" in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "64 False"
