"""Freed memory is kept for the next buffer and returned on request; few compiled products are cached."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from adaptkit.training import heap

CODE = """
import ctypes, sys
from adaptkit.training.heap import keep_freed_memory, return_freed_memory

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


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_returned():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    held, kept, left = map(float, done.stdout.split())
    assert held - kept < 10
    assert held - left > 70


AGAIN = """
import torch
from adaptkit.training.heap import keep_freed_memory, take_large_pages

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000

keep_freed_memory()
take_large_pages()
torch.ones(2) + 1
before, most, kept = resident(), 0, []
for _ in range(8):
    buffer = torch.ones(14_000_000)
    most = max(most, resident())
    kept.append(torch.ones(70_000))
    del buffer
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_a_large_buffer_that_is_needed_again_and_again_takes_its_memory_once():
    """Such as an embedding in the compute dtype in full training, whose heap grew by one in each of its first steps."""
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80


@pytest.mark.parametrize("most", [32 << 20, 1 << 40], ids=["glibc 2.31", "glibc 2.41"])
def test_blocks_up_to_the_largest_threshold_that_glibc_accepts_are_kept(most, monkeypatch):
    """Older ones accept less; if only the other threshold is set, all above 128 kB is returned and fetched again."""
    taken = {}

    def mallopt(what, value):
        refused = what == heap._M_MMAP_THRESHOLD and value > most
        taken.update({} if refused else {what: value})
        return not refused

    monkeypatch.setattr(heap, "_function", {"mallopt": mallopt}.get)
    heap.keep_freed_memory(100 << 20)
    assert taken == {heap._M_MMAP_THRESHOLD: min(most, 100 << 20), heap._M_TRIM_THRESHOLD: 200 << 20}


CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
FEW = "from adaptkit.training.heap import keep_few_products; keep_few_products()"

PRODUCTS = """
import torch
for rows in [*range(11, 111), 11, 110]:
    torch.ones(rows, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
"""


def without_caches(**settings):
    return {name: value for name, value in os.environ.items() if name not in CACHES} | settings


@pytest.mark.parametrize(
    ("begun", "setting", "again"),
    [("", {}, 2), (FEW, {}, 1), (FEW, {CACHES[0]: "500"}, 2)],
    ids=["oneDNN by itself", "few", "as the user wants"],
)
def test_only_few_compiled_products_are_cached(begun, setting, again):
    """By default, the first of a hundred is still cached; with few, only the last one."""
    environment = without_caches(ONEDNN_VERBOSE="profile_create", **setting)
    command = [sys.executable, "-c", begun + PRODUCTS]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    if ",matmul," not in told:
        pytest.skip("this torch does not use oneDNN for these products")
    assert told.count("create:cache_hit,cpu,matmul,") == again


GROWTH = """
import ctypes
import torch

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap

def held(lengths):
    for rows in lengths:
        torch.ones(rows, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    heap = libc.mallinfo2()
    return (heap.mapped + heap.used) / 1e6

before = held(range(100, 200))
print(held(range(200, 400)) - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_more_lengths_take_no_more_memory():
    def growth(begun):
        command = [sys.executable, "-c", begun + GROWTH]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=without_caches())
        return float(done.stdout)

    by_itself = growth("")
    if by_itself < 20:
        pytest.skip("this torch does not use oneDNN for these products")
    assert growth(FEW) < by_itself / 10


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_commands_of_the_trainer_limit_cached_products(command, tmp_path):
    """Even if they then refuse their base."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    output = ["-o", str(tmp_path / "out")] if command == "train" else []
    code = f"""
import os, sys
from adaptkit.cli.main import main
sys.argv = ["adaptkit", {command!r}, "--base", {str(tmp_path)!r}, "--data", {str(data)!r}, *{output!r}]
try:
    main()
finally:
    print(*(os.environ[cache] for cache in {CACHES}), os.environ["THP_MEM_ALLOC_ENABLE"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_caches())
    assert done.returncode not in (0, 1)
    assert done.stdout.splitlines()[-1] == "64 1 1"


PASSES = """
import ctypes, resource, sys
from pathlib import Path
import torch
from adaptkit.training.network.model import load_model

network = load_model(Path(sys.argv[1]), torch.float32, torch.device("cpu")).network
ids = torch.tensor([[1]])
with torch.no_grad():
    for number in range(8):
        if number == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(input_ids=ids, use_cache=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 5e6)
print(ctypes.CDLL(None).mallopt(-3, 256 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_a_pass_reuses_the_memory_of_large_weights(tmp_path):
    """Three of 80 MB per pass; for an 8B model, fetching and clearing them took as long as everything else."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=20_000, num_hidden_layers=1, num_attention_heads=8, vocab_size=64
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PASSES, tmp_path], capture_output=True, text=True, check=True)
    megabytes, takes_so_much = map(float, done.stdout.split())
    if not takes_so_much:
        pytest.skip("this glibc keeps no more than 32 MB")
    assert megabytes < 40


LARGE = """
import re, sys
from adaptkit.training.heap import take_large_pages
if sys.argv[1] == "large":
    take_large_pages()
import torch
blocks = [torch.zeros(50_000_000, dtype=torch.uint8) for _ in range(4)]
asked = re.findall(r"^Size: *(\\d+) kB$(?:\\n\\w+:.*$)*?\\nVmFlags:.* hg\\b", open("/proc/self/smaps").read(), re.M)
print(sum(map(int, asked)) // 1024)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this system does not support transparent large pages",
)
def test_large_buffers_request_large_pages():
    """Whether it gets any depends on the system, whose memory may be fragmented."""

    def megabytes(which):
        environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        command = [sys.executable, "-c", LARGE, which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert megabytes("large") > 100
    assert megabytes("small") == 0
