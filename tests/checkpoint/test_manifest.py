"""A manifest is canonical: one set of facts has one form, and any other form is refused."""

import contextlib
import hashlib
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptkit
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Parent,
    Target,
    TensorRecord,
    read_manifest,
    require_manifest,
    tensors_root,
)
from adaptkit.errors import AdaptkitError, IntegrityError, UnsafeInputError

SHA, XXH = "ab" * 32, "cd" * 16
MANIFEST = Manifest(
    kind="adapter",
    operation={"name": "stack", "options": {"weights": [0.5, 1.0], "name": "é"}},
    files=(FileRecord("b.json", 3, SHA), FileRecord("a.safetensors", 10, SHA)),
    tensors=(
        TensorRecord("y", "a.safetensors", "F32", (1, 2), XXH),
        TensorRecord("x", "a.safetensors", "U8", (), XXH),
    ),
    parents=(Parent("base", "checkpoint", SHA), Parent("adapter", "adapter", SHA, SHA, 0.5)),
    targets=(Target("m.1", (2, 3), XXH), Target("m.0", (2, 3), None, SHA)),
)


def document() -> dict:
    return json.loads(MANIFEST.to_bytes())


def canonical(value: dict) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def test_a_manifest_is_read_back_unchanged_whatever_the_order_of_its_records():
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.sha256 == hashlib.sha256(MANIFEST.to_bytes()).hexdigest()
    shuffled = {name: getattr(MANIFEST, name)[::-1] for name in ("files", "tensors", "targets")}
    assert replace(MANIFEST, **shuffled).to_bytes() == MANIFEST.to_bytes()


def test_the_form_of_a_manifest_is_the_documented_one():
    found = document()
    assert canonical(found) == MANIFEST.to_bytes()
    assert found["schema"] == 1
    assert found["tool"] == {"name": "adaptkit", "version": adaptkit.__version__}
    assert [entry["path"] for entry in found["files"]] == ["a.safetensors", "b.json"]
    assert [entry["name"] for entry in found["tensors"]] == ["x", "y"]
    assert found["targets"][0] == {"module": "m.0", "shape": [2, 3], "quantized_root": SHA}
    assert found["parents"][0] == {"role": "base", "kind": "checkpoint", "tensors_root": SHA}
    lines = f"x U8 [] {XXH}\n" + f"y F32 [1, 2] {XXH}\n"
    assert found["tensors_root"] == hashlib.sha256(lines.encode()).hexdigest()


TENSORS = st.lists(
    st.builds(
        TensorRecord,
        st.text("ab.", min_size=1, max_size=3),
        st.just("f"),
        st.sampled_from(["F32", "U8"]),
        st.lists(st.integers(0, 3), max_size=2).map(tuple),
        st.sampled_from([XXH, "00" * 16]),
    ),
    max_size=4,
    unique_by=lambda tensor: tensor.name,
)


@given(TENSORS, TENSORS)
def test_roots_are_equal_exactly_if_the_tensors_are(one, two):
    facts = [{(t.name, t.dtype, t.shape, t.xxh3_128) for t in tensors} for tensors in (one, two)]
    assert (tensors_root(one) == tensors_root(two)) == (facts[0] == facts[1])
    assert tensors_root(one) == tensors_root([replace(t, file="another") for t in reversed(one)])


UNSAFE, CHANGED = "is not a plain path", "changed after it was written"
STRUCTURE = {
    "an unknown field": (lambda d: d.update(signature="x"), "malformed (unknown key 'signature')"),
    "an unknown schema": (lambda d: d.update(schema=2), ""),
    "no schema": (lambda d: d.pop("schema"), ""),
    "no files": (lambda d: d.pop("files"), "malformed ('files' is missing)"),
    "a file that is not an object": (lambda d: d.update(files=["a"]), ""),
    "a file without a digest": (lambda d: d["files"][0].pop("sha256"), "malformed (missing: 'sha256')"),
    "itself among the files": (lambda d: d["files"][0].update(path=MANIFEST_NAME), ""),
    "a path twice": (lambda d: d["files"][1].update(path="a.safetensors"), ""),
    "paths that differ in case": (lambda d: d["files"][1].update(path="A.safetensors"), ""),
    "unsorted files": (lambda d: d["files"].reverse(), ""),
    "unsorted tensors": (lambda d: d["tensors"].reverse(), ""),
    "an explicit null": (lambda d: d["targets"][0].update(base_xxh3_128=None), ""),
    "an absolute path": (lambda d: d["files"][0].update(path="/etc/passwd"), UNSAFE),
    "a path outside": (lambda d: d["files"][0].update(path="../x"), UNSAFE),
    "a backslash": (lambda d: d["files"][0].update(path="a\\b"), UNSAFE),
    "options that are not an object": (lambda d: d["operation"].update(options=[1]), ""),
    "a schema that is not a number": (lambda d: d.update(schema=True), ""),
    "an operation without a name": (lambda d: d["operation"].pop("name"), ""),
    "an operation that is a list": (lambda d: d.update(operation=[]), ""),
    "a tool without a version": (lambda d: d["tool"].pop("version"), ""),
    "a kind with a line break": (lambda d: d.update(kind="adapter\nsignature  by the key in key.pub"), ""),
    "a tool with an escape character": (lambda d: d["tool"].update(name="\x1b[2J"), ""),
    "a role with a line break": (lambda d: d["parents"][0].update(role="base\n\n# Title"), ""),
    "NaN": (lambda d: d["operation"].update(x=float("nan")), "malformed (NaN is not valid JSON)"),
    "a tensor's digest": (lambda d: d["tensors"][0].update(xxh3_128="ce" + XXH[2:]), CHANGED),
    "a tensor's shape": (lambda d: d["tensors"][1].update(shape=[2, 1]), CHANGED),
    "a tensor left out": (lambda d: d["tensors"].pop(), CHANGED),
    "the root": (lambda d: d.update(tensors_root=SHA), CHANGED),
}
"""An edit of the document, and words of the error."""


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_wrong_or_edited_manifest_is_refused_with_exit_code_3_or_5_for_an_unsafe_path(name):
    edited = document()
    change, error = STRUCTURE[name]
    change(edited)
    with pytest.raises(AdaptkitError, match=rf"^adaptkit-manifest\.json: .*{re.escape(error)}") as caught:
        Manifest.from_bytes(canonical(edited))
    expected = (UnsafeInputError, 5) if error == UNSAFE else (IntegrityError, 3)
    assert (type(caught.value), caught.value.exit_code) == expected
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"sha256": "ac" + SHA[2:]}, {"size": 11}])
def test_changes_that_the_root_does_not_cover_change_the_manifest_digest(change):
    edited = document()
    edited["files"][0].update(change)
    assert Manifest.from_bytes(canonical(edited)).sha256 != MANIFEST.sha256


@pytest.mark.parametrize(
    "text",
    [
        MANIFEST.to_bytes()[:-1],
        MANIFEST.to_bytes() + b"\n",
        b" " + MANIFEST.to_bytes(),
        MANIFEST.to_bytes().replace(b'":', b'": ', 1),
        MANIFEST.to_bytes().replace("é".encode(), b"\\u00e9"),
        MANIFEST.to_bytes().replace(b'"kind":"adapter"', b'"kind":"adapter","kind":"adapter"', 1),
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
    ],
)
def test_a_manifest_that_is_not_in_canonical_form_is_refused(text):
    with pytest.raises(IntegrityError) as caught:
        Manifest.from_bytes(text)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("depth", [100, 700, 100_000])
def test_deeply_nested_options_are_read_or_refused(depth):
    text = MANIFEST.to_bytes().replace(b'"options":{', b'"options":{"deep":' + b"[" * depth + b"]" * depth + b",")
    with contextlib.suppress(IntegrityError):
        assert Manifest.from_bytes(text).to_bytes() == text


def test_a_manifest_that_holds_nan_cannot_be_written():
    with pytest.raises(ValueError, match="Out of range"):
        replace(MANIFEST, operation={"x": float("nan")}).to_bytes()


@pytest.mark.parametrize("paths", [("a", "a"), ("LICENSE.txt", "license.txt"), ("Adaptkit-Manifest.json",)])
def test_a_manifest_with_colliding_paths_cannot_be_made(paths):
    with pytest.raises(ValueError, match="a path appears twice"):
        Manifest("checkpoint", {"name": "x", "options": {}}, tuple(FileRecord(path, 0, "0" * 64) for path in paths))


def test_a_required_manifest_that_is_missing_is_an_error(tmp_path):
    assert read_manifest(tmp_path) is None
    with pytest.raises(IntegrityError, match=MANIFEST_NAME):
        require_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(MANIFEST.to_bytes())
    assert require_manifest(tmp_path) == MANIFEST


def test_a_file_and_a_missing_path_have_no_manifest(tmp_path):
    (tmp_path / "file").touch()
    assert [read_manifest(tmp_path / name) for name in ("file", "nothing", "")] == [None] * 3
