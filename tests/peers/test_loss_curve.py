"""Losses and gradient norms of a run, step by step, beside a loop in float64 over peft's model."""

import json
import math

import peft
import pytest
import torch
import transformers

from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.preview import preview

STEPS, RATE = 5, 1e-2


def reference(base, adapter, samples):
    """Yield loss and gradient norm of every step, with all samples in each, one sample at a time."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(plain, adapter, is_trainable=True).double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    total = sum(sum(learned) for _, learned in samples)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for ids, learned in samples:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            share = each[torch.tensor(learned[1:])].sum() / total
            share.backward()
            loss += share.item()
        yield loss, float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_run_has_the_losses_and_gradients_of_a_loop_in_float64(llama, adapter, tmp_path, micro_batch_size):
    """Answers have from 1 to 16 words: a mean of the micro-batches' means would differ by percents."""
    rows = [{"prompt": f"say it {count} times", "completion": "fox " * count} for count in (1, 1, 1, 2, 2, 3, 8, 16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        base=str(llama), data=(str(tmp_path / "rows.jsonl"),), init=str(adapter), steps=STEPS, batch_size=len(rows),
        micro_batch_size=micro_batch_size, learning_rate=RATE, warmup=0, held_out=0, compute_dtype="float32",
    )  # fmt: skip
    samples = [
        (
            [token for part in sample.stretches for token in part.ids],
            [part.learned for part in sample.stretches for _ in part.ids],
        )
        for sample in preview(TrainConfig(**vars(config) | {"micro_batch_size": None})).samples
    ]
    assert len(samples) == len(rows)
    train(config, tmp_path / "out", note=lambda text: None)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    found = [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]
    for one, other in zip(found, reference(llama, adapter, samples), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert math.dist(found[0], found[-1]) > 0.1
