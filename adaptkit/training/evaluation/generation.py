"""Answers by greedy decoding, many at a time, with the key-value cache: the same text as one at a time.

That is so up to rounding: in bfloat16 two tokens that are nearly as likely may change places with the size of a batch.

Prompts of one batch are padded at the left, where the mask hides the padding and positions do not count it. An answer
ends at the first token that ends a turn: the tokenizer's end token, those of ``generation_config.json`` (where there is
none, of ``config.json``), or what the chat template puts right after an answer, which is another token in some models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptkit.networks.architecture import quiet_transformers
from adaptkit.training.data.ending import named_ends, turn_end
from adaptkit.training.evaluation.final import Marks
from adaptkit.training.network.model import Model


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: without thoughts, special tokens, and white space around it.
        ended: whether the model ended it; otherwise the limit of new tokens did.
    """

    text: str
    ended: bool


def stop_tokens(model: Model, tokenizer: Any) -> list[int]:
    """Every token that ends an answer, sorted."""
    found = {tokenizer.eos_token_id, turn_end(tokenizer), *named_ends(model.checkpoint.root)}
    return sorted(token for token in found if isinstance(token, int))


def generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    padding: int,
) -> list[Generated]:
    """Answer prompts, likeliest token by likeliest token.

    Args:
        model: on its device.
        tokenizer: of the model.
        prompts: tokens of each, at least one; those of like length go together.
        max_new_tokens: of an answer.
        batch_size: prompts at a time.
        padding: the token to pad with; hidden from the model.

    Returns:
        The answers, in the order of the prompts.
    """
    stops, marks = stop_tokens(model, tokenizer), Marks.of(tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tails = _decode([prompts[number] for number in chosen], model, stops, max_new_tokens, padding)
        for number, (tail, ended) in zip(chosen, tails, strict=True):
            answers[number] = Generated(marks.answer_in(tail, tokenizer), ended)
    return [answers[number] for number in range(len(prompts))]


@torch.no_grad()
def _decode(
    prompts: Sequence[Sequence[int]], model: Model, stops: Sequence[int], max_new_tokens: int, padding: int
) -> Iterator[tuple[list[int], bool]]:
    """The new tokens of each prompt before the one that ends them, and whether there was one."""
    model.network.eval()
    device = next(model.network.parameters()).device
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    with quiet_transformers():
        output = model.network.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stops) or None,
            pad_token_id=padding,
        )
    for row in output[:, length:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), None)
        yield row[:end], end is not None
