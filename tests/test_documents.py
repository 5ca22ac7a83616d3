"""Files that people write are parsed strictly, and every value's line is known."""

import math

import pytest

from adaptkit.documents import read_document
from adaptkit.errors import ConfigError

pytestmark = pytest.mark.quick


def test_the_line_of_every_value_is_known(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n\nb:\n  c: {d: 2,\n      e: 3}\n  f:\n    - x\n    - y: 4\n")
    document = read_document(path)
    assert document.values == {"a": 1, "b": {"c": {"d": 2, "e": 3}, "f": ["x", {"y": 4}]}}
    lines = {"a": 1, "b": 3, "b.c": 4, "b.c.d": 4, "b.c.e": 5, "b.f": 6, "b.f.0": 7, "b.f.1": 8, "b.f.1.y": 8}
    assert {".".join(map(str, keys)): line for keys, line in document.lines.items()} == lines
    assert document.where("b", "c", "e") == f"{path}, line 5: b.c.e"
    assert document.where("b", "c", "absent") == f"{path}, line 4: b.c.absent"
    assert document.where() == str(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        ("2026-01-31", "2026-01-31"),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-7", -7),
        ("010", "010"),
        ("-010", "-010"),
        ("12:30", "12:30"),
        ("1:30.5", "1:30.5"),
        *((word, word) for word in ("y", "N")),
        *((f"'{word}'", word) for word in ("on", "off", "yes", "no")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("v1e5", "v1e5"),
    ],
)
def test_numbers_dates_and_words_are_read_as_intended(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: {text}\n")
    found = read_document(path).values
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: malformed (the key 'a' appears twice)"),
        ("a: {b: 1,\n b: 2}\n", "line 2: malformed (the key 'b' appears twice)"),
        (BOMB, "line 2: malformed (aliases are not supported)"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: malformed (tags are not supported)"),
        ("a: !!python/name:os.system\n", "line 1: malformed (tags are not supported)"),
        ("a: !!binary aGk=\n", "line 1: malformed (tags are not supported)"),
        ("a: !!set {b}\n", "line 1: malformed (tags are not supported)"),
        ("b: 1\na: [!!timestamp 2026-01-31]\n", "line 2: malformed (tags are not supported)"),
        ("!!str a: 1\n", "line 1: malformed (tags are not supported)"),
        ("a: 1\n<<: {b: 1}\n", "line 2: malformed (the key '<<' is not text"),
        ("1: a\n", "line 1: malformed (the key '1' is not text"),
        *((f"a: {word}\n", "line 1: malformed (") for word in ("on", "off", "yes", "no", "Off")),
        ("a: 1\nb: [x, no]\n", "line 2: malformed (some readers take no for true or false"),
        ("true: a\n", "line 1: malformed (the key 'true' is not text"),
        ("? [a, b]\n: c\n", "malformed"),
        ("a: 1\n---\nb: 2\n", "malformed"),
        ("a: [1\n", "malformed"),
        ("a: 1\nb: [{c: 'x', d: \"m\\0n\"}]\n", "line 2: b.0.d: contains U+0000 or an unpaired surrogate"),
        ("- a\n", "expected keys and values"),
        ("", "expected keys and values"),
        ("[" * 5000, "malformed"),
        ("a: '" + "x" * (1 << 20) + "'\n", "larger than a megabyte"),
    ],
)
def test_malformed_ambiguous_or_dangerous_yaml_is_refused(tmp_path, text, expected):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert expected in caught.value.message
    assert caught.value.message.startswith(str(path))


def test_a_symbolic_link_to_itself_is_an_error_that_says_what_to_correct(tmp_path):
    path = tmp_path / "a.yaml"
    path.symlink_to(path)
    with pytest.raises(ConfigError, match="Too many levels") as caught:
        read_document(path)
    assert "correct the symbolic links" in caught.value.hint


def test_files_with_the_suffix_json_are_read_as_json_and_as_strictly(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n\t"a": {"b": 1}\n}')
    assert read_document(path).values == {"a": {"b": 1}}
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ConfigError, match="the key 'b' appears twice"):
        read_document(path)
    for text, place in (('{"a": ["\\ud800"]}', ": a.0: "), ('{"a": {"\\u0000": 1}}', ": a: ")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{place}contains"):
            read_document(path)
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_document(path).values == {"a": "\U0001f600"}
    for number in ("NaN", "-Infinity", "1e999", "-1e999"):
        path.write_text(f'{{"a": {number}}}')
        with pytest.raises(ConfigError, match=rf"a\.json: {number} is"):
            read_document(path)
