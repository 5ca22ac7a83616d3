"""Evaluation refuses options that mean nothing, pads as told, and says what it left out."""

from types import SimpleNamespace

import pytest

from adaptkit.checkpoint.architecture import load_tokenizer
from adaptkit.errors import UsageError
from adaptkit.training.data import load_data
from adaptkit.training.evaluate import EvaluateOptions, evaluate, pad_id


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"max_length": 1}, {"max_new_tokens": 0}, {"compute_dtype": "float16"}]
)
def test_options_that_cannot_be_used_are_refused_by_name(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        EvaluateOptions(**wrong)


@pytest.mark.parametrize(("pad", "end", "expected"), [(0, 5, 0), (3, 5, 3), (None, 5, 5), (None, None, 0)])
def test_padding_is_the_pad_token_even_if_it_is_zero(pad, end, expected):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == expected


def test_samples_that_were_cut_or_left_out_are_counted(llama, instructions):
    whole = load_data([instructions], load_tokenizer(llama), 1024)
    length = sorted(len(sample.ids) for sample in whole.samples)[len(whole.samples) // 2]
    options = EvaluateOptions(max_length=length, compute_dtype="float32", device="cpu")
    report = evaluate(llama, None, [instructions], options)
    assert report.truncated == sum(len(sample.ids) > length for sample in whole.samples) > 0
    assert report.samples + report.dropped == len(whole.samples)
