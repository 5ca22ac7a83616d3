"""Patterns for ranks and alphas of a release of peft that matched them by another rule are refused.

Adapters that name no release have the keys of theirs.
"""

import json

import peft_adapters
import pytest
import tiny
from peft_adapters import CONFIG

from adaptkit.checkpoint.adapter_config import has_older_patterns
from adaptkit.checkpoint.layout import read_json
from adaptkit.errors import AdapterError
from adaptkit.operations.check import check
from adaptkit.operations.merge import merge

OF_13 = {"layers_pattern": None, "loftq_config": {}, "use_dora": False}
OF_14 = OF_13 | {"eva_config": None, "exclude_modules": None, "lora_bias": False}
OF_15 = OF_14 | {"corda_config": None, "trainable_token_indices": None}
OF_18 = OF_15 | {"ensure_weight_tying": False}
RELEASES = [
    (OF_13, True),
    (OF_14, True),
    (OF_15, False),
    (OF_18, False),  # the release was removed
    ({}, False),  # not written by peft
    (OF_18 | {"peft_version": "0.18.1"}, False),
    ({"peft_version": "0.14.0"}, True),  # the release is given by hand
    ({"peft_version": "0.15.0.dev0"}, False),
    (OF_14 | {"peft_version": "1.0.0"}, False),  # its keys may differ
]


@pytest.mark.parametrize(("keys", "is_older"), RELEASES)
def test_patterns_of_older_releases_are_recognized(keys, is_older):
    for patterns in ({"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 9}}):
        assert has_older_patterns(keys | patterns) == is_older
    assert not has_older_patterns(keys | {"rank_pattern": {}, "alpha_pattern": None})


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
    assert "merge it with the peft release that wrote it" in refused.value.hint
    merge(base, [today], tmp_path / "merged")


def test_check_reports_that_current_programs_match_older_patterns_differently(adapters):
    base, *folders = adapters
    for folder, is_older in zip(folders, (True, False), strict=True):
        for verdict in check(folder, base=base).verdicts:
            rule = "follow the matching rule of peft up to 0.14"
            assert any(rule in finding.found for finding in verdict.findings) == is_older
