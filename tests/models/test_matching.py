"""Shell patterns match whole paths or last parts; ``*`` matches everything but routers."""

import pytest

from adaptkit.errors import UsageError
from adaptkit.models.matching import matching, matching_targets

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.shared_expert_gate",
    "model.layers.1.mlp.gate",
    "model.layers.1.feed_forward.router",
)


def test_a_pattern_matches_a_path_or_its_last_part():
    assert matching("target", ["q_proj"], NAMES, "layer") == {NAMES[0]}
    assert matching("target", ["model.layers.1.*", "gate_*"], NAMES, "layer") == {NAMES[1], *NAMES[3:]}


def test_an_asterisk_matches_everything_but_routers():
    assert matching_targets(["*"], NAMES) == set(NAMES[:2])


def test_a_router_that_is_named_is_a_target():
    assert matching_targets(["*", "shared_expert_gate"], NAMES) == set(NAMES[:3])
    assert matching_targets(["router"], NAMES) == {NAMES[4]}


@pytest.mark.parametrize("patterns", [["nothing"], ["*", "nothing"]])
def test_a_pattern_that_matches_nothing_is_refused(patterns):
    with pytest.raises(UsageError, match="'nothing' matches no linear layer") as caught:
        matching_targets(patterns, NAMES)
    assert "gate, gate_proj, q_proj, router, shared_expert_gate" in caught.value.hint
