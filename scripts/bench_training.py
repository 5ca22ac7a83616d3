"""Compare the time and memory of one training step on a CPU: adaptkit, and peft on three kinds of base.

    .venv/bin/python scripts/bench_training.py [--rounds 5] [--only 256 ...] [--threads 1]

All sides train rank-16 adapters on every linear layer of SmolLM2-135M-Instruct with AdamW and clipping, on the same
tokens. Each side is a separate process, and the sides alternate step by step, so that other load on the machine affects
all of them; medians are printed, with ratios to the fastest peer. Peak memory is that of the process (the kernel's
high-water mark, reset once the model is loaded), including the interpreter and libraries.

    adaptkit     NF4 shards; bfloat16 compute, or float32 on a processor without bfloat16 products
    peft, bnb    transformers + peft + bitsandbytes: NF4 with double quantization, bfloat16 autocast
    peft, bf16   transformers + peft on the 16-bit model, the fastest peer on processors with bfloat16 products
    peft, f32    the same on the model in float32, the fastest peer on other processors

The floor is the time of only those matrix products with frozen weights that a step needs, forward and backward, in the
same shapes, one after the other.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import get_smollm2

CASES = {
    "256": (256, 1.0, False),
    "1024": (1024, 1.0, False),
    "256, 40 % answers": (256, 0.4, False),
    "256, checkpointing": (256, 1.0, True),
    "1024, checkpointing": (1024, 1.0, True),
}
"""Tokens of the sequence, the share of them with loss, and whether layers are checkpointed."""

SIDES = ("adaptkit", "peft, bnb", "peft, bf16", "peft, f32")
RATE = 2e-4


def tokens(length: int, share: float, vocabulary: int = 49152) -> tuple[Any, Any]:
    """Return (1, length) ids and labels; the last ``share`` of the positions has loss."""
    import torch

    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : round(length * (1 - share))] = -100
    return ids, labels


class AdaptkitStep:
    """Steps as in ``adaptkit train``.

    Args:
        base: folder of the quantized base.
        length: tokens of the sequence.
        share: share of the tokens that has loss.
        policy: which layers are checkpointed.
        device: cpu or cuda.
        rank: rank of the adapter.
        vocabulary: number of different tokens.
        page_kib: size of a page of optimizer state; None for the default of a run.
        experts: patterns of stacked expert matrices that get an adapter, too.
        without: parts of ``training.fast`` to leave out.

    Attributes:
        model: the model with the adapter.
        optimizer: the adapter's optimizer.
        batch: the batch of a step.
    """

    def __init__(
        self, base: Path, length: int, share: float, policy: str,
        device: str = "cpu", rank: int = 16, vocabulary: int = 49152, page_kib: int | None = None,
        experts: tuple[str, ...] = (), without: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        import torch

        from adaptkit.data.batches import Batch
        from adaptkit.training.config import TrainConfig
        from adaptkit.training.device import choose_dtype
        from adaptkit.training.distributed import World
        from adaptkit.training.fast import accelerate
        from adaptkit.training.gradients import Gradients
        from adaptkit.training.memory.activations import save_activations
        from adaptkit.training.memory.optimizer import make_optimizer
        from adaptkit.training.memory.parameters import Trainable
        from adaptkit.training.network.model import load_model
        from adaptkit.training.network.new_adapters import AdapterShape, new_adapter, new_stack_adapters
        from adaptkit.training.preparation import begin_libraries

        config = TrainConfig(
            base=str(base), data=("data.jsonl",), device=device, checkpointing=policy, page_kib=page_kib
        )
        place = torch.device(device)
        begin_libraries(base, place, shard_base=False)
        self.model = model = load_model(base, choose_dtype("auto", place), place)
        shape = AdapterShape(rank, 2.0 * rank)
        new_adapter(model, ("*",), shape, "kaiming", 0.0, 0)
        if experts:
            new_stack_adapters(model, experts, shape, 0)
        accelerate(model.network, model.dtype, place, model.output_layer, without=without)
        save_activations(model.network, config, (1, length), place)
        trainable = Trainable.of(model)
        self._gradients = Gradients(model, trainable.gradients, config, World(place))
        self.optimizer = make_optimizer(
            trainable, config, base.parent / "bench-pages.bin", lambda line: print(line, file=sys.stderr)
        )
        ids, labels = tokens(length, share, vocabulary)
        self.batch = Batch(ids, labels, torch.ones_like(ids))
        self._answers = int((labels[:, 1:] != -100).sum())

    def collect(self) -> float:
        """Compute the loss and its gradients; return the loss."""
        return self._gradients.collect([self.batch], self._answers, 0)["loss"]

    def __call__(self) -> float:
        """Take a step, and return its loss."""
        loss = self.collect()
        self.optimizer.clip(1.0)
        self.optimizer.step(RATE)
        return loss


def peft_step(
    source: Path, length: int, share: float, checkpointing: bool, packed: bool,
    device: str = "cpu", vocabulary: int = 49152, dtype: str = "bfloat16", paged: bool = True,
    targets: str | list[str] = "all-linear", experts: tuple[str, ...] = (),
) -> Callable[[], float]:  # fmt: skip
    """Return a step of a plain loop with peft; on a GPU, with bitsandbytes' AdamW, paged or not."""
    import contextlib

    import peft
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if packed:
        options |= {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            "device_map": device,
        }
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    adapter = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=targets, target_parameters=list(experts) or None, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(plain, adapter)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if device == "cpu":
        optimizer: Any = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    else:
        import bitsandbytes

        optimizers = bitsandbytes.optim
        adamw = optimizers.PagedAdamW32bit if paged else optimizers.AdamW32bit
        optimizer = adamw(trained, lr=RATE, weight_decay=0.0)
    ids, labels = (side.to(device) for side in tokens(length, share, vocabulary))
    model.train()
    context = torch.autocast(device, torch.bfloat16) if packed else contextlib.nullcontext()
    return lambda: plain_step(model, optimizer, ids, labels, context)


def plain_step(model: Any, optimizer: Any, ids: Any, labels: Any, context: AbstractContextManager[Any]) -> float:
    """Take a step of a plain loop, with its forward pass in a context; return the loss before the step."""
    import torch

    with context:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def floor_step(base: Path, length: int, share: float, checkpointing: bool) -> Callable[[], float]:
    """Return a step of only the products with frozen weights: forward, recomputed, and for the inputs' gradients."""
    import torch

    from adaptkit.training.device import choose_dtype

    dtype = choose_dtype("auto", torch.device("cpu"))
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    again = 2 if checkpointing else 1  # except for the last product of a layer, and for the head
    shapes = [(out, hidden, 2 * layers, again) for out in (hidden, keys, inner)]
    shapes += [(hidden, inner, layers, 1), (config["vocab_size"], hidden, 1, 1)]
    products = []
    for out, into, count, forwards in shapes:
        rows = round(length * share) if out == config["vocab_size"] else length
        products.append((torch.randn(rows, into).to(dtype), torch.randn(out, into).to(dtype), count, forwards))

    def step() -> float:
        for x, weight, count, forwards in products:
            y = x @ weight.T
            for _ in range(count * forwards - 1):
                y = x @ weight.T
            for _ in range(count):
                y @ weight
        return 0.0

    return step


def work(side: str, case: str, threads: int) -> None:
    """Run one side in this process; see ``serve``."""
    begin(side, threads)
    length, share, checkpointing = CASES[case]
    source = get_smollm2.default_folder() / get_smollm2.MODEL_NAME
    base = packed_base(source)
    if side == "adaptkit":
        step: Callable[[], float] = AdaptkitStep(base, length, share, "layer" if checkpointing else "none")
    elif side == "floor":
        step = floor_step(source, length, share, checkpointing)
    else:
        dtype = "float32" if side == "peft, f32" else "bfloat16"
        step = peft_step(source, length, share, checkpointing, side == "peft, bnb", dtype=dtype)
    serve(step)


def begin(side: str, threads: int) -> None:
    """Set up the process: for adaptkit, as its command does."""
    if side == "adaptkit":
        from adaptkit.machine import share_processors
        from adaptkit.training.product_cache import limit_product_cache

        limit_product_cache()
        share_processors()
    import torch

    torch.set_num_threads(threads)


def serve(step: Callable[[], float]) -> None:
    """Print "ready", and take a step for each line of input; print its seconds, the peak megabytes, and its loss."""
    Path("/proc/self/clear_refs").write_text("5")
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1000
        print(json.dumps([time.perf_counter() - started, peak, loss]), flush=True)


def packed_base(source: Path) -> Path:
    """Return the quantized model, made once."""
    packed = source.parent / "bench-nf4"
    if not packed.exists():
        command = [sys.executable, "-m", "adaptkit.cli.main", "quantize", str(source), "-o", str(packed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packed


def compare(title: str, rounds: int, threads: int, commands: Mapping[str, Sequence[str]]) -> None:
    """Let all sides, given by the commands that run them, take steps alternately; print their times and memory."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    workers = {
        side: subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if side.startswith("peft") else None,
            text=True,
            env=environment,
        )
        for side, command in commands.items()
    }
    found: dict[str, list[list[float]]] = {side: [] for side in workers}
    for side, worker in workers.items():
        if worker.stdout.readline().strip() != "ready":
            sys.exit(f"bench: {side} failed to start")
    for turn in range(rounds + 1):
        for side, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            if turn:  # the first step compiles, allocates and fills caches
                found[side].append(answer)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    peers = [side for side in workers if side.startswith("peft")]
    fastest = min(statistics.median(s for s, _, _ in found[side]) for side in peers) if peers else 1.0
    smallest = min(max(m for _, m, _ in found[side]) for side in peers) if peers else 1.0
    print(f"\n{title:37} {'s/step':>8} {'ratio':>7} {'peak MB':>9} {'ratio':>7} {'loss':>8}")
    for side, answers in found.items():
        seconds = statistics.median(s for s, _, _ in answers)
        peak = max(m for _, m, _ in answers)
        memory = f"{peak:9.0f} {peak / smallest:7.2f} {answers[-1][2]:8.4f}" if side != "floor" else ""
        print(f"{side:37} {seconds:8.3f} {seconds / fastest:7.2f} {memory}", flush=True)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="cases")
    parser.add_argument("--sides", nargs="*", choices=[*SIDES, "floor"], default=[*SIDES, "floor"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.case, options.threads)
        return
    source = get_smollm2.default_folder() / get_smollm2.MODEL_NAME
    if not source.exists():
        sys.exit("bench: run scripts/get_smollm2.py first")
    shutil.rmtree(source.parent / "bench-nf4", ignore_errors=True)
    packed_base(source)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {options.threads} thread(s)")
    if (
        "adaptkit" in options.sides
    ):  # compiles its kernels, which are then cached: compiling takes memory that later runs do not need
        once = [sys.executable, __file__, "--work", "adaptkit", "--case", "256"]
        subprocess.run(once, input="step\n", text=True, check=True, stdout=subprocess.DEVNULL)
    for case in options.only or CASES:
        common = ["--case", case, "--threads", str(options.threads)]
        sides = {side: [__file__, "--work", side, *common] for side in options.sides}
        compare(f"{case} tokens", options.rounds, options.threads, sides)


if __name__ == "__main__":
    main()
