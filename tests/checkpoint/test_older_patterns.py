"""Patterns for ranks and alphas that an older release of peft matched by another rule are refused.

The rules are written out here as in those releases. Adapters that name no release have the keys of theirs.
"""

import itertools
import json
import re

import peft_adapters
import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from peft_adapters import CONFIG

from adaptkit.checkpoint.adapter_config import Scalings, has_older_patterns
from adaptkit.checkpoint.layout import read_json
from adaptkit.errors import AdapterError
from adaptkit.operations.check import check
from adaptkit.operations.merge import merge

OF_13 = {"layers_pattern": None, "loftq_config": {}, "use_dora": False}
OF_14 = OF_13 | {"eva_config": None, "exclude_modules": None, "lora_bias": False}
OF_15 = OF_14 | {"corda_config": None, "trainable_token_indices": None}
OF_18 = OF_15 | {"ensure_weight_tying": False}
MODULES = ["lm_head", "model.embed_tokens"] + [
    f"model.layers.{layer}.{name}" for layer in (0, 1, 10) for name in ("attn.q_proj", "attn.v_proj", "mlp.up")
]
PATTERNS = [
    "q_proj", "v_proj", "q_proj|v_proj", "up|q_proj", r".*\.up", ".*head", "lm_head", "^lm_head", r"layers\.1\..*",
    "layers.1.mlp.up", "model.layers.0.attn.q_proj", "^model.layers.0.attn.q_proj$", r"(q|v)_proj", ".", "roj",
    r"layers\.\d+\.mlp\.up",
]  # fmt: skip


def of_13(config, module):
    both = [*config["rank_pattern"], *config["alpha_pattern"]]
    key = next((key for key in both if re.match(rf".*\.{key}$", module)), module)
    return config["rank_pattern"].get(key, config["r"]), config["alpha_pattern"].get(key, config["lora_alpha"])


def of_14(config, module):
    def value(name, default):
        patterns = config[name]
        return patterns.get(next((key for key in patterns if re.match(rf".*\.{key}$", module)), module), default)

    return value("rank_pattern", config["r"]), value("alpha_pattern", config["lora_alpha"])


def of_today(config, module):
    def value(name, default):
        patterns = config[name]
        return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), default)

    return value("rank_pattern", config["r"]), value("alpha_pattern", config["lora_alpha"])


RULES = [
    (OF_13, of_13),
    (OF_14, of_14),
    (OF_15, of_today),
    (OF_18, of_today),  # the release was removed
    ({}, of_today),  # not written by peft
    (OF_18 | {"peft_version": "0.18.1"}, of_today),
    ({"peft_version": "0.14.0"}, of_14),  # the release is given by hand
    ({"peft_version": "0.13.2"}, of_13),
    ({"peft_version": "0.15.0.dev0"}, of_today),
    (OF_14 | {"peft_version": "1.0.0"}, of_today),  # its keys may differ
]


def values(numbers):
    patterns = st.lists(st.sampled_from(PATTERNS), unique=True, max_size=len(numbers))
    return patterns.map(lambda keys: dict(zip(keys, numbers, strict=False)))


TELLING = {"layers.1.attn.q_proj": 1}, {"q_proj|up": 5}
"""Patterns that the three rules match differently."""


@pytest.mark.parametrize(("keys", "meant"), RULES)
@given(values([1, 2, 3, 4]), values([5, 7, 11, 13]))
@example(*TELLING)
def test_rank_and_scaling_are_those_of_the_release_or_refused(keys, meant, ranks, alphas):
    config = {"r": 8, "lora_alpha": 17, "rank_pattern": ranks, "alpha_pattern": alphas} | keys
    if has_older_patterns(config):
        assert meant is not of_today
        return
    scalings = Scalings("adapter", config)
    for module in MODULES:
        rank, alpha = meant(config, module)
        assert scalings.of(module) == (rank, alpha / rank)


def test_the_rules_differ():
    ranks, alphas = TELLING
    config = {"r": 8, "lora_alpha": 17, "rank_pattern": ranks, "alpha_pattern": alphas}
    found = [[rule(config, module) for module in MODULES] for rule in (of_13, of_14, of_today)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert all(has_older_patterns(config | keys) for keys in (OF_13, OF_14))


@pytest.mark.parametrize("keys", [OF_13, OF_14])
def test_modules_listed_in_full_mean_the_same_in_every_release(keys):
    ranks, alphas = dict.fromkeys(MODULES, 2), dict.fromkeys(MODULES, 9)
    assert not has_older_patterns({"rank_pattern": ranks, "alpha_pattern": alphas} | keys)


@pytest.fixture
def adapters(tmp_path):
    """A base, and an adapter with patterns, as written by peft 0.13 and by the current peft."""
    base = tiny.write_llama(tmp_path / "base")
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 9}}
    case = peft_adapters.Case(lora=patterns)
    folders = [peft_adapters.write_adapter(tmp_path / name, case, base) for name in ("old", "today")]
    kept = {k: value for k, value in read_json(folders[0] / CONFIG).items() if k not in {*OF_18, "peft_version"}}
    (folders[0] / CONFIG).write_text(json.dumps(kept | OF_13), encoding="utf-8")
    return base, *folders


def test_an_adapter_with_patterns_of_an_older_release_is_refused(adapters, tmp_path):
    base, old, today = adapters
    with pytest.raises(AdapterError, match=r"peft up to 0\.14 matched its rank_pattern and alpha_pattern") as refused:
        merge(base, [old], tmp_path / "merged")
    assert "list each module in full" in refused.value.hint
    merge(base, [today], tmp_path / "merged")


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "gguf"])
def test_check_reports_that_current_programs_match_older_patterns_differently(target, adapters):
    base, old, today = adapters
    said = [[f.found for f in check(folder, target, base).verdicts[0].findings] for folder in (old, today)]
    assert [any("follow the matching rule of peft up to 0.14" in what for what in found) for found in said] == [
        True,
        False,
    ]
