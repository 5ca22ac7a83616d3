"""Evaluation equals formulas, refuses meaningless requests, and reports what it left out."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from transformers import AutoModelForCausalLM

from adaptkit.data.dataset import load_data
from adaptkit.data.limits import pad_id
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import BaseMismatchError, DataError, IntegrityError, NonFiniteError, UsageError
from adaptkit.operations.adopt import adopt
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.evaluation import perplexity
from adaptkit.training.evaluation.comparison import compare
from adaptkit.training.evaluation.evaluate import EvaluateOptions, evaluate
from adaptkit.training.loop import train


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("max_length", 1), ("max_new_tokens", 0), ("window", 1), ("max_tokens", 1),
     ("compute_dtype", "float16")],
)  # fmt: skip
def test_unusable_options_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        EvaluateOptions(**{name: value})


@pytest.mark.parametrize(
    ("pad", "end", "expected"), [(0, 5, 0), (3, 5, 3), (None, 5, 5), (None, None, 0), (9999, 5, 0), (None, 9999, 0)]
)
def test_padding_is_the_pad_or_end_token_or_zero_if_the_model_lacks_that_token(pad, end, expected, llama):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end), llama) == expected


def test_truncated_and_dropped_samples_are_counted(llama, instructions):
    whole = load_data([instructions], load_tokenizer(llama), 1024)
    length = sorted(len(sample.ids) for sample in whole.samples)[len(whole.samples) // 2]
    options = EvaluateOptions(max_length=length, compute_dtype="float32", device="cpu")
    report = evaluate(llama, None, [instructions], options)
    assert report.truncated + report.dropped == sum(len(sample.ids) > length for sample in whole.samples) > 0
    assert report.samples + report.dropped == len(whole.samples)


def test_answers_with_an_end_token_are_noted_and_scored_as_those_without(llama, tmp_path):
    """Generated answers are decoded without special tokens."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "well?", "completion": "fine"}\n')
    (tmp_path / "ended.jsonl").write_text('{"prompt": "well?", "completion": "fine<|im_end|>"}\n')
    options = EvaluateOptions(generate=True, max_new_tokens=4, compute_dtype="float32", device="cpu")
    answers = {}
    reports = {
        name: evaluate(
            llama, None, [tmp_path / name], options, on_answer=lambda answer, name=name: answers.update({name: answer})
        )
        for name in ("rows.jsonl", "ended.jsonl")
    }
    assert answers["rows.jsonl"] == answers["ended.jsonl"]
    assert reports["rows.jsonl"].generated == reports["ended.jsonl"].generated
    assert reports["rows.jsonl"].unused_remarks == []
    assert reports["ended.jsonl"].unused_remarks == [
        "1 row has an answer with an end token, and the loss counts another after it"
    ]


def test_special_tokens_in_questions_are_reported(llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "<|im_start|>well?", "completion": "fine"}\n')
    report = evaluate(llama, None, [tmp_path / "rows.jsonl"], EvaluateOptions(device="cpu"))
    assert report.unused_remarks == ["1 row has a special token in a message or tool, which is not read as text"]


def test_references_equal_but_for_end_tokens_count_once_and_an_end_token_alone_is_refused(llama, tmp_path):
    options = EvaluateOptions(generate=True, max_new_tokens=4, compute_dtype="float32", device="cpu")
    path, reports = tmp_path / "rows.jsonl", []
    for answers in ["fine"], ["fine", "fine<|im_end|>", "fine<|im_end|>\n"]:
        path.write_text("".join(json.dumps({"prompt": "well?", "completion": answer}) + "\n" for answer in answers))
        reports.append(evaluate(llama, None, [path], options))
    assert reports[0].generated == reports[1].generated
    path.write_text('{"prompt": "well?", "completion": " <|im_end|>"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: an answer is empty but for an end token"):
        evaluate(llama, None, [path], options)
    assert evaluate(llama, None, [path], replace(options, generate=False)).samples == 1


FLOAT32 = {"compute_dtype": "float32", "device": "cpu"}


def log_probabilities(folder, windows):
    """Return transformers' log-probabilities of all next tokens, (tokens, vocabulary), in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(windows).logits[:, :-1].reshape(-1, model.config.vocab_size).log_softmax(-1)


def test_perplexity_and_divergence_equal_formulas_on_transformers_models(llama, made, prose):
    other = tiny.write_llama(made / "other-seed", seed=3)
    ids = load_tokenizer(llama)(prose.read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    found, expected = log_probabilities(other, windows), log_probabilities(llama, windows)
    wanted = windows[:, 1:].reshape(-1, 1)
    report = evaluate(other, None, (), EvaluateOptions(window=32, **FLOAT32), text=[prose], reference=llama).text
    assert (report.windows, report.tokens) == (len(windows), wanted.numel())
    assert report.loss == pytest.approx(float(-found.gather(1, wanted).mean()), abs=1e-5)
    assert report.perplexity == pytest.approx(float((-found.gather(1, wanted).mean()).exp()), rel=1e-5)
    assert report.reference_loss == pytest.approx(float(-expected.gather(1, wanted).mean()), abs=1e-5)
    divergence = (expected.exp() * (expected - found)).sum(1).mean()
    assert report.kl_divergence == pytest.approx(float(divergence), rel=1e-4)
    assert report.same_top_token == pytest.approx(float((found.argmax(1) == expected.argmax(1)).double().mean()))
    assert divergence > 0.01
    reverse = (found.exp() * (found - expected)).sum(1).mean()
    assert abs(float(reverse - divergence)) > 1e-3 * float(divergence)  # so the test distinguishes both directions


def test_a_confident_prediction_has_the_loss_of_float64():
    """Each of the other tokens is too improbable to be added to 1 in float32, but all together are not."""
    logits = torch.zeros(2, 50_000).index_fill(1, torch.tensor([0]), 17.0)
    wanted = torch.zeros(2, dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum")
    assert float(perplexity._text_sums(logits, wanted, None)[0]) == pytest.approx(float(expected), rel=1e-3)


def test_a_constant_added_to_all_logits_changes_no_loss_or_divergence():
    """So large logits lose no digits of the small differences between two models."""
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randint(-64, 64, (5, 300), generator=generator) / 16 for _ in range(2))
    wanted = torch.arange(5)
    expected = perplexity._text_sums(logits, wanted, others)
    assert torch.equal(perplexity._text_sums(logits + 1024, wanted, others - 4096), expected)


def test_a_model_does_not_diverge_from_itself(llama, prose):
    options = EvaluateOptions(window=48, max_tokens=96, **FLOAT32)
    report = evaluate(llama, None, (), options, text=[prose], reference=llama).text
    assert (report.windows, report.kl_divergence, report.same_top_token) == (2, 0.0, 1.0)
    assert report.loss == report.reference_loss
    alone = evaluate(llama, None, (), options, text=[prose])
    assert alone.text.loss == report.loss
    assert alone.text.reference is alone.text.kl_divergence is alone.loss is None


def test_a_model_with_an_adapter_diverges_from_its_base(llama, adapter, prose):
    options = EvaluateOptions(window=48, **FLOAT32)
    assert evaluate(llama, adapter, (), options, text=[prose], reference=llama).text.kl_divergence > 1e-3


def test_a_reference_with_a_different_vocabulary_or_without_text_is_refused(llama, copy_of, prose):

    smaller = copy_of(llama)
    with edited_tensors(smaller / "model.safetensors") as tensors:
        rows = len(tensors["model.embed_tokens.weight"]) - 1
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    edit_json(smaller / "config.json", vocab_size=rows)
    options = EvaluateOptions(**FLOAT32)
    with pytest.raises(BaseMismatchError, match=f"has {rows} tokens, but "):
        evaluate(llama, None, (), options, text=[prose], reference=smaller)
    with pytest.raises(UsageError, match="reference: needs text"):
        evaluate(llama, None, (), EvaluateOptions(prompts=("x",)), reference=llama)
    with pytest.raises(UsageError, match="max_tokens: needs text"):
        evaluate(llama, None, (), EvaluateOptions(prompts=("x",), max_tokens=64))
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(llama)


def test_a_token_outside_the_models_vocabulary_is_refused(llama, copy_of, tmp_path):
    folder = copy_of(llama)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "new.txt").write_text("something unheard of")
    with pytest.raises(UsageError, match="the tokenizer produces token 301, but the model's vocabulary has 301"):
        evaluate(folder, None, (), EvaluateOptions(**FLOAT32), text=[tmp_path / "new.txt"])


@pytest.mark.parametrize("measured", ["data", "text", "reference"])
@pytest.mark.parametrize("matrix", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"])
def test_a_non_finite_loss_is_an_error_that_names_the_model(llama, copy_of, instructions, prose, measured, matrix):

    base = copy_of(llama)
    with edited_tensors(base / "model.safetensors") as tensors:
        tensors[f"model.{matrix}.weight"][0, 0] = torch.nan
    options = EvaluateOptions(window=64, max_tokens=None if measured == "data" else 128, device="cpu")
    given = {"data": [instructions]} if measured == "data" else {"text": [prose]}
    model, reference = (llama, base) if measured == "reference" else (base, None)
    with pytest.raises(NonFiniteError, match=f"{base}: the loss .* is nan"):
        evaluate(model, options=options, reference=reference, **given)


def test_the_table_shows_text_measurements_and_the_number_of_truncated_samples(llama, instructions, prose, run_cli):
    lengths = sorted(len(s.ids) for s in load_data([instructions], load_tokenizer(llama), 1024).samples)
    done = run_cli(
        "evaluate", "--base", llama, "--reference", llama, "--text", prose, "--window", 64, "--data", instructions,
        "--max-length", lengths[len(lengths) // 2], "--compute-dtype", "float32",
    )  # fmt: skip
    assert (done.code, done.stderr) == (0, "")
    table = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert "samples cut to --max-length" in table["note"]
    assert float(table["text perplexity"]) > 1
    assert (float(table["KL"]), float(table["same top %"])) == (0, 100)
    wrong = run_cli("evaluate", "--base", llama, "--text", prose, "--window", 513)
    assert wrong.code == 2
    assert "longer than" in wrong.stderr
    assert wrong.stderr.endswith("--window 512\n")


def test_chat_template_variables_that_differ_from_training_are_noted(
    llama, copy_of, instructions, prose, tmp_path, run_cli
):
    base = copy_of(llama)
    template = base / "chat_template.jinja"
    template.write_text("{% if mood %}{{ mood }}{% endif %}" + template.read_text())
    config = TrainConfig(
        base=str(base), data=(str(instructions),), rank=2, steps=1, device="cpu", chat_template_kwargs={"mood": "so"}
    )
    train(config, tmp_path / "moody")
    train(replace(config, chat_template_kwargs=None), tmp_path / "plain")

    def told(adapter, **kwargs):
        options = EvaluateOptions(prompts=("hello",), max_new_tokens=1, chat_template_kwargs=kwargs, **FLOAT32)
        return evaluate(base, adapter and tmp_path / adapter, [], options).trained_template

    assert told("moody") == {"mood": "so"} == told("moody", mood="other")
    assert told("plain", mood="so") == {}
    assert told("moody", mood="so") is told("plain") is told(None, mood="so") is None
    on_text = EvaluateOptions(**FLOAT32)
    assert evaluate(base, tmp_path / "moody", [], on_text, text=[prose]).trained_template is None
    done = run_cli(
        "evaluate", "--base", base, "--adapter", tmp_path / "moody", "--data", instructions, "--device", "cpu"
    )
    assert 'note         trained with chat_template_kwargs mood="so", unlike this evaluation' in done.stdout
    done = run_cli(
        "evaluate", "--base", base, "--adapter", tmp_path / "plain", "--data", instructions, "--device", "cpu",
        "--compare", "--chat-template-kwargs", "mood=so",
    )  # fmt: skip
    assert "trained with no chat_template_kwargs, unlike this evaluation (" in done.stdout


@pytest.mark.parametrize(
    "measure",
    [
        lambda folder, other, **given: evaluate(folder, None, (), **given),
        lambda folder, other, **given: evaluate(other, None, (), reference=folder, **given),
        lambda folder, other, **given: compare([other, folder], **given),
        lambda folder, other, **given: compare([other], reference=folder, **given),
    ],
    ids=["base", "reference", "one of several", "reference of several"],
)
@pytest.mark.parametrize("swapped", ["model.safetensors", "config.json"])
def test_a_checkpoint_whose_files_differ_from_its_manifest_is_refused(
    measure, swapped, llama, llama_nf4, prose, tmp_path, copy_of
):
    hidden = 32 if swapped == "config.json" else 64
    quantize(tiny.write_llama(tmp_path / "other", seed=8, hidden=hidden), tmp_path / "other-nf4")
    folder = copy_of(llama_nf4)
    (folder / swapped).write_bytes((tmp_path / "other-nf4" / swapped).read_bytes())
    with pytest.raises(IntegrityError, match=r"differs from its fingerprint|config\.json"):
        measure(folder, llama, options=EvaluateOptions(window=32, **FLOAT32), text=[prose])


def test_a_base_whose_header_says_another_dtype_than_its_manifest_is_refused(llama_nf4, prose, copy_of):
    """All its bytes have the fingerprints that the manifest says."""
    folder = copy_of(llama_nf4)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    assert b'"BF16"' in content
    weights.write_bytes(content.replace(b'"BF16"', b'"F16" ', 1))
    with pytest.raises(IntegrityError, match="as the manifest says"):
        evaluate(folder, None, (), EvaluateOptions(window=32, **FLOAT32), text=[prose])


def test_a_base_with_a_tensor_that_its_manifest_does_not_list_is_refused(llama_nf4, prose, copy_of):
    folder = copy_of(llama_nf4)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["extra.weight"] = torch.zeros(2)
    with pytest.raises(IntegrityError, match=r"tensor extra\.weight is not in the manifest"):
        evaluate(folder, None, (), EvaluateOptions(window=32, **FLOAT32), text=[prose])


@pytest.mark.parametrize("measure", [evaluate, lambda base, *given: compare([base], [given[0]], *given[1:])])
def test_an_adapter_whose_files_differ_from_its_manifest_is_refused(
    measure, llama, adapter, second_adapter, instructions, certified
):
    folder = certified(adapter, llama)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((second_adapter / name).read_bytes())
    with pytest.raises(IntegrityError, match="not match its manifest"):
        measure(llama, folder, [instructions], EvaluateOptions(**FLOAT32))


@pytest.mark.parametrize("name", ["resized", "resized_tied", "resized_saved", "resized_embedding"])
@pytest.mark.parametrize("more", [[], ["--compare"]])
def test_an_adapter_with_a_resized_vocabulary_is_refused_before_data_or_weights_are_read(
    tmp_path, made, run_cli, name, more
):
    (tmp_path / "rows.jsonl").write_text("no rows")
    case = peft_adapters.make(made, name)
    command = ["evaluate", "--base", case.base, "--adapter", case.adapter, "--data", tmp_path / "rows.jsonl", *more]
    error, hint = run_cli(*command).refusal(4)
    assert "expected shape [301, 64], as in the base, found [310, 64]" in error
    assert "merge it into its base instead" in hint


def test_of_several_bases_too_the_adapters_must_have_its_vocabulary(tmp_path, made, llama, run_cli):
    (tmp_path / "rows.jsonl").write_text("no rows")
    case = peft_adapters.make(made, "resized")
    adopt(case.adapter, tmp_path / "ours", base=case.base)
    bases = ["--base", llama, "--base", case.base]
    command = ["evaluate", *bases, "--adapter", tmp_path / "ours", "--data", tmp_path / "rows.jsonl"]
    assert "expected shape [301, 64], as in the base, found [310, 64]" in run_cli(*command).refusal(4)[0]
