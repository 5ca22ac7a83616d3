"""Time the kernels on one core: each format against bitsandbytes and the definition; then merge, unmerge and the coder.

    .venv/bin/python scripts/bench_kernels.py [--rounds 9] [--million 4] [--device cpu|cuda]

Sides alternate within each round, and the best rate of each is printed, in millions of weights per second, with
adaptkit's ratio to the others. Blocks have 64 weights and a float32 constant. bitsandbytes' counterpart of int8 is its
8-bit block-wise format, which has 256 different levels. On a GPU only decoding is timed, since no command encodes
there; memory traffic in GB/s is printed too, the bits are compared with the CPU's, and the other side is plain torch.

On a CPU, a second table follows: a change of rank 16, with 1 % of the weight's norm, is merged and unmerged. If all of
it were computed in float64, as defined, the least time would be that of the multiply-adds, one per rank and weight,
with operands in the cache. These are timed in the same rounds: twice as many in float32, of which a vector holds twice
as many. "of floor" is a rate divided by that rate.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads OpenMP
os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes.functional as bnb
import numpy as np
import torch
from torch import Tensor

from adaptkit.formats import fp4, nf4
from adaptkit.formats._blockwise import Blockwise
from adaptkit.numerics import exact, lora, residual
from adaptkit.numerics.kernels import _cpu_factors, reference
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.tensors import as_array, as_tensor
from adaptkit.training.network.decode import Blocks, decode, in_plain_torch

BLOCK = 64
RANK = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES = ("adaptkit", "bitsandbytes", "plain")

Run = Callable[[], object]


def encoders(form: Blockwise, weight: Tensor) -> tuple[Run, Run, Run]:
    """Return functions that encode a weight: adaptkit, bitsandbytes, and the definition."""
    values = as_array(weight)
    return (
        lambda: form.quantize(values, BLOCK, measure=False),
        lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=form.name),
        lambda: reference.encode_4bit(values, BLOCK, form.book),
    )


def decoders(form: Blockwise, weight: Tensor) -> tuple[Run, Run, Run]:
    """Return functions that decode the results of the encoders."""
    values = as_array(weight)
    parts = *form.quantize(values, BLOCK, measure=False)[:2], values.size, BLOCK
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=form.name)
    return (
        lambda: form.dequantize(*parts, values.dtype),
        lambda: bnb.dequantize_4bit(packed, state),
        lambda: reference.decode_4bit(*parts, form.book, values.dtype),
    )


def decoders_on_gpu(form: Blockwise, weight: Tensor) -> tuple[Run, Run, Run]:
    """Return functions that decode a weight on its device: adaptkit, bitsandbytes and plain torch."""
    codes, absmax, _ = form.quantize(as_array(weight), BLOCK, measure=False)
    moved, constants = as_tensor(codes).to(weight.device), as_tensor(absmax).to(weight.device)
    blocks = Blocks(moved, constants, constants, weight.numel(), BLOCK, form.book)
    theirs, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=form.name)
    peer = partial(bnb.dequantize_4bit, theirs, state)
    return partial(decode, blocks, weight.dtype), peer, partial(in_plain_torch, blocks, weight.dtype)


def seconds(run: Run, device: str) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Call all alternately, and return the shortest time of each; the first call is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if number:
                times[name].append(taken)
    return {name: min(taken) for name, taken in times.items()}


@jit
def products(a: np.ndarray, b: np.ndarray, out: np.ndarray, blocks: int) -> None:
    """Compute the products for a number of blocks of four rows and 256 columns, all with the same operands."""
    for _ in range(blocks):
        _cpu_factors.multiply(a, b, 0, 0, 0, RANK, 256, out)


def merge_runs(weight: Tensor, term: LowRank) -> tuple[dict[str, Run], dict[str, int]]:
    """Return the functions of merging to be timed, and how many elements each handles."""
    prepared, rows = exact.prepare([term]), slice(0, 64)
    array = as_array(weight)
    merged = exact.merge_rows(array, prepared, 0, True)
    a, b = np.ones((1, RANK, 256), np.float32), np.ones((4, RANK), np.float32)
    out, count = np.empty((4, 256), np.float32), weight.numel()
    many = np.tile(merged.residual, 1 + 500_000 // max(1, merged.residual.size))
    packed = np.frombuffer(residual.encode(many), np.uint8)
    part = exact.prepare([LowRank(term.a, term.b[rows], term.scaling)])
    plain = reference.prepare(term.a, term.b[rows], [RANK], [term.scaling])
    runs: dict[str, Run] = {
        "floor": lambda: products(a, b, out, 2 * count // 1024),
        "merge": lambda: exact.merge_rows(array, prepared, 0, False),
        "merge, undo": lambda: exact.merge_rows(array, prepared, 0, True),
        "unmerge": lambda: exact.unmerge_rows(merged.weight, prepared, 0, merged.residual),
        "encode": lambda: residual.encode(many),
        "decode": lambda: residual.decode(packed, many.size),
        "small": lambda: exact.merge_rows(array[rows], part, 0, True),
        "plain": lambda: reference.merge_rows(array[rows], plain, 0, True),
    }
    sizes = dict.fromkeys(runs, count) | dict.fromkeys(("encode", "decode"), many.size)
    return runs, sizes | dict.fromkeys(("small", "plain"), array[rows].size)


def bench_merge(values: Tensor, rounds: int) -> None:
    """Print the table of merging."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(RANK, values.shape[1], generator=generator)
    term = LowRank.of_tensors(a, torch.randn(values.shape[0], RANK, generator=generator), 1.0)
    term = term.weighted(0.01 * float(values.norm()) / lora.norm(term))
    print(f"\n{'':5} {'dtype':5} {'':12} {'million/s':>10} {'of floor':>9}")
    for short, dtype in DTYPES.items():
        weight = values.to(dtype)
        runs, sizes = merge_runs(weight, term)
        taken = take_turns(runs, rounds, "cpu")
        rate = {name: sizes[name] / taken[name] / 1e6 for name in runs}
        for name in ("floor", "merge", "merge, undo", "unmerge"):
            print(f"exact {short:5} {name:12} {rate[name]:10,.0f} {rate[name] / rate['floor']:9.0%}")
        for name in ("encode", "decode"):
            print(f"coder {short:5} {name:12} {rate[name]:10,.0f}")
        kept = residual.encode(exact.merge_rows(as_array(weight), exact.prepare([term]), 0, True).residual)
        print(f"      {short:5} {rate['small'] / rate['plain']:.0f}x the definition", end=", ")
        print(f"{8 * len(kept) / weight.numel():.4f} bits a weight are kept")


def keep_memory() -> None:
    """Let the C library keep freed memory; otherwise, page faults would add random times to some calls."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def main() -> int:
    """Print the table; 1 if bitsandbytes is faster anywhere or, on a GPU, bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--million", type=int, default=4, help="weights, in units of 2^20")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    if options.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.device == "cuda":
        print(torch.cuda.get_device_name())
    weight = torch.randn(options.million * 256, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    extra = f" {'GB/s':>7} {'same bits':>9}" if options.device == "cuda" else ""
    print(f"{'format':6} {'dtype':5} {'':6} " + " ".join(f"{side:>12}" for side in SIDES) + f"   ratios{'':10}{extra}")
    slower = differing = 0
    for form in (nf4.FORMAT, fp4.FORMAT):
        for short, dtype in DTYPES.items():
            values = weight.to(options.device, dtype)
            on_gpu = options.device == "cuda"
            both = [("encode", encoders(form, values)), ("decode", decoders(form, values))] if not on_gpu else []
            for verb, sides in both or [("decode", decoders_on_gpu(form, values))]:
                taken = take_turns(dict(zip(SIDES, sides, strict=True)), options.rounds, options.device)
                rate = {side: values.numel() / taken[side] / 1e6 for side in SIDES}
                slower += rate["adaptkit"] < rate["bitsandbytes"]
                line = f"{form.name:6} {short:5} {verb:6} " + " ".join(f"{rate[side]:12,.0f}" for side in SIDES)
                line += "".join(f" {rate['adaptkit'] / rate[side]:7.1f}x" for side in SIDES[1:])
                if on_gpu:
                    same = torch.equal(sides[0]().cpu(), as_tensor(decoders(form, values.cpu())[0]()))
                    differing += not same
                    traffic = values.numel() * (dtype.itemsize + form.bits / 8 + 4 / BLOCK)
                    line += f" {traffic / taken['adaptkit'] / 1e9:9.0f} {'yes' if same else 'NO':>9}"
                print(line, flush=True)
    print(f"slower than bitsandbytes: {slower} of {2 * len(DTYPES) * 2}")
    if options.device == "cpu":
        bench_merge(weight[:512], options.rounds)
    return int(differing > 0 or (options.device == "cpu" and slower > 0))


if __name__ == "__main__":
    sys.exit(main())
