"""Which files make up a checkpoint, and which paths are refused."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.checkpoint.foreign import VALUE_HEADS, WEIGHTS_BESIDE
from adaptkit.checkpoint.layout import (
    INDEX_NAME,
    index_bytes,
    name_of,
    read_config,
    read_json,
    read_small,
    require_folder,
    resolve_inside,
    shard_name,
    weight_files,
    write_json,
)
from adaptkit.checkpoint.side_files import check_side_files
from adaptkit.errors import AdaptkitError, CheckpointError, UnsafeInputError

HOSTILE_PATHS = [
    "../x.safetensors",
    "a/../../x",
    "a/..",
    "..",
    ".",
    "",
    "/etc/passwd",
    "~/x",
    "~root",
    "C:\\x",
    "C:x",
    "\\\\server\\share",
    "a\\b",
    "a//b",
    "./a",
    "a/",
    "a\0b",
    "a\nb",
    "a\u202eb",
]


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_a_path_that_leaves_its_folder_or_is_not_plain_is_refused(tmp_path, name):
    with pytest.raises(UnsafeInputError, match="is not a plain path inside its folder"):
        resolve_inside(tmp_path, name)


@given(st.text(min_size=1, max_size=20).map(lambda text: text.replace("ł", "../")))
def test_a_path_that_is_accepted_is_inside_the_folder(name):
    root = Path("/nowhere/root")
    try:
        found = resolve_inside(root, name)
    except UnsafeInputError:
        return
    assert os.path.normpath(found).startswith("/nowhere/root/")


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    """The Hub's cache consists of links to files."""
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (other / "blob").write_bytes(b"x")
    for link, target in (("file", "../other/blob"), ("folder", other), ("dangling", "nothing"), ("loop", "loop")):
        (root / link).symlink_to(target)
    assert resolve_inside(root, "file").read_bytes() == b"x"
    for name in ("folder", "folder/blob", "dangling", "loop"):
        with pytest.raises(UnsafeInputError, match="link"):
            resolve_inside(root, name)


def test_weights_are_in_a_single_file_or_in_the_shards_of_an_index(llama, llama_sharded):
    assert weight_files(llama) == (["model.safetensors"], None)
    files, weight_map = weight_files(llama_sharded)
    assert files == [shard_name(number, 3) for number in (1, 2, 3)]
    assert set(weight_map.values()) == set(files)


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MERGE_IT = "this is an adapter: give its base, or merge it into the base first"
RENAME, AS_SAVED, CONVERT = "if its tensors have the names", "as transformers saves it", "safe_serialization"
OTHER_FOLDERS = [
    (["pytorch_model.bin"], r"pickles \(pytorch_model\.bin\)", CONVERT),
    (["pytorch_model-00001-of-00002.bin"], r"pickles \(pytorch_model-00001", CONVERT),
    (["lit_model.pth"], r"pickles \(lit_model\.pth\)", RENAME),  # of LitGPT
    (["lit_model.pth.lora"], r"pickles \(lit_model\.pth\.lora", RENAME),
    (["model-Q4_K_M.gguf"], r"GGUF \(model-Q4_K_M\.gguf\)", ""),
    ([*ADAPTER, "README.md"], "not a checkpoint", MERGE_IT),
    (["model.fp16.safetensors"], "neither model.safetensors nor .*, but model.fp16", ""),
    (["model-00001-of-00002.safetensors"], "neither model.safetensors nor .*, but model-00001", ""),
    (["pytorch_lora_weights.bin"], "in the format of diffusers", "as peft saves it"),
    (["diffusion_pytorch_model.bin"], "in the format of diffusers", AS_SAVED),
    (["diffusion_pytorch_model-00001-of-00003.safetensors"], "in the format of diffusers", AS_SAVED),
]
"""Files beside config.json, and words of the error and the hint."""


@pytest.mark.parametrize(("names", "error", "hint"), OTHER_FOLDERS, ids=lambda value: str(value)[:40])
def test_a_folder_without_weights_that_can_be_read_is_refused_with_what_to_do(tmp_path, names, error, hint):
    """Tensors of diffusers have other names: a file that is only renamed would be refused later, or misread."""
    for name in ("config.json", "adaptkit-undo-00001-of-00001.safetensors", *names):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=error) as caught:
        weight_files(tmp_path)
    assert hint in caught.value.hint
    assert ("config.json" in caught.value.hint) == (hint == RENAME)
    assert ("rename" in caught.value.hint) == (hint == RENAME or "neither" in error)


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "adapter_model.bin"]
)
def test_other_pickles_of_trainers_are_not_taken_for_weights(tmp_path, name):
    """So an adapter or a folder of checkpoints is not reported as a model to convert."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model\.bin\)"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", [*VALUE_HEADS, *WEIGHTS_BESIDE])
def test_a_file_that_is_only_saved_beside_other_weights_is_not_taken_for_a_checkpoint(tmp_path, name):
    """It cannot be converted or renamed to one, as the hints for pickles and for single files say."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"not a checkpoint: .*, but {name}") as caught:
        weight_files(tmp_path)
    assert caught.value.hint == "pass the folder that contains the adapter or checkpoint that it was saved with"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model\.bin\)"):
        weight_files(tmp_path)


def test_checkpoints_in_subfolders_are_named_in_the_hint(tmp_path):
    for number, file in ((9, "config.json"), (10, "adapter_config.json"), (11, "config.json"), (12, "config.json")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / file).write_text("{}")
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint") as caught:
        weight_files(tmp_path)
    assert caught.value.hint == "pass a folder inside it: checkpoint-10, checkpoint-11, checkpoint-12 and 1 more"
    (tmp_path / "checkpoint-9" / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        weight_files(tmp_path)
    assert caught.value.hint == "pass a folder inside it: checkpoint-10, checkpoint-11, checkpoint-12"


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[]",
        '{"weight_map":[]}',
        '{"weight_map":{"a":1}}',
        '{"weight_map":{"a":["x.safetensors"]}}',
        '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
        '{"weight_map":{"a":"x.safetensors"},"metadata":{"total_size":NaN}}',
        *(json.dumps({"weight_map": {"a": name}}) for name in HOSTILE_PATHS),
        '{"weight_map":{"a":"config.json"}}',
        '{"weight_map":{"a":"pytorch_model-00001-of-00002.bin"}}',
        '{"weight_map":{"a":"adaptkit-undo-00001-of-00001.safetensors"}}',
        '{"weight_map":{"a":"deeper/x.safetensors"}}',
    ],
)
def test_a_malformed_index_is_refused(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(UnsafeInputError):
        weight_files(tmp_path)


def test_a_single_weight_file_next_to_shards_is_refused(llama, llama_sharded, copy_of):
    """transformers would load the single file, and other programs the shards."""
    folder = copy_of(llama_sharded)
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="as well as"):
        weight_files(folder)


def test_json_files_are_deterministic_and_read_back_unchanged(tmp_path):
    value = {"b": [1, None], "a": {"z": "é", "y": 0.1, "\ud800": "half a pair: \udfff"}}
    assert write_json(value) == write_json(dict(reversed(value.items())))
    (tmp_path / "x.json").write_bytes(write_json(value))
    assert read_json(tmp_path / "x.json") == value


def test_an_index_is_the_one_that_transformers_writes(llama_sharded):
    theirs = read_json(llama_sharded / INDEX_NAME)
    total = theirs["metadata"]["total_size"]
    ours = json.loads(index_bytes(theirs["weight_map"].items(), total))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == total


def holding(root, *names, text=""):
    for name in names:
        (root / name).write_text(text)
    return root


def large(path):
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)
    return path


def index_of(root, *shards):
    (root / INDEX_NAME).write_text(json.dumps({"weight_map": {str(n): name for n, name in enumerate(shards)}}))
    return root


REFUSALS = {
    "a long path": (lambda root: resolve_inside(root, "a/" * 600 + "b"), 5),
    "a long name": (lambda root: resolve_inside(root, "é" * 128), 5),
    "a file for a folder": (lambda root: require_folder(holding(root, "a") / "a"), 2),
    "a missing folder": (lambda root: weight_files(root / "absent"), 2),
    "a file above 256 MiB": (lambda root: read_small(large(root / "a")), 5),
    "a malformed configuration": (lambda root: read_config(holding(root, "a", text="{") / "a"), 5),
    "shards that differ in case": (lambda root: weight_files(index_of(root, "a.safetensors", "A.safetensors")), 5),
    "side files that differ in case": (lambda root: check_side_files(holding(root, "a.json", "A.json")), 5),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_a_hint_and_exit_code_5_or_2_for_a_wrong_argument(tmp_path, name):
    refuse, code = REFUSALS[name]
    with pytest.raises(AdaptkitError, match=f"^{re.escape(str(tmp_path))}") as caught:
        refuse(tmp_path)
    assert caught.value.exit_code == code
    assert caught.value.hint


def test_infinities_are_accepted_in_a_configuration_and_nowhere_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "low": -Infinity}')
    assert read_config(path) == {"time_step_limit": [0.0, float("inf")], "low": float("-inf")}
    assert write_json(read_config(path)) == write_json({"low": float("-inf"), "time_step_limit": [0.0, float("inf")]})
    with pytest.raises(CheckpointError, match="Infinity is not valid JSON"):
        read_json(path)
    for text in ('{"x": NaN}', '{"x": 1e999}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"NaN is not valid JSON|too large"):
            read_config(path)


def test_a_folder_of_the_hubs_cache_is_named_after_its_repository(tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--org--a--name" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    (tmp_path / "link").symlink_to(cached)
    assert name_of(cached) == name_of(tmp_path / "link") == "org/a--name"
    (tmp_path / "mine").symlink_to(tmp_path / "hub")
    monkeypatch.chdir(tmp_path / "hub")
    assert [name_of(Path(path)) for path in ("../mine", ".", "models--org--a--name/..", tmp_path / "mine")] == [
        "mine", "hub", "hub", "mine"
    ]  # fmt: skip
