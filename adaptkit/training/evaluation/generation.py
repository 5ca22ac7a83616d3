"""Greedy decoding in batches, with the key-value cache: the same answers as for one prompt at a time.

This holds up to rounding: in bfloat16, two nearly equally likely tokens may swap ranks with the batch size.

Prompts of one batch are padded on the left, where the mask hides the padding and positions do not count it. Some models
count it nevertheless, or mix the rows of a batch: these are detected first, and get one prompt at a time. An answer
ends at the first token that ends a turn: the tokenizer's end token, those of ``generation_config.json`` (or, without
it, of ``config.json``), or what the chat template puts after an answer, which is another token in some models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptkit.data.ending import named_ends, turn_end
from adaptkit.data.limits import pad_id
from adaptkit.models.architecture import quiet_transformers
from adaptkit.training.device import name_of
from adaptkit.training.dtype_errors import reports_failed_answers
from adaptkit.training.evaluation.final import Marks
from adaptkit.training.network.model import Model

_STEPS = 3
"""Tokens generated to detect whether batching changes them: the first from the prompt, the others from the cache."""
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Limit of logit changes, in standard deviations of the logits. In bfloat16, rounding reaches 0.05; padding, 0.2."""


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: answer without reasoning, special tokens and surrounding white space.
        ended: whether the model ended it, rather than the limit of new tokens.
    """

    text: str
    ended: bool


def stop_tokens(model: Model, tokenizer: Any) -> list[int]:
    """Return every token that ends an answer, sorted."""
    found = {tokenizer.eos_token_id, turn_end(tokenizer), *named_ends(model.checkpoint.root)}
    return sorted(token for token in found if isinstance(token, int))


def generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Generated]:
    """Answer prompts by greedy decoding.

    Args:
        model: model on its device.
        tokenizer: tokenizer of the model.
        prompts: token IDs of each prompt, at least one; prompts of similar length are batched.
        max_new_tokens: maximum tokens of an answer.
        batch_size: prompts at a time, if batching does not change the model's answers.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        UsageError: transformers' code for the architecture cannot generate.
    """
    stops, marks = stop_tokens(model, tokenizer), Marks.of(tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, Generated] = {}
    steps, padding = min(_STEPS, max_new_tokens), pad_id(tokenizer, model.checkpoint.root)
    if min(batch_size, len(order)) > 1 and not _takes_batches(model, prompts[order[-1]], steps, padding):
        batch_size = 1
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        asked = [prompts[number] for number in chosen]
        tails, _ = _continue(model, asked, max_new_tokens, padding, eos_token_id=stops or None)
        for number, tail in zip(chosen, tails.tolist(), strict=True):
            end = next((place for place, token in enumerate(tail) if token in stops), None)
            answers[number] = Generated(marks.answer_in(tail[:end], tokenizer), end is not None)
    return [answers[number] for number in range(len(prompts))]


def _takes_batches(model: Model, prompt: Sequence[int], steps: int, padding: int) -> bool:
    """Whether the beginning of a prompt gets the same continuation in a batch with the whole prompt as by itself.

    It does not if positions count the padding, as in BART's decoder, or if a layer's state includes the padding, as in
    RecurrentGemma, or other rows, as in transformers' RWKV.
    """
    padded = (len(prompt) // 2 - 1) | 1  # odd, because some layers group tokens by four
    part = prompt[: len(prompt) - padded] or prompt
    (alone,), first = _continue(model, [part], steps, padding, output_logits=True)
    (_, beside), second = _continue(model, [prompt, part], steps, padding, output_logits=True)
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        expected, found = one[0].float(), other[1].float()
        if float((found - expected).std()) > _TOLERANCES[model.dtype] * float(expected.std()):
            return False
        if alone[step] != beside[step]:  # later logits follow different tokens
            break
    return True


@torch.no_grad()
def _continue(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, padding: int, **more: Any
) -> tuple[Tensor, Sequence[Tensor]]:
    """Continue each prompt greedily; return the new tokens, and each step's logits if requested.

    The model's own generation configuration, such as BART's forced last token, is discarded.
    """
    model.network.eval()
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    reports = reports_failed_answers(model.checkpoint.root, name_of(model.dtype))
    head = model.network.get_output_embeddings() or torch.nn.Identity()
    with quiet_transformers() as transformers, reports, head.register_forward_pre_hook(_copied):
        model.network.generation_config = transformers.GenerationConfig()
        output = model.network.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=padding,
            return_dict_in_generate=True,
            **more,
        )
    return output.sequences[:, length:], output.logits or ()


def _copied(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the hidden states of the last positions, which are a part of all positions'.

    Otherwise torch multiplies by the head row by row of the batch, and on a CPU in bfloat16 copies its weight for every
    row: 57 MB for SmolLM2.
    """
    return tuple(hidden.clone(memory_format=torch.contiguous_format) for hidden in inputs)
