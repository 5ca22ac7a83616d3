"""Unmerging restores the base's files byte by byte, or names the part that does not belong to the merge."""

import filecmp
import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from folders import add_listed, edit_json, edited_tensors, flip
from peft_adapters import quiet
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from undo_frames import frames

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.header import write_header
from adaptkit.checkpoint.manifest import FileRecord, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, IntegrityError, OutputExistsError, UnsafeInputError, UsageError
from adaptkit.hub._selection import part_of, select
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify

WEIGHTS, RECORD = "model.safetensors", "adaptkit-undo/shard-00001-of-00001.safetensors"
MANIFEST = "adaptkit-manifest.json"


def tree(folder):
    """Map every path to the content of its file; None for folders."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_same_files(found, base):
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {MANIFEST}
    match, mismatch, errors = filecmp.cmpfiles(base, found, sorted(names), shallow=False)
    assert (mismatch, errors) == ([], [])
    assert len(match) == len(names)


@pytest.mark.parametrize("weights", [(1.0,), (0.1,), (30.0,), (1.0, -0.7), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_files_are_identical_to_those_of_the_base(tmp_path, adapter, second_adapter, dtype, weights):
    base = tiny.write_llama(tmp_path / "base", dtype=dtype, shards=1 + len(weights))
    adapters = [adapter, second_adapter][: len(weights)]
    merge(base, adapters, tmp_path / "merged", MergeOptions(weights=weights))
    report = unmerge(tmp_path / "merged", adapters, tmp_path / "out")
    assert_same_files(tmp_path / "out", base)
    assert report.identical
    assert report.restored == 14
    verify(tmp_path / "out")


def test_code_licences_and_chat_templates_are_copied_and_restored(tmp_path, llama, adapter, copy_of):
    base, brings = copy_of(llama), copy_of(adapter, "brings")
    edit_json(base / "config.json", auto_map={"AutoModel": "modeling_x.Model"})
    (brings / "tokenizer.json").write_text("{}")  # replaces all files of the base's tokenizer
    more = ("modeling_x.py", "LICENSE-MODEL", "USE_POLICY.md", "additional_chat_templates/tool.jinja")
    (base / "additional_chat_templates").mkdir()
    for name in more:
        (base / name).write_text(name)
    before = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    for number, given in enumerate((adapter, brings)):
        made, out = tmp_path / f"merged-{number}", tmp_path / f"out-{number}"
        merge(base, [given], made)
        assert [name for name in more if not (made / name).exists()] == ([more[-1]] if given is brings else [])
        unmerge(made, [given], out)
        assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == before | {Path(MANIFEST)}
        assert all((out / name).read_bytes() == (base / name).read_bytes() for name in before)
        verify(made)
        verify(out)
    quantize(base, tmp_path / "nf4")
    dequantize(tmp_path / "nf4", tmp_path / "plain")
    assert all((tmp_path / folder / name).read_text() == name for folder in ("nf4", "plain") for name in more)


def test_files_of_gpt2_are_restored(tmp_path, gpt2):
    folder = tiny.write_peft_adapter(tmp_path / "a", gpt2)
    merge(gpt2, [folder], tmp_path / "merged")
    unmerge(tmp_path / "merged", [folder], tmp_path / "out")
    assert_same_files(tmp_path / "out", gpt2)


def test_signed_zeros_denormals_and_extremes_are_restored(tmp_path, llama, adapter, copy_of):
    base = copy_of(llama)
    with edited_tensors(base / WEIGHTS) as tensors:
        weight = tensors["model.layers.0.mlp.up_proj.weight"]
        top = float(torch.finfo(weight.dtype).max)
        weight[0, :8] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, top, -top, 1e30, -1e-30]).bfloat16()
        weight[1] = -0.0
    merge(base, [adapter], tmp_path / "merged", MergeOptions(weights=(1e-4,)))
    unmerge(tmp_path / "merged", [adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", base)


def test_adapters_may_be_given_in_any_order(tmp_path, llama, adapter, second_adapter):
    merge(llama, [adapter, second_adapter], tmp_path / "merged", MergeOptions(weights=(0.3, 0.9)))
    unmerge(tmp_path / "merged", [second_adapter, adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", llama)


def test_an_adapter_merged_twice_with_different_weights_can_be_unmerged(tmp_path, llama, adapter):
    merge(llama, [adapter, adapter], tmp_path / "merged", MergeOptions(weights=(0.3, 0.9)))
    unmerge(tmp_path / "merged", [adapter, adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", llama)


def test_merges_of_merges_are_unmerged_in_reverse_order(tmp_path, llama_sharded, adapter, second_adapter):
    merge(llama_sharded, [adapter], tmp_path / "first")
    merge(tmp_path / "first", [second_adapter], tmp_path / "second")
    with pytest.raises(BaseMismatchError):
        unmerge(tmp_path / "second", [adapter], tmp_path / "wrong order")
    unmerge(tmp_path / "second", [second_adapter], tmp_path / "back once")
    for number in (1, 2, 3):
        shard = f"model-0000{number}-of-00003.safetensors"
        assert filecmp.cmp(tmp_path / "back once" / shard, tmp_path / "first" / shard, shallow=False)
    assert require_manifest(tmp_path / "back once").tensors_root == require_manifest(tmp_path / "first").tensors_root
    unmerge(tmp_path / "first", [adapter], tmp_path / "back twice")
    assert_same_files(tmp_path / "back twice", llama_sharded)


def test_a_missing_folder_and_less_than_one_thread_are_refused(tmp_path, llama, adapter):
    with pytest.raises(UsageError, match="does not exist"):
        unmerge(tmp_path / "nowhere", [adapter], tmp_path / "out")
    for threads in (0, -1):
        with pytest.raises(UsageError, match=f"threads: must be at least 1, found {threads}"):
            unmerge(llama, [adapter], tmp_path / "out", threads=threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_bytes(tmp_path, llama_sharded, adapter, threads):
    merge(llama_sharded, [adapter], tmp_path / "merged")
    unmerge(tmp_path / "merged", [adapter], tmp_path / "out", threads=threads)
    assert_same_files(tmp_path / "out", llama_sharded)


def test_the_result_names_the_merged_model_as_its_parent(tmp_path, llama, adapter):
    merge(llama, [adapter], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", [adapter], tmp_path / "out")
    manifest, merged = require_manifest(tmp_path / "out"), require_manifest(tmp_path / "merged")
    assert [(p.role, p.manifest_sha256) for p in manifest.parents] == [("merged", merged.sha256)]
    assert manifest.tensors_root == merged.parents[0].tensors_root == report.tensors_root


@pytest.fixture
def merged(tmp_path, llama, adapter):
    merge(llama, [adapter], tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_merged_weight_with_one_changed_bit_is_named(merged, adapter, tmp_path, name, bit):
    located = Checkpoint(merged).tensors[name]
    flip(merged / WEIGHTS, located.position + located.spec.nbytes // 2, 1 << bit)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        unmerge(merged, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # not even what was written before the error


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_one_changed_byte_of_the_undo_record_is_detected(merged, adapter, tmp_path, where):
    from adaptkit.checkpoint.reader import TensorFiles

    name = "model.layers.1.mlp.down_proj.weight"
    located = TensorFiles(merged, [RECORD]).tensors[name]
    flip(merged / RECORD, located.position + int(where * (located.spec.nbytes - 1)), 1 << 4)
    with pytest.raises(IntegrityError, match=r"adaptkit-undo/shard-00001-of-00001\.safetensors changed"):
        unmerge(merged, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # not even what was written before the error


def test_a_damaged_header_of_the_undo_record_is_detected(merged, adapter, tmp_path):
    flip(merged / RECORD, 9)
    with pytest.raises((IntegrityError, UnsafeInputError), match=r"adaptkit-undo/shard-00001"):
        unmerge(merged, [adapter], tmp_path / "out")


def test_one_changed_byte_of_the_adapter_is_refused(merged, adapter, copy_of, tmp_path):
    changed = copy_of(adapter)
    flip(changed / "adapter_model.safetensors", -5)
    with pytest.raises(BaseMismatchError, match="tensors_root"):
        unmerge(merged, [changed], tmp_path / "out")


@pytest.mark.parametrize("changes", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}])
def test_a_different_scaling_of_the_same_tensors_is_refused(merged, adapter, copy_of, tmp_path, changes):
    folder = copy_of(adapter)
    edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(BaseMismatchError, match=r"has the tensors of .* a different adapter_config\.json"):
        unmerge(merged, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def saved_again(folder):
    """Change a configuration as peft does when it saves it again: sets in a different order, keys without effect."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]
    changes = {"lora_dropout": 0.5, "exclude_modules": ["x"], "arrow_config": None, "ensure_weight_tying": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_an_adapter_that_was_saved_again_is_accepted(second_adapter, llama, copy_of, tmp_path):
    merge(llama, [second_adapter], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", [saved_again(copy_of(second_adapter))], tmp_path / "out")
    assert report.identical
    assert_same_files(tmp_path / "out", llama)


def test_all_adapters_that_were_saved_again_are_named_if_one_means_something_else(
    adapter, second_adapter, llama, copy_of, tmp_path
):
    merge(llama, [adapter, second_adapter], tmp_path / "merged")
    folders = [copy_of(folder, f"again-{folder.name}") for folder in (adapter, second_adapter)]
    for folder, changes in zip(folders, ({"lora_dropout": 0.5}, {"lora_alpha": 30}), strict=True):
        edit_json(folder / "adapter_config.json", **changes)
    with pytest.raises(BaseMismatchError, match=r"a different adapter_config\.json") as caught:
        unmerge(tmp_path / "merged", folders, tmp_path / "out")
    assert all(str(folder) in caught.value.message for folder in folders)


def test_a_different_adapter_is_refused(merged, second_adapter, llama, tmp_path):
    with pytest.raises(BaseMismatchError, match="tensors_root"):
        unmerge(merged, [second_adapter], tmp_path / "out")
    other = tiny.write_peft_adapter(tmp_path / "other", llama, seed=77)
    with pytest.raises(BaseMismatchError, match="tensors_root"):
        unmerge(merged, [other], tmp_path / "out")


def test_a_wrong_number_of_adapters_is_refused(merged, adapter, tmp_path):
    with pytest.raises(UsageError, match="expected 1 merged adapter, found 2"):
        unmerge(merged, [adapter, adapter], tmp_path / "out")
    with pytest.raises(UsageError, match="none is given and none is stored"):
        unmerge(merged, [], tmp_path / "out")


def test_a_merge_without_an_undo_record_is_refused(llama, adapter, tmp_path, merged):
    merge(llama, [adapter], tmp_path / "no undo", MergeOptions(undo=False))
    with pytest.raises(IntegrityError, match="no undo record") as caught:
        unmerge(tmp_path / "no undo", [adapter], tmp_path / "out")
    assert "--no-undo" in caught.value.message
    (merged / RECORD).unlink()
    with pytest.raises(IntegrityError, match=r"shard-00001-of-00001\.safetensors is missing"):
        unmerge(merged, [adapter], tmp_path / "out")


def test_the_undo_record_of_a_different_merge_is_refused(llama, adapter, merged, tmp_path):
    merge(llama, [adapter], tmp_path / "stronger", MergeOptions(weights=(1.5,)))
    shutil.copy(tmp_path / "stronger" / RECORD, merged / RECORD)
    with pytest.raises(IntegrityError, match="shard-00001"):
        unmerge(merged, [adapter], tmp_path / "out")


def rehash(folder, name):
    """Record a changed file's size and hash in the manifest, and change nothing else there."""
    manifest = require_manifest(folder)
    content = (folder / name).read_bytes()
    changed = FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
    files = tuple(changed if record.path == name else record for record in manifest.files)
    (folder / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


def test_a_record_with_a_wrong_residual_is_refused_even_if_its_hash_is_right(merged, adapter, tmp_path):
    """The length is right, too: only the fingerprint of the original weight differs."""
    name = "model.layers.0.mlp.gate_proj.weight"
    records = load_arrays(merged / RECORD)
    ((rows, stream),) = frames(records[name])
    residual = undo.unpack(stream, 64 * 128)
    residual[len(residual) // 2] += 1
    save_arrays(records | {name: undo.as_bytes(undo.pack_frame(rows, residual))}, merged / RECORD)
    rehash(merged, RECORD)
    with pytest.raises(
        IntegrityError, match=r"gate_proj\.weight: the undo record or the adapter does not belong to this merge"
    ):
        unmerge(merged, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # not even what was written before the error


@pytest.mark.parametrize("version", [b"\3", b"", b"\2\0", b"\0"])
def test_a_record_of_an_unknown_version_is_refused(merged, adapter, tmp_path, version):
    save_arrays(load_arrays(merged / RECORD) | {undo.VERSION_KEY: undo.as_bytes(version)}, merged / RECORD)
    rehash(merged, RECORD)
    with pytest.raises(IntegrityError, match="unknown version") as caught:
        unmerge(merged, [adapter], tmp_path / "out")
    assert "version of adaptkit" in caught.value.hint


@pytest.mark.parametrize("rows", [0, 1, 64, 127, 129, 2**32 - 1])
def test_a_record_with_a_wrong_number_of_rows_is_refused_even_if_its_hash_is_right(merged, adapter, tmp_path, rows):
    name = "model.layers.0.mlp.gate_proj.weight"
    records = load_arrays(merged / RECORD)
    ((_, stream),) = frames(records[name])
    frame = struct.pack("<II", rows, stream.size) + stream.tobytes()
    save_arrays(records | {name: undo.as_bytes(frame)}, merged / RECORD)
    rehash(merged, RECORD)
    with pytest.raises(IntegrityError, match="undo record"):
        unmerge(merged, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # not even what was written before the error


def test_the_first_of_two_merges_is_restored_whole_and_can_be_unmerged_itself(tmp_path, llama, adapter, second_adapter):
    merge(llama, [adapter], tmp_path / "first")
    merge(tmp_path / "first", [second_adapter], tmp_path / "second")
    before = tree(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    unmerge(tmp_path / "second", [second_adapter], tmp_path / "once")
    assert tree(tmp_path / "once") == before
    unmerge(tmp_path / "once", [adapter], tmp_path / "twice")
    assert_same_files(tmp_path / "twice", llama)


@pytest.mark.parametrize("base", ["plain", "plain with a card", "artifact", "published artifact"])
def test_publishing_a_merge_does_not_change_the_base_that_unmerging_restores(
    base, tmp_path, llama, adapter, second_adapter, copy_of
):
    if "artifact" in base:
        merge(llama, [second_adapter], tmp_path / base)
    else:
        copy_of(llama, base)
    if base == "plain with a card":
        (tmp_path / base / "README.md").write_text("the base's")
    elif base == "published artifact":
        add_listed(tmp_path / base, "README.md", "the base's")
    merge(tmp_path / base, [adapter], tmp_path / "merged")
    unmerge(tmp_path / "merged", [adapter], tmp_path / "before")
    add_listed(tmp_path / "merged", "README.md", "the merged model's")
    verify(tmp_path / "merged")
    report = unmerge(tmp_path / "merged", [adapter], tmp_path / "after")
    assert report.identical
    before, after = tree(tmp_path / "before"), tree(tmp_path / "after")
    if "artifact" not in base:  # it names the merged model's manifest, which publishing changed
        assert before.pop(Path(MANIFEST)) != after.pop(Path(MANIFEST))
    assert before == after
    verify(tmp_path / "after")


def test_a_merge_with_embedded_adapters_can_be_unmerged_alone(tmp_path, llama, adapter, second_adapter, copy_of):
    one, two = copy_of(adapter, "one"), copy_of(second_adapter, "two")
    merge(llama, [one, two], tmp_path / "merged", MergeOptions(weights=(0.5, 2.0), embed_adapter=True))
    verify(tmp_path / "merged")
    shutil.rmtree(one)
    shutil.rmtree(two)
    unmerge(tmp_path / "merged", [], tmp_path / "out")
    assert_same_files(tmp_path / "out", llama)
    flip(tmp_path / "merged/adaptkit-adapters/2/adapter_model.safetensors", -5)
    with pytest.raises(IntegrityError, match=r"adaptkit-adapters/2/adapter_model\.safetensors changed"):
        unmerge(tmp_path / "merged", [], tmp_path / "again")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_side_file_is_named(merged, adapter, tmp_path, name):
    with (merged / name).open("a") as file:
        file.write("\n")
    with pytest.raises(IntegrityError, match=f"{name} changed"):
        unmerge(merged, [adapter], tmp_path / "out")


def test_a_folder_that_is_not_a_merged_model_is_refused(llama, adapter, merged, tmp_path):
    with pytest.raises(IntegrityError, match=MANIFEST):
        unmerge(llama, [adapter], tmp_path / "out")
    unmerge(merged, [adapter], tmp_path / "out")
    with pytest.raises(IntegrityError, match="not a merged model: its manifest says checkpoint"):
        unmerge(tmp_path / "out", [adapter], tmp_path / "again")


def test_a_partial_pull_of_a_merged_model_is_reported_as_such(adapter, merged, tmp_path):
    """Regression: the message was "merged, not merged", since a part has the kind of the whole."""
    manifest = require_manifest(merged)
    part = part_of(manifest, select(manifest, ["weights", "config"]), ["weights", "config"])
    (merged / MANIFEST).write_bytes(part.to_bytes())
    with pytest.raises(IntegrityError, match="only a part of the merged model was pulled") as caught:
        unmerge(merged, [adapter], tmp_path / "out")
    assert "--only" in caught.value.hint


def test_a_manifest_with_an_edited_weight_is_refused(merged, adapter, tmp_path):
    text = (merged / MANIFEST).read_bytes()
    (merged / MANIFEST).write_bytes(text.replace(b'"weight":1.0', b'"weight":1.5'))
    assert text != (merged / MANIFEST).read_bytes()
    with pytest.raises(IntegrityError, match=r"_proj\.weight"):
        unmerge(merged, [adapter], tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_cannot_be_its_own_output(merged, adapter, tmp_path, copy_of, force):
    folder = copy_of(merged)
    before = tree(tmp_path)
    with pytest.raises(UsageError if force else OutputExistsError):
        unmerge(folder, [adapter], folder, force=force)
    assert tree(tmp_path) == before


def test_the_output_is_checked_before_any_adapter_is_read(merged, tmp_path, copy_of):
    """The missing adapter would be the next error."""
    with pytest.raises(OutputExistsError):
        unmerge(merged, [tmp_path / "nowhere"], copy_of(merged, "out"))
    with pytest.raises(UsageError, match="would change its own input"):
        unmerge(merged, [tmp_path / "nowhere"], merged / "inside")


def test_adapters_that_differ_only_in_scaling_may_be_given_in_any_order(tmp_path, llama, adapter, copy_of):
    other = copy_of(adapter)
    edit_json(other / "adapter_config.json", lora_alpha=3)
    merge(llama, [adapter, other], tmp_path / "merged", MergeOptions(weights=(0.5, 2.0)))
    unmerge(tmp_path / "merged", [other, adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", llama)


@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "/tmp/evil", "a/b", "..", WEIGHTS, MANIFEST, "adaptkit-x", ".hidden"),
        *("a:b", "additional_chat_templates:..:x", "additional_chat_templates:", "additional_chat_templates:a:b"),
    ],
)
def test_a_record_with_unsafe_file_names_is_refused_even_if_its_hash_is_right(tmp_path, llama, name):
    """An attacker's record may have correct hashes, but names of files that it must not write."""
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", llama, target_modules=["lm_head", "q_proj"])
    merge(llama, [folder], tmp_path / "merged", MergeOptions(untie=True))
    record = "adaptkit-undo/files.safetensors"
    files = load_arrays(tmp_path / "merged" / record)
    save_arrays(files | {name: undo.as_bytes(b"evil")}, tmp_path / "merged" / record)
    rehash(tmp_path / "merged", record)
    with pytest.raises((IntegrityError, UnsafeInputError)):
        unmerge(tmp_path / "merged", [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_deleted_side_file_is_named(merged, adapter, tmp_path, name):
    (merged / name).unlink()
    with pytest.raises((IntegrityError, UnsafeInputError), match=name):
        unmerge(merged, [adapter], tmp_path / "out")


def test_embedded_adapters_contain_no_unrelated_files(tmp_path, llama, adapter, copy_of):
    folder = copy_of(adapter)
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.bin").write_bytes(b"state")
    merge(llama, [folder], tmp_path / "merged", MergeOptions(embed_adapter=True))
    held = {p.name for p in (tmp_path / "merged" / "adaptkit-adapters").rglob("*") if p.is_file()}
    assert held == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "content",
    [b"3", b"null", b"[[1]]", b"x", b"", b"[" * 100_000],
    ids=["number", "null", "nested", "words", "nothing", "deep"],
)
def test_a_damaged_list_of_added_files_is_refused(tmp_path, llama, content):
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", llama, target_modules=["lm_head", "q_proj"])
    merge(llama, [folder], tmp_path / "merged", MergeOptions(untie=True))
    record = "adaptkit-undo/files.safetensors"
    files = load_arrays(tmp_path / "merged" / record)
    save_arrays(files | {undo.ADDED: undo.as_bytes(content)}, tmp_path / "merged" / record)
    rehash(tmp_path / "merged", record)
    with pytest.raises((IntegrityError, UnsafeInputError)):
        unmerge(tmp_path / "merged", [folder], tmp_path / "out")


@pytest.mark.parametrize("how", ["two dimensions", "float64", "bfloat16", "absent"])
def test_a_record_with_a_missing_or_malformed_tensor_is_refused_even_if_its_hash_is_right(
    merged, adapter, tmp_path, how
):
    name, records = "model.layers.0.mlp.gate_proj.weight", load_file(merged / RECORD)
    changed = {
        "two dimensions": records[name][None],
        "float64": torch.zeros(4, dtype=torch.float64),
        "bfloat16": torch.zeros(4, dtype=torch.bfloat16),
    }
    save_file({k: changed.get(how, v) if k == name else v for k, v in records.items() if how != "absent" or k != name},
              merged / RECORD)  # fmt: skip
    rehash(merged, RECORD)
    with pytest.raises(IntegrityError, match="gate_proj"):
        unmerge(merged, [adapter], tmp_path / "out")


@pytest.mark.parametrize("how", ["one more", "one less", "another type", "another shape", "no header", "empty"])
def test_a_wrong_header_in_a_record_is_refused_even_if_its_hash_is_right(merged, adapter, tmp_path, how):
    records = load_arrays(merged / RECORD)
    specs = {name: at.spec for name, at in Checkpoint(merged).tensors.items()}
    norm = "model.norm.weight"
    if how == "one more":
        specs["zzz"] = TensorSpec("zzz", "BF16", (64,))
    elif how == "one less":
        del specs[norm]
    elif how == "another type":
        specs[norm] = replace(specs[norm], dtype="F16")
    elif how == "another shape":
        specs[norm] = replace(specs[norm], shape=(32, 2))
    raw = {"no header": b"{", "empty": b""}.get(how, write_header(specs.values()))
    save_arrays(records | {undo.HEADER: undo.as_bytes(raw)}, merged / RECORD)
    rehash(merged, RECORD)
    with pytest.raises((IntegrityError, BaseMismatchError)):
        unmerge(merged, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # not even what was written before the error


@pytest.mark.parametrize("options", [[], {"begun": 3}, {"begun": [[1]]}, {"adapters": 1}, {"small_files": [2]}])
def test_a_manifest_with_malformed_merge_options_is_refused(merged, adapter, tmp_path, options):
    manifest = require_manifest(merged)
    given = manifest.operation["options"] | options if options else options
    changed = replace(manifest, operation={"name": "merge", "options": given})
    (merged / MANIFEST).write_bytes(changed.to_bytes())
    with pytest.raises(IntegrityError):
        unmerge(merged, [adapter], tmp_path / "out")
