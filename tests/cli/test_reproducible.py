"""The same inputs give the same bytes, independent of threads, hash seed, folders, and the order of equivalent options.

Every command that makes an artifact runs twice, in processes that differ in all of these; the manifests, which contain
the hashes of all other files, are compared.
"""

import json
import os
import pwd
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import tiny

from adaptkit.checkpoint import manifest
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest

DRIVER = """
import json, os, sys
import torch
from adaptkit.cli.main import cli
for command in json.load(sys.stdin):
    cli.main(command, standalone_mode=False)
"""

STEPS = {
    "packed": ["quantize", "base", "--max-shard-size", "60000B", "--skip", "*.o_proj", "--skip", "*.k_proj", "-o"],
    "calibrated": ["quantize", "base", "--calibrate", "text.txt", "--calibration-tokens", "256", "--window", "32",
                   "--init-adapter", "2", "-o"],
    "plain": ["dequantize", "packed", "-o"],
    "trained": ["train", "--base", "packed", "--data", "rows.jsonl", "--steps", "2", "--rank", "2", "--max-length",
                "64", "--targets", "q_proj", "--targets", "v_proj", "-o"],
    "stacked": ["stack", "trained", "trained", "--method", "dare", "--seed", "5", "--weight", "0.5", "--weight", "2",
                "-o"],
    "copied": ["adopt", "base", "-o"],
    "small": ["resize", "stacked", "--energy", "0.9", "-o"],
    "merged": ["merge", "base", "small", "trained", "--embed-adapter", "-o"],
    "merged-nf4": ["merge", "base", "small", "--format", "nf4", "-o"],
    "back": ["unmerge", "merged", "--adapter", "small", "--adapter", "trained", "-o"],
    "found": ["extract", "merged", "base", "--rank", "3", "--target", "*.q_proj", "--target", "*.v_proj", "-o"],
}  # fmt: skip
MADE = sorted([*STEPS, "calibrated-init"])
USERS, HOST = ["jane-doe", "john-doe"], "host-of-john"
USER_VARIABLES = ["LOGNAME", "USER", "LNAME", "USERNAME"]
"""The variables that ``getpass.getuser`` reads."""
ORIGIN_WORDS = {
    "author", "clock", "created", "cwd", "date", "day", "directory", "duration", "elapsed", "ended", "finished",
    "folder", "home", "host", "hostname", "machine", "modified", "node", "now", "pid", "platform", "seconds",
    "started", "time", "timestamp", "user", "username", "when", "where", "who",
}  # fmt: skip
"""Words of keys that would tell where, when or by whom something was made."""
ABSOLUTE_PATH = re.compile(r"(?:^|[\s='\":(,])(?:/|~|[A-Za-z]:[\\/]|\\\\|file:)")
DATE_OR_TIME = re.compile(r"\d{4}-[01]\d-[0-3]\d|[0-2]\d:[0-5]\d")
SECOND_UNITS = (1, 10**3, 10**6, 10**9)


def inputs(folder):
    tiny.write_llama(folder / "base", shards=2)
    tiny.write_instructions(folder / "rows.jsonl")
    (folder / "text.txt").write_text("the whales under water and the bridges at night\n" * 60)


def swapped(command):
    """The same command with its repeated options in reverse order, and one of each, except --adapter, given again."""
    out = [*command]
    for flag in ("--skip", "--targets", "--target", "--adapter"):
        places = [place + 1 for place, word in enumerate(command) if word == flag]
        for place, other in zip(places, reversed(places), strict=True):
            out[place] = command[other]
        if places and flag != "--adapter":
            out = [*out[:-1], flag, command[places[0]], out[-1]]
    return out


def run(commands, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two folders with all that the commands make."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two") / "deep" / "er"
    inputs(one)
    shutil.copytree(one, two)
    plain, other = [], []
    for name, command in STEPS.items():
        threads = [] if command[0] in ("train",) else ["--threads", "1"]
        plain.append([*command[:-1], *threads, "-o", name, "--quiet"])
        absolute = [str(two / word) if (two / word).exists() or word in STEPS else word for word in swapped(command)]
        threads = threads and ["--threads", "3"]
        other.append([*absolute[:-1], *threads, "-o", str(two / name), "--quiet"])
    (two / "elsewhere").mkdir()
    run(plain, one, PYTHONHASHSEED="0", TZ="UTC", OMP_NUM_THREADS="1", **dict.fromkeys(USER_VARIABLES, USERS[0]))
    others = {"PYTHONHASHSEED": "4711", "TZ": "Asia/Tokyo", "HOSTNAME": HOST, "OMP_NUM_THREADS": "2"}
    run(other, two / "elsewhere", **others, **dict.fromkeys(USER_VARIABLES, USERS[1]))
    return one, two


@pytest.mark.parametrize("name", MADE)
def test_every_command_gives_the_same_bytes(sides, name):
    one, two = (folder / name for folder in sides)
    if (one / MANIFEST_NAME).read_bytes() != (two / MANIFEST_NAME).read_bytes():  # for a readable difference
        assert json.loads((one / MANIFEST_NAME).read_bytes()) == json.loads((two / MANIFEST_NAME).read_bytes())
    assert (one / MANIFEST_NAME).read_bytes() == (two / MANIFEST_NAME).read_bytes()
    listed = {record.path: (record.size, record.sha256) for record in require_manifest(two).files}
    found = [path for path in two.rglob("*") if (path.is_file() and path.name != MANIFEST_NAME) or path.parent != two]
    assert listed == {
        path.relative_to(two).as_posix(): (path.stat().st_size, file_sha256(path)) for path in found if path.is_file()
    }


@pytest.mark.parametrize("name", MADE)
def test_every_manifest_fits_the_schema(sides, name):
    schema = Path(manifest.__file__).with_name("manifest.schema.json")
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_bytes()))
    validator.validate(json.loads((sides[0] / name / MANIFEST_NAME).read_bytes()))


def keys_and_values(value):
    """All keys of nested objects, and all values that are neither objects nor lists."""
    if isinstance(value, dict):
        parts = [keys_and_values(item) for item in value.values()]
        return [*value, *(key for keys, _ in parts for key in keys)], [leaf for _, leaves in parts for leaf in leaves]
    if isinstance(value, list):
        parts = [keys_and_values(item) for item in value]
        return [key for keys, _ in parts for key in keys], [leaf for _, leaves in parts for leaf in leaves]
    return [], [value]


@pytest.mark.parametrize("name", MADE)
def test_no_manifest_says_where_when_or_by_whom_it_was_made(sides, name):
    document = json.loads((sides[0] / name / MANIFEST_NAME).read_bytes())
    assert set(document["tool"]) == {"name", "version"}
    keys, values = keys_and_values(document)
    assert not {word for key in keys for word in key.casefold().split("_")} & ORIGIN_WORDS
    texts = [value for value in values if isinstance(value, str)]
    assert texts
    people_and_hosts = {*USERS, pwd.getpwuid(os.getuid()).pw_name, os.uname().nodename, HOST}
    assert not {word for text in texts for word in re.split(r"[\s@:/]", text)} & people_and_hosts
    assert [text for text in texts if ABSOLUTE_PATH.search(text) or DATE_OR_TIME.search(text)] == []
    assert not any(str(folder) in text for folder in sides for text in texts)
    numbers = [value for value in values if isinstance(value, int | float)]
    year_s, now_s = 365 * 86400, time.time()
    assert not [value for value in numbers for unit in SECOND_UNITS if abs(value / unit - now_s) < year_s]


def header_of(path):
    """The bytes of a safetensors file's header, and the number of bytes after it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length), path.stat().st_size - 8 - length


def test_headers_list_tensors_in_file_order_without_gaps_and_are_padded_with_spaces(sides):
    """Metadata, whose order could vary, has at most one key."""
    paths = [path for path in sorted(sides[0].rglob("*.safetensors")) if not path.is_relative_to(sides[0] / "base")]
    assert {path.relative_to(sides[0]).parts[0] for path in paths} == set(MADE)
    for path in paths:
        raw, content_bytes = header_of(path)
        text = raw.decode()
        header, end = json.JSONDecoder().raw_decode(text)
        assert len(header.pop("__metadata__", {})) <= 1, path
        assert len(raw) % 8 == 0, path
        assert text[end:] == " " * (-len(text[:end].encode()) % 8), path
        places = [entry["data_offsets"] for entry in header.values()]
        assert [place[0] for place in places] == [0, *(place[1] for place in places[:-1])], path
        assert places[-1][1] == content_bytes, path


@pytest.mark.parametrize("name", ["merged", "back", "copied"])
def test_results_with_all_tensors_of_the_base_have_the_headers_of_its_files(sides, name):
    files = sorted(path.name for path in (sides[0] / "base").glob("*.safetensors"))
    assert len(files) == 2
    assert sorted(path.name for path in (sides[0] / name).glob("*.safetensors")) == files
    for file in files:
        assert header_of(sides[0] / name / file) == header_of(sides[0] / "base" / file)


def test_artifacts_made_in_one_folder_are_accepted_as_parents_of_those_in_the_other(sides, run_cli):
    one, two = sides
    done = run_cli("verify", two / "found", "--parents", one, "--json")
    assert done.code == 0, done.stderr
    roles = [parent["role"] for parent in json.loads(done.stdout)["parents"]]
    assert roles == ["base", "tuned"]
