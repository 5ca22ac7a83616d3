"""A comparison equals separate evaluations; adapters are matched to their bases, and refused without one."""

import json
import math

import pytest
import tiny
from transformers import AutoModelForCausalLM

from adaptkit.errors import BaseMismatchError, DataError, UsageError
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.evaluation.comparison import compare
from adaptkit.training.evaluation.evaluate import evaluate
from adaptkit.training.evaluation.options import EvaluateOptions
from adaptkit.training.loop import train

FLOAT32 = {"compute_dtype": "float32", "device": "cpu", "window": 48, "batch_size": 4}


@pytest.fixture(scope="module")
def stranger(made):
    return tiny.write_llama(made / "stranger", seed=11, tied=False)


def test_reports_equal_those_of_separate_evaluations(llama, adapter, second_adapter, instructions, prose, made):
    more = tiny.write_instructions(made / "more.jsonl", seed=9)
    options = EvaluateOptions(shots=2, shots_from=(more,), generate=True, samples=3, max_new_tokens=4, **FLOAT32)
    plain = EvaluateOptions(generate=True, samples=3, max_new_tokens=4, **FLOAT32)
    answers = []
    found = compare([llama], [adapter, second_adapter], [instructions], options, text=[prose], on_answer=answers.append)
    assert found.models[0] == evaluate(llama, None, [instructions], plain, text=[prose])
    assert found.models[1] == evaluate(llama, None, [instructions], options)
    assert found.models[2] == evaluate(llama, adapter, [instructions], plain, text=[prose])
    assert found.models[3] == evaluate(llama, second_adapter, [instructions], plain, text=[prose])
    assert len({report.loss for report in found.models}) == 4
    assert [a.model for a in answers] == [report.label for report in found.models for _ in range(3)]
    (one, two) = found.forgetting
    assert (one.model, two.model) == (found.models[2].label, found.models[3].label)
    assert one.before == two.before == found.models[0].label
    assert (one.loss_before, one.loss_after) == (found.models[0].text.loss, found.models[2].text.loss)
    assert one.perplexity_after == pytest.approx(math.exp(one.loss_after))


def test_parameter_counts_equal_those_of_transformers(llama, adapter, instructions):
    report = evaluate(llama, adapter, [instructions], EvaluateOptions(**FLOAT32))
    assert report.parameters == AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    shapes = [layer.shape for layer in AutoModelForCausalLM.from_pretrained(llama).parameters() if layer.dim() == 2]
    assert report.trained_parameters == sum(4 * sum(shape) for shape in shapes[1:])  # all but the embedding, rank 4
    assert evaluate(llama, None, [instructions], EvaluateOptions(**FLOAT32)).trained_parameters is None


def test_a_trained_tied_embedding_is_counted_once_as_in_the_run(llama, instructions, tmp_path):
    config = TrainConfig(
        base=str(llama), data=(str(instructions),), steps=1, batch_size=2, rank=2, device="cpu",
        modules_to_save=("lm_head", "norm"),
    )  # fmt: skip
    trained = train(config, tmp_path / "trained").trainable_parameters
    report = evaluate(llama, tmp_path / "trained", [instructions], EvaluateOptions(**FLOAT32))
    assert report.trained_parameters == trained


def test_an_adapter_is_evaluated_on_the_base_that_its_manifest_names(llama, stranger, instructions, tmp_path, made):
    quantize(llama, tmp_path / "nf4")
    config = TrainConfig(
        base=str(tmp_path / "nf4"), data=(str(instructions),), steps=2, batch_size=2, device="cpu",
        compute_dtype="float32", rank=2, held_out=0.0,
    )  # fmt: skip
    train(config, tmp_path / "trained")
    options = EvaluateOptions(**FLOAT32)
    found = compare([stranger, llama, tmp_path / "nf4"], [tmp_path / "trained"], [instructions], options)
    assert [(report.base, report.adapter) for report in found.models[3:]] == [
        (str(tmp_path / "nf4"), str(tmp_path / "trained"))
    ]
    without = compare([stranger, llama], [tmp_path / "trained"], [instructions], options)  # its 16-bit parent fits, too
    assert without.models[2].base == str(llama)
    other = tiny.write_llama(tmp_path / "other", seed=12)
    with pytest.raises(BaseMismatchError, match="belongs to none of"):
        compare([stranger, other], [tmp_path / "trained"], [instructions], options)
    for wrong in (stranger, other):
        with pytest.raises(BaseMismatchError, match="belongs to another base"):
            evaluate(wrong, tmp_path / "trained", [instructions], options)
    quantize(other, tmp_path / "other-nf4")
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        evaluate(tmp_path / "other-nf4", tmp_path / "trained", [instructions], options)


def test_an_adapter_without_a_manifest_is_refused_if_there_are_several_bases(llama, stranger, adapter, instructions):
    with pytest.raises(UsageError, match="unknown which of the 2 bases"):
        compare([llama, stranger], [adapter], [instructions], EvaluateOptions(**FLOAT32))


def test_a_quantized_base_is_compared_with_its_source_and_others_with_the_first(llama, stranger, prose, tmp_path):
    quantize(llama, tmp_path / "nf4")
    found = compare([stranger, llama, tmp_path / "nf4"], text=[prose], options=EvaluateOptions(**FLOAT32))
    assert [(line.model, line.before) for line in found.forgetting] == [
        (str(llama), str(stranger)), (str(tmp_path / "nf4"), str(llama)),
    ]  # fmt: skip
    found = compare([tmp_path / "nf4", llama, stranger], text=[prose], options=EvaluateOptions(**FLOAT32))
    assert [(line.model, line.before) for line in found.forgetting] == [
        (str(tmp_path / "nf4"), str(llama)), (str(stranger), str(llama)),
    ]  # fmt: skip


def test_questions_that_do_not_fit_every_context_are_left_out_for_all_models(llama, gpt2, tmp_path):
    """Here GPT-2's context is 128 tokens, and Llama's 512."""
    rows = [{"instruction": "a " * 120, "output": "x"}, {"instruction": "short", "output": "y"},
            {"instruction": "brief", "output": "z"}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvaluateOptions(generate=True, max_new_tokens=20, **FLOAT32)
    found = compare([llama, gpt2], data=[path], options=options)
    assert [(r.generated.questions, r.generated.too_long) for r in found.models] == [(2, 1), (2, 1)]
    assert [(r.samples, r.truncated, r.dropped) for r in found.models] == [(3, 0, 0), (2, 0, 1)]
    assert compare([llama], data=[path], options=options).models[0].generated.questions == 3


def test_an_empty_answer_has_a_loss_with_and_without_examples_but_no_score(llama, instructions, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"ask {n}", "output": n * "x"}) + "\n" for n in (0, 1)))
    options = {"shots": 2, "shots_from": (instructions,), **FLOAT32}
    without, with_shots = compare([llama], data=[path], options=EvaluateOptions(**options)).models
    assert (without.samples, without.answer_tokens) == (with_shots.samples, with_shots.answer_tokens) == (2, 3)
    with pytest.raises(DataError, match="line 1: the answer is empty"):
        compare([llama], data=[path], options=EvaluateOptions(generate=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 2}, "shots: must be given together with shots_from"),
        ({"samples": 3}, "samples: needs generate"),
        ({"generate": True}, "generate: needs data"),
    ],
)
def test_incomplete_options_are_refused(options, message, llama, prose):
    with pytest.raises(UsageError, match=message):
        compare([llama], text=[prose], options=EvaluateOptions(**options, **FLOAT32))
