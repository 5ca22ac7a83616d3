"""Compare training steps on a GPU with transformers + peft + bitsandbytes, and measure paged optimizer state.

    .venv/bin/python scripts/bench_gpu.py [--seconds 420] [--out table.md]
    .venv/bin/python scripts/bench_gpu.py --tiny --device cpu          the same measurements at a size for a CPU

Both sides train rank-16 adapters on every linear layer of a random Llama-shaped base in NF4 with double quantization,
on one sequence of 2048 tokens, all with loss: bfloat16 compute, each layer checkpointed, clipping, AdamW with 32-bit
state; that of bitsandbytes is in managed memory, except for matrices below 100,000 elements. Each side runs in its own
process. Steps are timed one by one, after some that compile and allocate; medians are compared. Peak memory is what
torch allocated on the device after loading the model: with all of adaptkit's state, but without managed memory.

    speed     tokens per second, and peak memory
    paging    series of such steps, alternating between all pages resident and a quarter of them; as in a training run,
              a step's copies may overlap with the next step
    long      a sequence whose step exceeds a given memory limit until the optimizer's pages are evicted
"""

import argparse
import contextlib
import faulthandler
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_training


@dataclass(frozen=True)
class Size:
    """Sizes of a random base and of its measurements.

    Attributes:
        name: name for the table.
        hidden: width of the model.
        inner: width of the MLP.
        layers: number of layers.
        heads: number of query heads.
        key_heads: number of key and value heads.
        vocabulary: number of tokens.
        length: tokens of a sequence.
        long_length: tokens of the sequence that does not fit; 0 to skip that measurement.
        long_rank: the adapter's rank for that sequence, large enough to give much optimizer state.
        page_kib: size of a page of optimizer state; None for the default of a run.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    length: int = 2048
    long_length: int = 0
    long_rank: int = 256
    page_kib: int | None = None


SIZES = (
    Size("1.1 B", 2048, 5632, 22, 32, 4, 32000, long_length=16384),
    Size("8 B", 4096, 14336, 32, 32, 8, 128256),
)
TINY = (Size("tiny", 64, 160, 2, 4, 2, 512, length=64, long_length=96, long_rank=16, page_kib=4),)
SPEED, MEMORY, PAGING = 1.5, 0.8, 0.05
"""Goals: speed and peak memory relative to the peer, and the additional time of a step with a quarter of the pages."""
QUARTER = 0.25


def make_base(folder: Path, size: Size, device: str) -> None:
    """Write a random 16-bit checkpoint with one shard per layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        vocab_size=size.vocabulary, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        tie_word_embeddings=False, max_position_embeddings=max(size.length, size.long_length), dtype="bfloat16",
        bos_token_id=0, eos_token_id=1,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault("-".join(parts[1:3]) if "layers" in parts else "rest", []).append(name)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {}
        for name in names:
            value = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
            tensors[name] = (value.fill_(1.0) if len(value.shape) == 1 else value.normal_(std=0.02)).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Device:
    """Measures memory and time on a device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def forget_peak(self) -> None:
        """Reset the peak memory."""
        import torch

        if self.name == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self, reserved: bool = False) -> int:
        """Return the peak of memory allocated since the reset, or reserved by torch; on a CPU, of the process."""
        import torch

        if self.name == "cpu":
            return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        return torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()

    def limit(self, limit_bytes: int) -> None:
        """Limit torch's memory on the device; has no effect on a CPU."""
        import torch

        if self.name != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.mem_get_info()[1])

    def seconds(self, step: Callable[[], Any]) -> float:
        """Return the seconds that a step takes, until all its work on the device is done."""
        import torch

        started = time.perf_counter()
        step()
        if self.name != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_peer(folder: Path, size: Size, device: Device, rounds: int, paged: bool = True) -> Iterator[dict[str, Any]]:
    """Measure seconds per step and peak bytes of transformers + peft + bitsandbytes."""
    step = bench_training.peft_step(
        folder / "plain", size.length, 1.0, True, True, device=device.name, vocabulary=size.vocabulary, paged=paged
    )
    yield _steps(step, device, rounds)


def measure_ours(folder: Path, size: Size, device: Device, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure the same for adaptkit; then alternate between steps with all pages and with a quarter of them."""
    step = bench_training.AdaptkitStep(
        folder / "nf4", size.length, 1.0, "layer",
        device=device.name, vocabulary=size.vocabulary, page_kib=size.page_kib,
    )  # fmt: skip
    yield _steps(step, device, rounds)
    pages, seconds = step.optimizer.state.pages, {"resident": [], "paged": []}
    whole, count = pages.count * pages.page_bytes, max(2, rounds // 2)

    def some() -> None:
        for _ in range(count):
            step()

    for _ in range(3):
        for kind, budget in (("resident", None), ("paged", int(QUARTER * whole))):
            pages.set_budget(budget)
            step()
            seconds[kind].append(device.seconds(some) / count)
    yield {kind: statistics.median(times) for kind, times in seconds.items()} | {"pages": pages.metrics()}


def measure_long(folder: Path, size: Size, device: Device, rounds: int) -> Iterator[dict[str, Any]]:
    """Check that a step fails if the optimizer's state leaves too little memory, and succeeds once it is evicted."""
    import torch

    from adaptkit.training.memory.pressure import Pressure
    from adaptkit.training.out_of_memory import is_out_of_memory

    step = bench_training.AdaptkitStep(
        folder / "nf4", size.long_length, 1.0, "layer",
        device=device.name, rank=size.long_rank, vocabulary=size.vocabulary, page_kib=size.page_kib,
    )  # fmt: skip
    pages = step.optimizer.state.pages
    pages.set_budget(0)
    device.forget_peak()
    expected = step.collect()
    state_bytes = pages.count * pages.page_bytes
    limit = device.peak_bytes(reserved=True) + state_bytes // 4
    device.limit(limit)
    pages.set_budget(None)
    try:
        step.collect()
        failed = False
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if device.name != "cpu":
        torch.cuda.empty_cache()
    notes: list[str] = []
    loss = Pressure(pages, notes.append).relieve(size.long_length, step.collect)
    step.optimizer.step(bench_training.RATE)
    yield {
        "limit": limit, "state": state_bytes, "failed": failed, "finished": math.isfinite(loss),
        "same": loss == expected, "retries": pages.counters.retries, "notes": notes,
    }  # fmt: skip


def _steps(step: Callable[[], float], device: Device, rounds: int) -> dict[str, Any]:
    device.forget_peak()
    for _ in range(3):
        step()
    seconds = [device.seconds(step) for _ in range(rounds)]
    return {"seconds": statistics.median(seconds), "peak": device.peak_bytes()}


MEASUREMENTS: dict[str, Callable[[Path, Size, Device, int], Iterator[dict[str, Any]]]] = {
    "ours": measure_ours,
    "peer": measure_peer,
    "unpaged": partial(measure_peer, paged=False),
    "long": measure_long,
}
"""Measurements by name; each yields its results as soon as they are known. ``unpaged`` is the peer with its state in
ordinary device memory, for machines whose driver lacks managed memory; it replaces a peer that failed."""
LONGEST = 110.0
"""Seconds after which a measurement is stopped, several times what it should take: the others still have time then."""
LEAST = 10.0
"""With fewer seconds left, none is started."""
LATE = "the time limit was reached"


class Clock:
    """The remaining time.

    Args:
        seconds: total time.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the remaining seconds."""
        return self._end - time.monotonic()


def run(what: str, folder: Path, size: Size, device: str, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """Run a measurement in a new process.

    Yields:
        Its results so far, as soon as a part of them is known, and at the end; after a failure with ``error``.
    """
    seconds, found = min(clock.left(), LONGEST), {}
    if seconds < LEAST:
        yield {"error": LATE}
        return
    job = {"what": what, "folder": str(folder), "size": asdict(size), "device": device, "rounds": rounds}
    job |= {"seconds": seconds}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, __file__, "--work", json.dumps(job)]
    stopped = threading.Event()
    with tempfile.TemporaryFile("w+") as messages:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment) as child:
            limit = threading.Timer(seconds, lambda: (stopped.set(), child.kill()))
            limit.start()
            try:
                for line in child.stdout or ():
                    if line.startswith(_PART):
                        found |= json.loads(line.removeprefix(_PART))
                        yield found
                code = child.wait()
            finally:
                limit.cancel()
                child.kill()
        if code:
            messages.seek(0)
            text = messages.read()
            print(text[-_MESSAGE_CHARACTERS:], file=sys.stderr)
            last = (text.strip().splitlines() or [f"exit code {code}, and no output on stderr"])[-1][:200]
            reason = last if code > 0 else f"killed by {signal.Signals(-code).name}"
            found["error"] = LATE if stopped.is_set() else found.get("error", reason)
    yield found


_MESSAGE_CHARACTERS = 6000
_PART = "measured: "


def work(job: dict[str, Any]) -> None:
    """Run a measurement in this process; for adaptkit, with the attention that ``adaptkit train`` chooses.

    If it crashes, or is about to be stopped, it prints what it is doing on stderr.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(job["seconds"] - 2)
    from adaptkit.training.device import without_cudnn_attention

    size, is_peer = Size(**job["size"]), job["what"] in ("peer", "unpaged")
    try:
        with contextlib.nullcontext() if is_peer else without_cudnn_attention():
            for part in MEASUREMENTS[job["what"]](Path(job["folder"]), size, Device(job["device"]), job["rounds"]):
                print(_PART + json.dumps(part), flush=True)
    except Exception as error:  # the last line of its traceback may be a hint
        print(_PART + json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}), flush=True)
        raise


def make_bases(folder: Path, size: Size, device: str, clock: Clock) -> str:
    """Write the base and its quantized counterpart; return an error message, or an empty string."""
    quantize = [sys.executable, "-m", "adaptkit", "quantize", str(folder / "plain"), "-o", str(folder / "nf4")]
    try:
        make_base(folder / "plain", size, device)
        subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL, timeout=max(1.0, min(clock.left(), LONGEST)))
    except subprocess.TimeoutExpired:
        return LATE
    except Exception as error:  # whatever it is, the measurements of other sizes can go on
        print(error, file=sys.stderr)
        return f"the base could not be made: {(str(error).splitlines() or [''])[0][-200:]}"
    return ""


def compare(size: Size, device: str, rounds: int, root: Path, clock: Clock) -> Iterator[dict[str, dict[str, Any]]]:
    """Run all measurements for one size, and yield all results so far after each; remove the bases afterwards."""
    folder, found = root / size.name.replace(" ", "-"), {}
    try:
        started = time.monotonic()
        failed = make_bases(folder, size, device, clock)
        print(f"{size.name}: bases made in {time.monotonic() - started:.0f} s", file=sys.stderr)
        for what in MEASUREMENTS:
            if (what == "long" and not size.long_length) or (
                what == "unpaged" and (failed or "seconds" in found["peer"])
            ):
                continue
            started = time.monotonic()
            for results in [{"error": failed}] if failed else run(what, folder, size, device, rounds, clock):
                found[what] = results
                yield found
            print(f"{size.name}: {what} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PEER = "transformers + peft + bitsandbytes"


def lines(size: Size, found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table's rows for one size."""
    ours, peer, unpaged = (found.get(name, {}) for name in ("ours", "peer", "unpaged"))
    rows = []
    for name, side in (("adaptkit", ours), (PEER, peer), (f"{PEER}, its state not paged", unpaged)):
        if "error" in side:
            missing = "incomplete" if "seconds" in side else "not measured"
            rows.append(f"| {size.name} | {name} | {missing}: {side['error']} | | |")
        if "seconds" in side:
            rate = size.length / side["seconds"]
            rows.append(f"| {size.name} | {name} | {rate:,.0f} tokens/s, {side['peak'] / 2**20:,.0f} MiB | | |")
    peer = unpaged if "seconds" in unpaged else peer
    if "seconds" in ours and "seconds" in peer:
        speed, memory = peer["seconds"] / ours["seconds"], ours["peak"] / peer["peak"]
        rows.append(_row(size, "tokens/s, ratio", f"{speed:.2f}", f"at least {SPEED}", speed >= SPEED))
        rows.append(_row(size, "peak memory, ratio", f"{memory:.2f}", f"at most {MEMORY}", memory <= MEMORY))
    if "paged" in ours:
        share = ours["paged"] / ours["resident"] - 1
        pages = f"{ours['pages']['slots']} of {ours['pages']['pages']} pages on the device"
        rows.append(_row(size, f"paging, {pages}", f"{share:+.1%} of a step", f"under {PAGING:.0%}", share < PAGING))
    if "long" in found:
        rows.append(_long_row(size, found["long"]))
    return rows


def _long_row(size: Size, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {size.name} | a long sequence | not measured: {found['error']} | | |"
    place = f"{size.long_length} tokens in {found['limit'] / 2**20:,.0f} MiB, rank {size.long_rank}"
    before = "runs out of memory" if found["failed"] else "fits"
    after = "finishes" if found["finished"] else "does not finish"
    same = "the same loss" if found["same"] else "a different loss"
    outcome = f"{before} with its pages resident; {after} with paging, {same}"
    return _row(size, place, outcome, "finishes", found["failed"] and found["finished"] and found["same"])


def _row(size: Size, what: str, value: str, wanted: str, met: bool) -> str:
    return f"| {size.name} | {what} | {value} | {wanted} | {'yes' if met else 'no'} |"


def heading(device: str) -> str:
    """Return the place and the libraries of the measurements, and what Triton's kernels need and the place lacks."""
    import torch

    from adaptkit.training.device import triton_warning

    place = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    parts = f"{place}; {', '.join(map(_version, LIBRARIES))}", triton_warning(torch.device(device))
    return "; ".join(filter(None, parts))


def table(heading: str, found: dict[str, list[str]]) -> str:
    """Return all results as a Markdown table."""
    head = [heading, "", "| base | what | measured | wanted | met |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for rows in found.values() for row in rows)]) + "\n"


LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def place_of_bases() -> str | None:
    """Return a folder in memory if there is enough, since a disk could take minutes; otherwise None."""
    folder = "/dev/shm"
    return folder if os.path.isdir(folder) and shutil.disk_usage(folder).free > MEMORY_BYTES else None


MEMORY_BYTES = 32 << 30
"""The larger base takes 22 GB."""


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a base that a CPU can train")
    parser.add_argument("--seconds", type=float, default=480, help="time limit for all measurements")
    parser.add_argument("--rounds", type=int, default=12, help="number of timed steps")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # delete the bases, which may be in memory, also then
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: torch finds no CUDA device, so nothing was measured", file=sys.stderr)
        sys.exit(2)
    clock, head, told = Clock(options.seconds), heading(options.device), set()
    found: dict[str, list[str]] = {}
    text = table(head, found)
    with tempfile.TemporaryDirectory(prefix="adaptkit-bench-", dir=place_of_bases()) as root:
        for size in TINY if options.tiny else SIZES:
            for measured in compare(size, options.device, options.rounds, Path(root), clock):
                rows = found[size.name] = lines(size, measured)
                text = table(head, found)
                if options.out:  # immediately, in case a later measurement fails
                    options.out.write_text(text)
                for row in (row for row in rows if row not in told):  # in case only what is printed is kept
                    print(row, file=sys.stderr, flush=True)
                told.update(rows)
    print(text, end="")


if __name__ == "__main__":
    main()
