"""How runs start, with or without an initial adapter, and which settings the library and the command refuse."""

import shutil
from dataclasses import replace

import peft_adapters
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from interrupted import stop_after
from peft_formulas import running

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import AdapterError, BaseMismatchError, ConfigError, UsageError
from adaptkit.models.base_weights import Weights, check_base
from adaptkit.operations.check import check
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import merge
from adaptkit.operations.verify import verify
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model
from adaptkit.training.network.start import add_trainable, read_start, resolve_method
from adaptkit.training.result import records_of, write_result

CPU = torch.device("cpu")
IDS = torch.arange(2, 298).view(8, 37)
RUN = {"rank": 4, "compute_dtype": "float32", "device": "cpu"}


def begun(base, dtype=torch.float32, **settings):
    own = {"rank": 16} if "init" in settings else {}  # the default: as if the option was not given
    config = resolve_method(TrainConfig(base=str(base), data=("none",), **RUN | own | settings), Checkpoint(base))
    model = load_model(base, dtype, CPU)
    start = read_start(config, None)
    add_trainable(model, config, start, load_tokenizer(base))
    return model, config, start


def logits(network):
    with torch.no_grad():
        return network(IDS).logits


BEGUN = [
    "linear_patterns", "dora_rslora", "dora_conv1d", "biases_all_conv1d", "biases_lora_only", "saved_mlp", "lora_bias",
    "saved_norms",
    "saved_head_tied", "saved_both_tied", "saved_tied_ensured", "tokens_tied", "tokens_both_tied", "tokens_head_tied",
    "experts_qwen3", "experts_down_only", "experts_transposed", "experts_weight", "everything",
]  # fmt: skip


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_starts_as_the_model_that_peft_loads_and_writes_an_equal_adapter(name, made, tmp_path):
    case = peft_adapters.make(made, name)
    model, config, start = begun(case.base, init=str(case.adapter))
    Trainable.of(model)
    expected = logits(model.network)
    with Output(tmp_path / "adapter", "plan") as out:
        out.publish(write_result(out, model, config, None, records_of(model.checkpoint, None), start, []))
    for adapter in (case.adapter, tmp_path / "adapter"):
        assert float((logits(running(case.base, adapter)) - expected).abs().max()) < 2e-5
    again = load_model(case.base, torch.float32, CPU)
    load_adapter(again, read_adapter(tmp_path / "adapter"))
    trained = [{n: p for n, p in m.network.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(p, trained[1][n]) for n, p in trained[0].items())
    assert require_manifest(tmp_path / "adapter").parents[1].role == "init"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("embedding_tied", AdapterError, "low-rank change of an embedding"),
        ("head", AdapterError, "low-rank change of the output layer"),
        ("resized_tied", BaseMismatchError, r"expected shape \[301, 64\], as in the base, found \[310, 64\]"),
        ("experts_one_by_one_qwen3", BaseMismatchError, r"experts\.0\.down_proj"),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_refused_with_the_reason(name, error, message, made):
    case = peft_adapters.make(made, name)
    with pytest.raises(error, match=message) as caught:
        begun(case.base, init=str(case.adapter))
    assert "merge it into its base instead" in caught.value.hint


def test_a_norm_of_another_model_is_not_taken_for_a_resized_vocabulary(llama, tmp_path):
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", llama, modules_to_save=["norm"])
    with edited_tensors(adapter / "adapter_model.safetensors") as tensors:
        tensors["base_model.model.model.norm.weight"] = torch.ones(128)
    with pytest.raises(BaseMismatchError, match=r"expected shape \[64\], as in the base, found \[128\]") as caught:
        begun(llama, init=str(adapter))
    assert "the model that the adapter was trained on" in caught.value.hint


def test_a_run_can_continue_lora_as_dora_and_train_further_parameters(llama, adapter):
    """Magnitudes are initialized to the row norms of weight plus adapter, so that no logit changes."""
    model, _, _ = begun(llama, init=str(adapter), dora=True, modules_to_save=("norm",), trainable_tokens=("%",))
    plain, _, _ = begun(llama, init=str(adapter))
    assert float((logits(model.network) - logits(plain.network)).abs().max()) < 1e-5
    names = [name for name, p in model.network.named_parameters() if p.requires_grad]
    for word in ("magnitude", "norm", "trained_rows", "lora_a"):
        assert any(word in name for name in names)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"targets": ("q_proj", "c_attn")}, "target 'c_attn' matches no linear layer", "down_proj"),
        ({"exclude": ("nothing",)}, "exclude pattern 'nothing' matches no linear layer", "down_proj"),
        ({"targets": ("q_proj",), "exclude": ("*",)}, "every target is excluded", "exclude"),
        ({"rank": 33}, "rank: must be at most 32, since .*k_proj is 32 x 64; found 33", "k_proj=32"),
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern: 'qproj' matches no module", "q_proj"),
        ({"alpha_pattern": {"o_proj.weight": 2}}, "alpha_pattern: 'o_proj.weight' matches no module", "q_proj"),
        ({"modules_to_save": ("score",)}, "modules_to_save: no module is called 'score'", "lm_head"),
        ({"modules_to_save": ("",)}, "modules_to_save: no module is called ''", "lm_head"),
        ({"modules_to_save": ("down_proj",), "targets": ("down_proj",)}, "or trained in full", "--modules-to-save"),
        ({"bias": "all"}, "bias: all, but there are no biases", "--bias none"),
        ({"trainable_tokens": ("<|nothing|>",)}, r"'<\|nothing\|>' is not in the vocabulary", "exact text"),
        ({"trainable_tokens": ("7",)}, "7 is the text of token 25 and the ID of another", "25 for"),
        ({"targets": ("lm_head",)}, "'lm_head' matches no linear layer besides the output layer", "down_proj"),
        ({"trainable_tokens": ("301",)}, r"embed_tokens: has 301 rows, but no row 301", "vocabulary"),
        ({"trainable_tokens": ("%",), "modules_to_save": ("lm_head",)}, "already trained in full", "--trainable-to"),
        ({"target_parameters": ("*.experts.*",)}, "'[*].experts.[*]' matches no stack", "has none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_refused_with_a_hint(llama, settings, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        begun(llama, **settings)
    assert hint in caught.value.hint


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_too_long_to_match_is_refused_by_its_setting(llama, setting):
    with pytest.raises(AdapterError, match=f"{setting}: .* takes too long to match") as caught:
        begun(llama, **{setting: {r"(((\w|\w\w|\w\w\w|\.)+)+)+\d\d": 2}})
    assert (caught.value.exit_code, caught.value.hint) == (5, "use a simpler pattern, without nested repetition")


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_rows_of_a_table_that_is_trained_in_full_is_refused_in_every_dtype(llama, name, dtype):
    """In bfloat16 such a table is no longer a parameter of its module; the error must not blame the base for that."""
    with pytest.raises(UsageError, match=r"embed_tokens\.weight: is already trained in full"):
        begun(llama, dtype, trainable_tokens=("%",), modules_to_save=(name,))


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_quantized_weights_cannot_be_trained_in_full(llama_nf4, name):
    with pytest.raises(UsageError, match=rf"{name}\.weight: is quantized") as caught:
        begun(llama_nf4, modules_to_save=(name,))
    assert "--skip 'model.layers.0" in caught.value.hint


@pytest.mark.parametrize(("name", "value"), [("rslora", True), ("rank", 2), ("alpha", 3.0), ("targets", ("q_proj",))])
def test_settings_that_the_initial_adapter_determines_cannot_be_given(adapter, name, value):
    with pytest.raises(ConfigError, match=f"^{name}: is determined by the adapter to start from"):
        TrainConfig(base="nowhere", data=("none",), init=str(adapter), **{name: value})
    assert name not in TrainConfig(base="nowhere", data=("none",), init=str(adapter)).recorded()


@pytest.mark.parametrize(
    ("name", "added", "what"),
    [
        ("dora_rslora", {"lora_bias": True}, "lora_bias: cannot be combined with the dora of"),
        ("lora_bias", {"dora": True}, "dora: cannot be combined with the lora_bias of"),
        ("experts_qwen3", {"dropout": 0.1}, "dropout: cannot be combined with the expert matrices of"),
        ("experts_qwen3", {"dora": True}, "dora: cannot be combined with the expert matrices of"),
        ("experts_qwen3", {"lora_bias": True}, "lora_bias: cannot be combined with the expert matrices of"),
        ("tokens_tied", {"trainable_tokens": ("268",)}, "some of its rows are already trained"),
        ("tokens_tied", {"modules_to_save": ("embed_tokens",)}, "some of its rows are already trained"),
        ("tokens_tied", {"modules_to_save": ("lm_head",)}, "some of its rows are already trained"),
    ],
)
def test_settings_that_conflict_with_the_initial_adapter_are_refused(name, added, what, made):
    """Before the first step, since neither adaptkit nor peft could load the result."""
    case = peft_adapters.make(made, name)
    with pytest.raises(UsageError, match=what) as caught:
        begun(case.base, init=str(case.adapter), **added)
    assert "leave" in caught.value.hint


def test_a_token_that_is_named_twice_is_trained_once(llama, instructions, tmp_path):
    number = 268
    tokens = (load_tokenizer(llama).convert_ids_to_tokens(number), str(number), f"0{number}")
    config = TrainConfig(
        base=str(llama), data=(str(instructions),), steps=1, batch_size=2, trainable_tokens=tokens, **RUN
    )
    train(config, tmp_path / "adapter")
    (rows,) = read_adapter(tmp_path / "adapter").tokens.values()
    assert list(rows.indices) == [number]


def test_a_base_that_another_tool_quantized_is_refused_with_a_hint(llama, copy_of):
    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config={"quant_method": "hqq"})
    with pytest.raises(UsageError, match="quantized with hqq") as caught:
        resolve_method(TrainConfig(base=str(folder), data=("none",)), Checkpoint(folder))
    assert "adaptkit quantize" in caught.value.hint


def test_a_run_with_many_options_learns_and_verify_inspect_and_check_accept_it(
    llama_nf4, llama, instructions, tmp_path
):
    settings = {"dora": True, "rslora": True, "modules_to_save": ("norm",), "trainable_tokens": ("<|im_start|>",)}
    config = TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), steps=8, batch_size=4, learning_rate=5e-3, dropout=0.1,
        rank_pattern={"q_proj": 2}, lora_plus_ratio=4.0, **RUN | settings,
    )  # fmt: skip
    report = train(config, tmp_path / "adapter")
    assert report.held_out_after < 0.95 * report.held_out_before
    options = require_manifest(tmp_path / "adapter").operation["options"]
    assert options["method"] == "qlora"
    assert (options["dora"], options["rank_pattern"], options["trainable_tokens"]) == (
        True, [["q_proj", 2]], ["<|im_start|>"],
    )  # fmt: skip
    assert verify(tmp_path / "adapter").kind == "adapter"
    assert inspect(tmp_path / "adapter").kind == "adapter"
    assert {verdict.taken for verdict in check(tmp_path / "adapter", ["peft"], llama).verdicts} == {True}


def test_training_continues_with_the_magnitudes_that_were_learned(made):
    case = peft_adapters.make(made, "dora_rslora")
    models = [begun(case.base, init=str(case.adapter), **said)[0] for said in ({}, {"dora": True})]
    for name, layer in models[0].adapted().items():
        assert torch.equal(layer.magnitude, models[1].linears[name].magnitude)


def test_lora_on_a_plain_base_records_the_fingerprints_of_its_weights(llama, instructions, tmp_path):
    from adaptkit.checkpoint.hashing import fingerprint

    config = TrainConfig(base=str(llama), data=(str(instructions),), steps=2, batch_size=2, **RUN)
    train(config, tmp_path / "adapter")
    manifest, checkpoint = require_manifest(tmp_path / "adapter"), Checkpoint(llama)
    assert manifest.operation["options"]["method"] == "lora"
    assert len(manifest.targets) == 14
    for target in manifest.targets:
        assert target.base_xxh3_128 == fingerprint(checkpoint.read(f"{target.module}.weight"))


def test_an_adapter_names_its_base_by_hub_name_or_folder_name(llama, instructions, tmp_path):
    """A folder in huggingface_hub's cache is named after a commit, which does not identify the model."""
    copied = shutil.copytree(llama, tmp_path / "models--org--copy" / "snapshots" / ("b" * 40))
    for folder, name in ((copied, "org/copy"), (llama, llama.name)):
        config = TrainConfig(base=str(folder), data=(str(instructions),), steps=1, batch_size=2, **RUN)
        train(config, tmp_path / "adapter", force=True)
        assert read_adapter(tmp_path / "adapter").config["base_model_name_or_path"] == name


def test_the_command_reports_errors_in_one_line_with_a_hint(run_cli, llama, llama_nf4, instructions, tmp_path):
    def train_with(base, *options):
        done = run_cli("train", "--base", base, "--data", instructions, "-o", tmp_path / "out", *options)
        error, hint = done.stderr.strip().splitlines()[-2:]
        assert "Traceback" not in done.stderr
        assert hint.strip().startswith("hint:")
        return done.code, error

    code, error = train_with(llama_nf4, "--method", "full")
    assert (code, "is quantized; method full" in error) == (2, True)
    code, error = train_with(llama, "--rank-pattern", "q_proj=0")
    assert (code, "--rank-pattern: " in error) == (2, True)
    code, error = train_with(llama, "--modules-to-save", "score", "--steps", "1")
    assert (code, "no module is called 'score'" in error) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "learning_rate": 1e-3},
        {"rank": 4, "dora": True, "dropout": 0.2, "modules_to_save": ("lm_head",), "lora_plus_ratio": 8.0},
        {"rank": 4, "rslora": True, "trainable_tokens": ("%", "<|im_end|>")},
    ],
    ids=["full", "dora", "tokens"],
)
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bytes(llama, instructions, settings, tmp_path):
    config = TrainConfig(
        base=str(llama), data=(str(instructions),), steps=6, batch_size=4, compute_dtype="bfloat16", device="cpu",
        **settings,
    )  # fmt: skip
    expected = train(config, tmp_path / "whole")
    stop_after(config, tmp_path / "stopped", 4)
    report = train(config, tmp_path / "stopped")
    assert report.resumed_from > 0
    assert report.manifest_sha256 == expected.manifest_sha256
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_an_adapter_of_a_quantized_base_can_start_on_its_plain_base_but_on_no_other(
    llama, llama_nf4, instructions, tmp_path
):
    config = TrainConfig(base=str(llama_nf4), data=(str(instructions),), steps=1, batch_size=2, **RUN)
    train(config, tmp_path / "adapter")
    begun(llama, init=str(tmp_path / "adapter"))
    other = tiny.write_llama(tmp_path / "other", seed=5)
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        begun(other, init=str(tmp_path / "adapter"))


def test_a_run_can_start_from_an_adapter_of_a_checkpoint_with_a_manifest(llama, instructions, tmp_path):
    config = TrainConfig(base=str(llama), data=(str(instructions),), steps=1, batch_size=2, device="cpu")
    train(replace(config, method="full"), tmp_path / "tuned")
    on_tuned = replace(config, base=str(tmp_path / "tuned"))
    train(replace(on_tuned, rank=4), tmp_path / "first")
    train(replace(on_tuned, init=str(tmp_path / "first")), tmp_path / "second")
    roles = {parent.role: parent.kind for parent in require_manifest(tmp_path / "second").parents}
    assert roles == {"base": "checkpoint", "init": "adapter"}


def test_a_merged_model_is_a_different_base_than_its_source(llama, instructions, tmp_path):
    config = TrainConfig(base=str(llama), data=(str(instructions),), steps=1, learning_rate=5e-2, device="cpu")
    train(config, tmp_path / "first")
    merge(llama, [tmp_path / "first"], tmp_path / "merged")
    first = read_adapter(tmp_path / "first")
    check_base(first, Weights(llama))
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        check_base(first, Weights(tmp_path / "merged"))
    train(replace(config, base=str(tmp_path / "merged")), tmp_path / "second")
    check_base(read_adapter(tmp_path / "second"), Weights(tmp_path / "merged"))
    merge(tmp_path / "merged", [tmp_path / "second"], tmp_path / "again")
    with pytest.raises(BaseMismatchError):
        merge(llama, [tmp_path / "second"], tmp_path / "wrong")
