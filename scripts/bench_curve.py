"""Compare the loss of QLoRA, step by step, with that of transformers + peft + bitsandbytes.

    .venv/bin/python scripts/bench_curve.py [--steps 60]

Both train rank-16 adapters on every linear layer of SmolLM2-135M-Instruct, on the same NF4 shards, from the same A and
zero B, on the same 256 tokens of the Brown corpus in each step, with AdamW, clipping and a constant learning rate, on
the CPU in bfloat16.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_training
import get_real_data
import get_smollm2
import torch
from torch import Tensor

from adaptkit.data.batches import Batch

LENGTH, RATE, RANK = 256, 2e-4, 16


def windows(base: Path, steps: int) -> Iterator[Tensor]:
    """Yield (1, LENGTH) token ids for each step."""
    import transformers

    text = (get_real_data.make(get_real_data.default_folder()) / "brown.txt").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids[0]
    for step in range(steps):
        start = step * LENGTH % (len(ids) - LENGTH)
        yield ids[start : start + LENGTH][None]


class Ours(bench_training.AdaptkitStep):
    """Steps as in ``adaptkit train``, each on different tokens."""

    def __init__(self, base: Path) -> None:
        super().__init__(base, LENGTH, 1.0, "none", rank=RANK)
        self.factors = {name: layer.lora_a.detach().clone() for name, layer in self.model.adapted().items()}

    def take(self, ids: Tensor) -> float:
        """Take a step, and return the loss before it."""
        self.batch = Batch(ids, ids.clone(), torch.ones_like(ids))
        return self()


def peer(base: Path, factors: dict[str, Tensor]) -> Callable[[Tensor], float]:
    """Return a function that takes the same steps with peft on bitsandbytes' layers, which load the same shards."""
    import peft
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(plain, config).train()
    for name, factor in factors.items():
        model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(factor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    context = torch.autocast("cpu", torch.bfloat16)
    return lambda ids: bench_training.plain_step(model, optimizer, ids, ids, context)


def main() -> None:
    """Take the steps, and print both losses and their difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    source = get_smollm2.make(get_smollm2.default_folder()) / get_smollm2.MODEL_NAME
    base = bench_training.packed_base(source)
    ours = Ours(base)
    theirs = peer(base, ours.factors)
    apart = []
    print(f"{'step':>5} {'adaptkit':>10} {'peft, bnb':>10} {'apart':>10}")
    for step, ids in enumerate(windows(base, options.steps), start=1):
        one, two = ours.take(ids), theirs(ids)
        apart.append((one - two) / two)
        if step == 1 or step % 5 == 0:
            print(f"{step:>5} {one:>10.4f} {two:>10.4f} {100 * apart[-1]:>+9.2f} %", flush=True)
    print(f"mean {100 * statistics.mean(apart):+.2f} %, largest {100 * max(map(abs, apart)):.2f} % of the peer's loss")


if __name__ == "__main__":
    main()
