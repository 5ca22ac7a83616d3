"""The JSON Schema agrees with the dataclasses, accepts released manifests, and rejects malformed ones."""

import copy
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from make_golden import GOLDEN

import adaptkit
from adaptkit.checkpoint.manifest import FileRecord, Manifest, Parent, Target, TensorRecord
from adaptkit.numerics.spec import ITEM_BYTES

SCHEMA = json.loads((Path(adaptkit.__file__).parent / "checkpoint" / "manifest.schema.json").read_text())
DOCS = Path(__file__).parents[2] / "docs" / "manifest.md"
CHECK = jsonschema.Draft202012Validator(SCHEMA)
MANIFESTS = sorted(GOLDEN.glob("*/*/adaptkit-manifest.json"))
RECORDS = {"file": FileRecord, "tensor": TensorRecord, "parent": Parent, "target": Target}


def test_the_schema_is_valid_and_has_the_fields_of_the_classes():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    expected = {field.name for field in dataclasses.fields(Manifest)} | {"tensors_root"}
    assert set(SCHEMA["properties"]) == set(SCHEMA["required"]) == expected
    for name, record in RECORDS.items():
        fields, definition = dataclasses.fields(record), SCHEMA["$defs"][name]
        assert set(definition["properties"]) == {field.name for field in fields}
        assert definition["required"] == sorted(field.name for field in fields if field.default is dataclasses.MISSING)
        assert definition["additionalProperties"] is False
    assert SCHEMA["$defs"]["tensor"]["properties"]["dtype"]["enum"] == sorted(ITEM_BYTES)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_every_released_manifest_matches_the_schema(path):
    CHECK.validate(json.loads(path.read_bytes()))


def document():
    return json.loads(next(path for path in MANIFESTS if path.parent.name == "merged").read_bytes())


EDITS = {
    "an unknown field": lambda d: d.update(signature="x"),
    "another schema": lambda d: d.update(schema=2),
    "no files": lambda d: d.pop("files"),
    "a negative size": lambda d: d["files"][0].update(size=-1),
    "upper case": lambda d: d["files"][0].update(sha256=d["files"][0]["sha256"].upper()),
    "a shape with a fraction": lambda d: d["tensors"][0].update(shape=[0.5]),
    "an explicit null": lambda d: d["parents"][0].update(manifest_sha256=None),
    "an unknown role": lambda d: d["parents"][0].update(role="friend"),
    "a target without a module": lambda d: d["targets"][0].pop("module"),
}


@pytest.mark.parametrize("name", sorted(EDITS))
def test_malformed_documents_do_not_match_the_schema(name):
    found = document()
    CHECK.validate(found)
    edited = copy.deepcopy(found)
    EDITS[name](edited)
    with pytest.raises(jsonschema.ValidationError):
        CHECK.validate(edited)


def test_the_documented_example_computes_the_root_without_adaptkit(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "adaptkit." not in code
    assert len(code.strip().splitlines()) <= 10
    for path in MANIFESTS:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, path.parent], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        root, whole = done.stdout.split()
        assert root == json.loads(path.read_bytes())["tensors_root"]
        assert whole == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_documentation_names_every_field():
    text = DOCS.read_text()
    names = [*SCHEMA["properties"], *(f for d in RECORDS for f in SCHEMA["$defs"][d]["properties"])]
    assert [name for name in names if f"`{name}`" not in text] == []
