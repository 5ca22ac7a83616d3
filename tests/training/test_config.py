"""Options from files: unknown keys and unusable values are refused by name."""

import json

import pytest

from adaptkit.errors import ConfigError
from adaptkit.training.config import TrainConfig
from adaptkit.training.settings import read_config_file

GOOD = {"base": "b", "data": ["d.jsonl"]}


def test_a_file_gives_a_configuration(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("base: b\ndata: [d.jsonl]\nrank: 4\nlearning_rate: 1.0e-4\nsteps: null\n")
    config = TrainConfig.from_values(read_config_file(path), "train.yaml")
    assert (config.rank, config.learning_rate, config.steps, config.data) == (4, 1e-4, None, ("d.jsonl",))


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"t\.yaml: unknown key 'learning_rat'") as caught:
        TrainConfig.from_values(GOOD | {"learning_rat": 1e-4}, "t.yaml")
    assert "learning_rate" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0), ("rank", "4"), ("rank", True), ("alpha", float("nan")), ("alpha", 0), ("dropout", 1.0),
        ("steps", 0), ("data", "d.jsonl"), ("data", []),
        ("init", "zeros"), ("schedule", "step"), ("compute_dtype", "float16"),
        ("rank", 10**9), ("alpha", 1e308), ("learning_rate", 1e300), ("optimizer_pages_mib", float("inf")),
        ("page_kib", 10**12), ("seed", 2**63), ("steps", 10**20), ("epochs", 10**400), ("epochs", 1e300),
        ("targets", [["q"] * 9] * 9), ("mixture", {"d.jsonl": "two"}),
        ("chat_template_kwargs", {"a": None}), ("chat_template_kwargs", {"a": ["b"]}), ("chat_template_kwargs", ["a"]),
        ("chat_template_kwargs", {"a": float("nan")}), ("chat_template_kwargs", {1: "a"}),
        ("held_out", -0.1), ("learning_rate", float("inf")), ("batch_size", 0), ("targets", []),
        ("data", [""]), ("held_out_data", ["d.jsonl", ""]),
    ],
)  # fmt: skip
def test_an_unusable_value_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        TrainConfig.from_values(GOOD | {key: value}, "t.yaml")


def test_steps_and_epochs_are_two_answers_to_one_question():
    with pytest.raises(ConfigError, match=r"^epochs: steps says how long already$") as caught:
        TrainConfig.from_values({k: v for k, v in GOOD.items() if k != "steps"} | {"steps": 5, "epochs": 2.0}, "t.yaml")
    assert caught.value.hint == "give one of the two"


def test_the_record_is_that_of_earlier_versions_which_had_an_epoch_by_default():
    config = TrainConfig.from_values({k: v for k, v in GOOD.items() if k != "steps"} | {"steps": 5}, "t.yaml")
    assert config.decisive()["epochs"] == config.recorded()["epochs"] == 1.0


def test_a_number_is_recorded_the_same_however_it_was_written():
    """The command line makes floats of what a file may write as whole numbers."""
    whole = {"alpha": 32, "warmup": 0, "epochs": 2, "alpha_pattern": {"q_proj": 8}, "mixture": {"d.jsonl": 3}}
    records = [
        json.dumps(TrainConfig.from_values({k: v for k, v in GOOD.items() if k != "steps"} | values, "t").recorded())
        for values in (whole, json.loads(json.dumps(whole), parse_int=float))
    ]
    assert records[0] == records[1]
    kwargs = {"chat_template_kwargs": {"n": 1}}  # a template may print it
    assert json.dumps(TrainConfig.from_values(GOOD | kwargs, "t").recorded()["chat_template_kwargs"]) == '{"n": 1}'


def test_the_order_of_patterns_is_a_part_of_the_record():
    """The first that matches counts."""
    patterns = {"self_attn.q_proj": 8, "q_proj": 64}
    turned = dict(reversed(patterns.items()))
    one, other = (TrainConfig.from_values(GOOD | {"alpha_pattern": given}, "t.yaml") for given in (patterns, turned))
    assert json.dumps(one.decisive(), sort_keys=True) != json.dumps(other.decisive(), sort_keys=True)


@pytest.mark.parametrize("missing", ["base", "data"])
def test_what_is_required_is_asked_for(missing):
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        TrainConfig.from_values({k: v for k, v in GOOD.items() if k != missing}, "t.yaml")


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [1\n", "a: 1\na: 2\n", "[" * 5000, "!!python/object/apply:os.system ['true']"]
)
def test_a_malformed_file_is_refused(text, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"train\.yaml"):
        read_config_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_config_file(tmp_path / "absent.yaml")
