"""Time encoding and decoding of every format against bitsandbytes and plain torch, in one process on one core.

    .venv/bin/python scripts/bench_kernels.py [--rounds 9] [--million 4] [--device cpu|cuda]

The sides take turns within each round and the best is printed, in millions of weights a second, with the ratios to
adaptkit. Blocks of 64 with float32 constants. bitsandbytes' counterpart of int8 is its 8-bit block-wise format, whose
256 levels are others. On a GPU, memory traffic in GB/s is printed too, and the bytes are compared with the CPU's.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads OpenMP
os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from adaptkit.discovery import load, names
from adaptkit.numerics import formats
from adaptkit.numerics.formats._blockwise import Blockwise, Format
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.kernels.codebook import FP4, NF4

BLOCK = 64
BOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES = ("adaptkit", "bitsandbytes", "torch")

Run = Callable[[], object]


def encoders(form: Format, weight: Tensor) -> tuple[Run, Run, Run]:
    """Encode a weight: adaptkit, bitsandbytes, the definition in plain torch."""
    if form.name == "int8":
        return (
            lambda: form.quantize(weight, BLOCK),
            lambda: bnb.quantize_blockwise(weight, blocksize=BLOCK),
            lambda: reference.encode_8bit(weight, BLOCK),
        )
    return (
        lambda: form.quantize(weight, BLOCK),
        lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=form.name),
        lambda: reference.encode_4bit(weight, BLOCK, BOOKS[form.name]),
    )


def decoders(form: Format, weight: Tensor) -> tuple[Run, Run, Run]:
    """Decode what the encoders made."""
    ours, dtype = form.quantize(weight, BLOCK), weight.dtype
    parts = ours.codes, ours.absmax, ours.count, BLOCK
    if form.name == "int8":
        codes, state = bnb.quantize_blockwise(weight, blocksize=BLOCK)
        return (
            lambda: form.dequantize(ours, dtype),
            lambda: bnb.dequantize_blockwise(codes, state),
            lambda: reference.decode_8bit(*parts, dtype),
        )
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=form.name)
    return (
        lambda: form.dequantize(ours, dtype),
        lambda: bnb.dequantize_4bit(packed, state),
        lambda: reference.decode_4bit(*parts, BOOKS[form.name], dtype),
    )


def seconds(run: Run, device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict[str, Run], rounds: int, device: str) -> dict[str, float]:
    """The shortest time of each, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if number:
                times[name].append(taken)
    return {name: min(taken) for name, taken in times.items()}


def same_as_on_cpu(form: Format, weight: Tensor) -> bool:
    """Whether codes, constants and decoded weights have the CPU's bits."""
    here, there = form.quantize(weight, BLOCK), form.quantize(weight.cpu(), BLOCK)
    pairs = [(here.codes, there.codes), (here.absmax, there.absmax)]
    moved = Blockwise(there.codes.to(weight.device), there.absmax.to(weight.device), there.shape, BLOCK)
    pairs.append((form.dequantize(moved, weight.dtype), form.dequantize(there, weight.dtype)))
    return all(torch.equal(on_device.cpu(), on_cpu) for on_device, on_cpu in pairs)


def keep_memory() -> None:
    """Have the C library keep what is freed: otherwise page faults are timed, and on whose turn they fall is luck."""
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
    for name in names(formats):
        form = load(formats, name, "FORMAT")
        for short, dtype in DTYPES.items():
            values = weight.to(options.device, dtype)
            for verb, sides in (("encode", encoders(form, values)), ("decode", decoders(form, values))):
                taken = take_turns(dict(zip(SIDES, sides, strict=True)), options.rounds, options.device)
                rate = {side: values.numel() / taken[side] / 1e6 for side in SIDES}
                slower += rate["adaptkit"] < rate["bitsandbytes"]
                line = f"{name:6} {short:5} {verb:6} " + " ".join(f"{rate[side]:12,.0f}" for side in SIDES)
                line += "".join(f" {rate['adaptkit'] / rate[side]:7.1f}x" for side in SIDES[1:])
                if options.device == "cuda":
                    same = same_as_on_cpu(form, values)
                    differing += not same
                    traffic = values.numel() * (dtype.itemsize + form.bits / 8 + 4 / BLOCK)
                    line += f" {traffic / taken['adaptkit'] / 1e9:9.0f} {'yes' if same else 'NO':>9}"
                print(line, flush=True)
    print(f"slower than bitsandbytes: {slower} of {2 * len(DTYPES) * len(names(formats))}")
    return int(differing > 0 or (options.device == "cpu" and slower > 0))


if __name__ == "__main__":
    sys.exit(main())
