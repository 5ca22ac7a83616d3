"""Patterns match as in Python's re, and in bounded time."""

import re
import time
import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptkit.checkpoint import patterns as patterns_module
from adaptkit.checkpoint.patterns import FirstMatch, check_pattern, matches_behind_dot, matches_whole

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
    assert matches_whole(pattern, name, after=".") == theirs


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


@pytest.mark.parametrize("pattern", [r"([a-z]|.)*!", r"(a|a)*b", r"((a+)+)+b", r"(.*.*.*.*.*)*!", r"(a?){60}a{60}!"])
def test_patterns_that_take_python_exponential_time_are_matched_at_once(pattern):
    began = time.process_time()
    assert not matches_whole(pattern, "a" * 60)
    assert time.process_time() - began < 5, "not the age of the universe"


@pytest.mark.parametrize("pattern", ["(?:(?:.*b|a)*c|a)*", "(?=(?:.*b|a)*c|).*", "(?:(?=.*b|).)*" * 20])
def test_patterns_that_take_the_fourth_power_of_the_texts_length_are_refused(pattern):
    """These would take minutes to hours."""
    with pytest.raises(re.error, match=r"too long to match 'a{40}'"):
        matches_whole(pattern, "a" * 2000)
    with pytest.raises(re.error, match=r"too long to match 'm\.a{38}'"):
        matches_behind_dot(f"(?:{pattern})", "m." + "a" * 1998)
    assert matches_whole(pattern, "a" * 10)


SET = "".join(map(chr, range(0x4E00, 0x4E00 + 900)))


@pytest.mark.parametrize("pattern", [f"[{SET}a]*", f"(?:(?:{'|' * 900}b)a)*"])
def test_sets_and_branches_count_with_all_their_items(pattern):
    """Otherwise one of 1,900 items, tried at as many positions as are allowed, would take most of a minute."""
    with pytest.raises(re.error, match="too long to match"):
        matches_whole(pattern, "a" * 900)
    assert matches_whole(pattern, "a" * 10)


@pytest.mark.parametrize(
    "pattern", ["(", "*", "[", r"(a)\1", "(?<=a)b", "(?i)a", "a" * 3000, "(" * 900, "((((a*)*)*)*)*"]
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
        return next((value for pattern, value in patterns.items() if matches_whole(pattern, text, after=".")), None)
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


@pytest.mark.parametrize(("pattern", "text"), [("^b$", "a" * 2001), (f"^{'a' * 1999}$", "b")])
def test_first_match_refuses_patterns_and_texts_that_are_too_long(pattern, text):
    with pytest.raises(re.error, match="2001 characters"):
        FirstMatch({pattern: 1}).value(text, None)


def test_patterns_that_are_names_are_looked_up(monkeypatch):
    """There may be one for every module; trying each of them for every module would take hours."""
    names = [f"model.layers.{number}.mlp.experts.{number}-up_proj" for number in range(20_000)]
    first = FirstMatch({f"^{re.escape(name)}$": number for number, name in enumerate(names)})
    monkeypatch.setattr(patterns_module, "matches_whole", None)
    assert [first.value(name, None) for name in names] == list(range(20_000))
    assert first.value("another", "none") == "none"
