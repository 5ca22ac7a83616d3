"""Options from files: unknown keys and unusable values are refused by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from adaptkit.documents import Document, Place, read_document
from adaptkit.errors import ConfigError
from adaptkit.settings import read_settings
from adaptkit.training.config import TrainConfig

GOOD = {"base": "b", "data": ["d.jsonl"]}


def config_of(values):
    """Build a configuration from a file's values."""
    return read_settings(TrainConfig, values, Place(Document(Path("t.yaml"), values, {})))


def test_a_file_gives_a_configuration(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("base: b\ndata: [d.jsonl]\nrank: 4\nlearning_rate: 1.0e-4\nsteps: null\n")
    config = config_of(read_document(path).values)
    assert (config.rank, config.learning_rate, config.steps, config.data) == (4, 1e-4, None, ("d.jsonl",))


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"t\.yaml: learning_rat: unknown key") as caught:
        config_of(GOOD | {"learning_rat": 1e-4})
    assert "learning_rate" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0), ("rank", "4"), ("rank", True), ("alpha", float("nan")), ("alpha", 0), ("dropout", 1.0),
        ("steps", 0), ("data", "d.jsonl"), ("data", []),
        ("schedule", "step"), ("compute_dtype", "float16"),
        ("rank", 10**9), ("alpha", 1e308), ("learning_rate", 1e300), ("optimizer_pages_mib", float("inf")),
        ("page_kib", 10**12), ("seed", 2**63), ("steps", 10**20), ("epochs", 10**400), ("epochs", 1e300),
        ("targets", [["q"] * 9] * 9), ("mixture", {"d.jsonl": "two"}),
        ("chat_template_kwargs", {"a": None}), ("chat_template_kwargs", {"a": ["b"]}), ("chat_template_kwargs", ["a"]),
        ("chat_template_kwargs", {"a": float("nan")}), ("chat_template_kwargs", {1: "a"}),
        ("held_out", -0.1), ("learning_rate", float("inf")), ("batch_size", 0), ("targets", []),
        ("data", [""]), ("held_out_data", ["d.jsonl", ""]),
        ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 2.5}), ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"(q_proj": 2}), ("bias", "some"),
        ("base", ""), ("init", ""), ("chat_template", ""), ("tensorboard", ""), ("wandb", ""),
    ],
)  # fmt: skip
def test_an_unusable_value_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        config_of(GOOD | {key: value})


def test_errors_in_a_file_name_the_line(tmp_path):
    path = tmp_path / "train.yaml"
    for line, problem in (
        ("rank: '4'", "rank: is '4'; expected a whole number"),
        ("rank: 0", "rank: must be at least 1 and at most 65,536, found 0"),
        ("method: lor", "method: must be one of auto, lora, qlora, full, found 'lor'"),
        ("rank_pattern: {q: 0}", "rank_pattern: values must be at least 1 and at most 65,536, found q=0.0"),
        ("mixture: {d.jsonl: two}", "mixture.d.jsonl: is 'two'; expected a number"),
        ("decay: 0.3", "decay: applies only to schedule wsd"),
    ):
        path.write_text(f"base: b\ndata: [d.jsonl]\n{line}\n")
        document = read_document(path)
        with pytest.raises(ConfigError) as caught:
            read_settings(TrainConfig, document.values, Place(document))
        assert caught.value.message == f"{path}, line 3: {problem}"
    with pytest.raises(ConfigError) as caught:  # the command line takes precedence, and has no line number
        read_settings(TrainConfig, document.values, Place(document), {"rank": -1, "sample_every": 0})
    assert caught.value.message == "rank: must be at least 1 and at most 65,536, found -1"


def test_values_from_python_have_the_types_of_their_fields():
    config = TrainConfig(base=Path("b"), data=[Path("d.jsonl")], rank=np.int64(4), alpha=8, dropout=np.float32(0.5))
    assert (config.base, config.data, config.alpha) == ("b", ("d.jsonl",), 8.0)
    assert json.loads(json.dumps(config.recorded()))["dropout"] == 0.5
    with pytest.raises(ConfigError, match=r"(?m)^rank: is '4'; expected a whole number$"):
        TrainConfig(base="b", data=("d.jsonl",), rank="4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "epochs": 2.0}, "epochs: cannot be combined with steps"),
        ({"pack": True, "group_by_length": True}, "group_by_length: cannot be combined with pack: packed rows have .*"),
        ({"patience": 1}, "patience: needs eval_every and held-out data"),
        ({"patience": 1, "eval_every": 1, "held_out": 0.0}, "patience: needs eval_every and held-out data"),
        ({"eval_every": 1, "held_out": 0.0}, "eval_every: needs held-out data"),
        ({"sample_every": 1}, "sample_every: needs sample_prompts"),
        ({"sample_tokens": 5}, "sample_tokens: needs sample_prompts"),
        ({"decay": 0.3}, "decay: applies only to schedule wsd"),
        ({"shard_base": True, "checkpointing": "sqrt"}, "shard_base: works only with checkpointing auto, .*"),
        ({"batch_size": 2, "micro_batch_size": 3}, "micro_batch_size: 3 samples .* more than the 2 per step .*"),
        ({"mixture": {"d.jsonl": 3}}, "mixture: has no effect on a single source"),
        ({"mixture": {}}, "mixture: has no effect on a single source"),
        ({"micro_batch_size": 9}, "micro_batch_size: 9 samples .* more than the 8 per step .*"),
        ({"shard_base": True, "method": "full"}, "shard_base: cannot be combined with method full, .*"),
        ({"lora_bias": True, "dora": True}, "lora_bias: cannot be combined with dora"),
        (
            {"target_parameters": ["experts"], "dora": True},
            "dora: cannot be combined with target_parameters, as in peft",
        ),
        ({"target_parameters": ["experts"], "dropout": 0.1}, "dropout: cannot be combined with target_parameters, .*"),
        *(
            ({"method": "full"} | setting, f"{next(iter(setting))}: does not apply to method full, which .*")
            for setting in ({"dora": True}, {"rank": 4}, {"modules_to_save": ["lm_head"]}, {"bias": "all"})
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"(?m)^t\.yaml: {message}$") as caught:
        config_of(GOOD | settings)
    assert re.match("leave out|set |use one ", caught.value.hint)


def test_epochs_are_recorded_as_one_by_default_as_in_earlier_versions():
    config = config_of(GOOD | {"steps": 5})
    assert config.decisive()["epochs"] == config.recorded()["epochs"] == 1.0


def test_whole_numbers_and_equal_floats_are_recorded_alike():
    """The command line parses as floats what a file may write as whole numbers."""
    whole = {"alpha": 32, "warmup": 0, "epochs": 2, "alpha_pattern": {"q_proj": 8}}
    whole |= {"data": ["d.jsonl", "e.jsonl"], "mixture": {"d.jsonl": 3}}
    records = [
        json.dumps(config_of(GOOD | values).recorded())
        for values in (whole, json.loads(json.dumps(whole), parse_int=float))
    ]
    assert records[0] == records[1]
    kwargs = {"chat_template_kwargs": {"n": 1}}  # not a float, since a template may print it
    assert json.dumps(config_of(GOOD | kwargs).recorded()["chat_template_kwargs"]) == '{"n": 1}'


def test_the_order_of_patterns_is_recorded():
    """The first pattern that matches applies."""
    patterns = {"self_attn.q_proj": 8, "q_proj": 64}
    turned = dict(reversed(patterns.items()))
    one, other = (config_of(GOOD | {"alpha_pattern": given}) for given in (patterns, turned))
    assert json.dumps(one.decisive(), sort_keys=True) != json.dumps(other.decisive(), sort_keys=True)


@pytest.mark.parametrize("missing", ["base", "data"])
def test_a_missing_required_option_is_named(missing):
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        config_of({k: v for k, v in GOOD.items() if k != missing})


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [1\n", "a: 1\na: 2\n", "[" * 5000, "!!python/object/apply:os.system ['true']"]
)
def test_a_malformed_file_is_refused(text, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"train\.yaml"):
        read_document(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_document(tmp_path / "absent.yaml")
