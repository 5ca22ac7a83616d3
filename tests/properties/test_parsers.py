"""For any content, a parser soon returns a valid value or raises an adaptkit error; see ``fuzzing``."""

import random

import fuzzing
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parsers import PARSERS


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_the_seeds_of_every_parser_are_accepted(name, tmp_path):
    """Otherwise inputs made from them would be refused for the wrong reason."""
    for seed in PARSERS[name].seeds:
        assert fuzzing.tried(PARSERS[name], seed, tmp_path) == fuzzing.ACCEPTED


@pytest.mark.parametrize("name", sorted(PARSERS))
@pytest.mark.filterwarnings("error")
def test_mutated_input_is_accepted_or_refused(name, tmp_path_factory):
    parser, folder = PARSERS[name], tmp_path_factory.mktemp("fuzz")

    @settings(derandomize=True, max_examples=150)
    @given(st.integers(0, 2**32))
    def check(seed):
        content = fuzzing.mutated(parser, random.Random(seed))
        assert not isinstance(fuzzing.tried(parser, content, folder), fuzzing.Failure), content

    check()


@settings(derandomize=True, max_examples=100)
@given(st.sampled_from(sorted(PARSERS)), st.binary(max_size=64) | st.text(max_size=32).map(str.encode))
@example("safetensors header", bytes(8))
def test_any_bytes_are_accepted_or_refused(name, content):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        assert not isinstance(fuzzing.tried(PARSERS[name], content, Path(folder)), fuzzing.Failure)


def test_the_fuzzer_finds_and_shortens_failures_and_detects_hangs(tmp_path):
    """A parser with a defect is found to fail, and the input that shows it is shortened."""

    def parse(content, folder):
        if b"\xff" in content:
            raise KeyError("x")

    def hang(content, folder):
        while True:
            pass

    broken = fuzzing.Parser((b"a" * 500,), parse, documents=False)
    chance = random.Random(1)
    tries = (fuzzing.tried(broken, fuzzing.mutated(broken, chance), tmp_path) for _ in range(3000))
    failure = next(found for found in tries if isinstance(found, fuzzing.Failure))
    assert fuzzing.shortened(broken, failure, tmp_path).content == b"\xff"
    slow = fuzzing.Parser((b"a",), hang, documents=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzzing, "SECONDS", 0.1)
        assert fuzzing.tried(slow, b"a", tmp_path).error == "TooSlow"
