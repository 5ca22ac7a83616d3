"""Counts agree with their nouns and verbs."""

import pytest

from adaptkit.wording import counted


@pytest.mark.parametrize(
    ("count", "noun", "verb", "said"),
    [
        (0, "shard", "", "0 shards"),
        (1, "shard", "", "1 shard"),
        (1200, "shard", "", "1,200 shards"),
        (2, "micro-batch", "", "2 micro-batches"),
        (2, "calibrated matrix", "", "2 calibrated matrices"),
        (1, "calibrated matrix", "", "1 calibrated matrix"),
        (3, "entry", "", "3 entries"),
        (2, "bias", "", "2 biases"),
        (3, "more key", "", "3 more keys"),
        (1, "row", "have", "1 row has"),
        (2, "row", "have", "2 rows have"),
        (1, "sample", "are", "1 sample is"),
        (1, "fingerprint", "agree", "1 fingerprint agrees"),
    ],
)
def test_a_noun_and_a_verb_agree_with_their_count(count, noun, verb, said):
    assert counted(count, noun, verb) == said
