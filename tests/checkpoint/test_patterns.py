"""Patterns match as in Python's re, and in bounded time."""

import contextlib
import re
import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptkit.checkpoint import patterns as patterns_module
from adaptkit.checkpoint.patterns import FirstMatch, check_pattern, matches_end, matches_whole

USUAL = [
    r".*layers\.\d+\..*_proj",
    r"^model\.layers\.[0-7]\.",
    r"(q|k|v)_proj",
    r"layers\.(0|1|1[0-9]|2[0-3])\.(self_attn|mlp)\.\w+",
    r"^(?!.*visual).*(?:q_proj|up_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up_proj)",
    "q_proj",
    "",
    r"[^.]+",
    r"[^\d]*",
    r"x{2,3}?",
    r"a{0}",
    r"\.",
    r"$",
    r"(q|k)_proj\.\1|(?i:Q_PROJ)",
    r".*(?<=self_attn\.)[qk]_proj",
]
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.mlp.up_proj",
    "visual.blocks.3.q_proj",
    "language_model.text.self_attn.q_proj",
    "q_proj",
    "xx",
    "",
]


@pytest.mark.parametrize("pattern", USUAL)
@pytest.mark.parametrize("name", NAMES)
def test_usual_patterns_match_as_in_python(pattern, name):
    assert matches_whole(pattern, name) == (re.fullmatch(pattern, name) is not None)
    theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert matches_end(pattern, name) == theirs


PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", r"\B", "(a|ab)", "(?:b|)", "(?=a)", "(?!b)"]
)
PATTERNS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "+?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=5,
)


@given(PATTERNS, st.text("ab.", min_size=1, max_size=7))  # \B in empty text differs between Python versions
def test_any_pattern_matches_as_in_python(pattern, text):
    with warnings.catch_warnings(action="ignore"):
        theirs = re.fullmatch(pattern, text) is not None
    try:
        found = matches_whole(pattern, text)
    except re.error:
        assume(False)
    assert found == theirs


@pytest.mark.parametrize("pattern", [r"([a-z]|.)*[!]", r"(a|a)*[bc]", r"((a+)+)+[bc]", r"(.*.*.*.*.*.*.*.*)*[!?]"])
@pytest.mark.parametrize("matches", [matches_whole, matches_end])
def test_patterns_that_take_python_exponential_time_are_refused_or_matched_at_once(pattern, matches):
    """This test would not end otherwise."""
    with contextlib.suppress(re.error):
        assert not matches(pattern, "m." + "a" * 60)


def test_a_pattern_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(patterns_module, "_SECONDS", 0.05)
    with pytest.raises(re.error, match=r"'\(a\|a\|aa\)\*\[bc\]' takes too long to match 'a{40}'"):
        matches_whole("(a|a|aa)*[bc]", "a" * 60)
    with pytest.raises(re.error, match="takes too long"):
        FirstMatch({"x": 1, "(a|a|aa)*[bc]": 2}).value("a" * 60, None)


@pytest.mark.parametrize(
    "pattern", ["(", "*", "[", "a" * 3000, "(" * 900, r"\p{L}", "(?:a){e<=1}", "[[:alpha:]]", "(?R)", "a)|(b"]
)
def test_unsupported_patterns_are_refused(pattern):
    with pytest.raises(re.error):
        check_pattern(pattern)
    with pytest.raises(re.error):
        matches_whole(pattern, "a")


MODULES = ["a.b", "b", "ab.b", "a-b", "a.b.a", "ab", "a b", "é.b", ""]
NAMED = st.sampled_from(MODULES).map(re.escape)
MAPPED = st.one_of(PATTERNS, NAMED, NAMED.map(lambda p: f"^{p}$"), st.sampled_from(MODULES).map(lambda n: f"^{n}$"))


def of_the_first(patterns, text):
    """Return what ``FirstMatch`` should find, or the error, by trying one pattern after the other."""
    try:
        return next((value for pattern, value in patterns.items() if matches_end(pattern, text)), None)
    except re.error as error:
        return str(error)


@given(st.lists(st.one_of(MAPPED, st.sampled_from(["(", r"^a\d$", r"(?i)a"])), max_size=6), st.sampled_from(MODULES))
def test_the_first_pattern_that_matches_applies(listed, text):
    """Also if an earlier one is malformed, or if several of them are the same name."""
    patterns = {pattern: number for number, pattern in enumerate(listed)}
    try:
        found = FirstMatch(patterns).value(text, None)
    except re.error as error:
        found = str(error)
    assert found == of_the_first(patterns, text)


def test_first_match_refuses_patterns_that_are_too_long():
    with pytest.raises(re.error, match="2001 characters"):
        FirstMatch({f"^{'a' * 1999}$": 1}).value("b", None)
