"""Unmerging restores the base's files byte by byte, or names the part that does not belong to the merge."""

import filecmp
import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft_adapters
import pytest
import tiny
from folders import add_listed, edit_json, edit_manifest, flip, tree
from peft_adapters import quiet
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from undo_frames import frames

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.header import write_header
from adaptkit.checkpoint.manifest import FileRecord, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, IntegrityError, OutputExistsError, UnsafeInputError, UsageError
from adaptkit.hub.parts import part_of, select
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify

WEIGHTS, RECORD = "model.safetensors", "adaptkit-undo/shard-00001-of-00001.safetensors"
MANIFEST = "adaptkit-manifest.json"
Q = "model.layers.0.self_attn.q_proj"


def assert_same_files(found, base):
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {MANIFEST}
    match, mismatch, errors = filecmp.cmpfiles(base, found, sorted(names), shallow=False)
    assert (mismatch, errors) == ([], [])
    assert len(match) == len(names)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        pytest.param("bfloat16", (1.0,), marks=pytest.mark.quick),
        *(("float16", (0.1,)), ("float32", (30.0,)), ("bfloat16", (1.0, -0.7)), ("float16", (0.0, 1.0))),
        *(("float32", (0.3, 0.7)), ("bfloat16", (30.0,)), ("float32", (1.0,))),
    ],
)
def test_files_are_identical_to_those_of_the_base(tmp_path, adapter, second_adapter, dtype, weights):
    base = tiny.write_llama(tmp_path / "base", dtype=dtype, shards=1 + len(weights))
    adapters = [adapter, second_adapter][: len(weights)]
    merge(base, adapters, tmp_path / "merged", MergeOptions(weights=weights))
    for threads in (1, 3):
        report = unmerge(tmp_path / "merged", adapters[::-1], tmp_path / f"out-{threads}", threads=threads)
        assert_same_files(tmp_path / f"out-{threads}", base)
        assert report.identical
        assert report.restored == 14
    verify(tmp_path / "out-3")
    manifest, merged = require_manifest(tmp_path / "out-3"), require_manifest(tmp_path / "merged")
    assert [(p.role, p.manifest_sha256) for p in manifest.parents] == [("merged", merged.sha256)]
    assert manifest.tensors_root == merged.parents[0].tensors_root == report.tensors_root


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


def saved_again(folder):
    """Change a configuration as peft does when it saves it again: sets in a different order, keys without effect."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]
    changes = {"lora_dropout": 0.5, "exclude_modules": ["x"], "arrow_config": None, "ensure_weight_tying": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_adapters_of_the_same_tensors_may_be_given_in_any_order(tmp_path, llama, adapter, copy_of):
    """One of them was merged twice, another differs only in its scaling."""
    other = copy_of(adapter)
    edit_json(other / "adapter_config.json", lora_alpha=3)
    merge(llama, [adapter, adapter, other], tmp_path / "merged", MergeOptions(weights=(0.3, 0.9, 2.0)))
    unmerge(tmp_path / "merged", [other, adapter, adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", llama)


def test_an_adapter_that_was_saved_again_is_accepted(second_adapter, llama, copy_of, tmp_path):
    merge(llama, [second_adapter], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", [saved_again(copy_of(second_adapter))], tmp_path / "out")
    assert report.identical
    assert_same_files(tmp_path / "out", llama)


def test_a_missing_folder_and_less_than_one_thread_are_refused(tmp_path, llama, adapter):
    with pytest.raises(UsageError, match="does not exist"):
        unmerge(tmp_path / "nowhere", [adapter], tmp_path / "out")
    for threads in (0, -1):
        with pytest.raises(UsageError, match=f"threads: must be at least 1, found {threads}"):
            unmerge(llama, [adapter], tmp_path / "out", threads=threads)


@pytest.fixture(scope="module")
def made_once(made, adapter):
    """A merge with three records of undo: the head is untied, so that files change, too; and its adapter."""
    with quiet():
        base = tiny.write_llama(made / "unmerge-base")
        both = tiny.write_peft_adapter(
            made / "unmerge-adapter", base, target_modules=["lm_head", "q_proj", "gate_proj"], modules_to_save=["norm"]
        )
    merge(base, [both], made / "unmerge-merged", MergeOptions(untie=True))
    return made / "unmerge-merged", both


@pytest.fixture
def merged(tmp_path, llama, adapter):
    merge(llama, [adapter], tmp_path / "merged")
    return tmp_path / "merged"


def refuse(folder, adapters, error=None, match=None):
    """Unmerging must fail and leave nothing, not even what was written before the error."""
    out = folder.with_name("refused")
    with pytest.raises(error or (IntegrityError, UnsafeInputError, BaseMismatchError), match=match) as caught:
        unmerge(folder, adapters, out)
    assert not list(out.parent.glob(f"{out.name}*"))
    return caught.value


GATE, NORM, FILES = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight", "adaptkit-undo/files.safetensors"
NOT_THIS = r"gate_proj\.weight: the undo record or the adapter does not belong to this merge"


def with_residual(records):
    """Change one residual; the length is right."""
    ((rows, stream),) = frames(records[GATE])
    residual = undo.unpack(stream, 64 * 128)
    residual[len(residual) // 2] += 1
    return {GATE: undo.as_bytes(undo.pack_frame(rows, residual))}


def with_rows(rows):
    def change(records):
        ((_, stream),) = frames(records[GATE])
        return {GATE: undo.as_bytes(struct.pack("<II", rows, stream.size) + stream.tobytes())}

    return change


def with_header(change):
    def changed(records):
        names = read_specs(records[undo.HEADER].tobytes())
        change(names)
        return {undo.HEADER: undo.as_bytes(write_header(names.values()))}

    return changed


def read_specs(raw):
    """Map the names in a header to their tensors."""
    entries = json.loads(raw[8:])
    return {n: TensorSpec(n, e["dtype"], tuple(e["shape"])) for n, e in entries.items() if n != "__metadata__"}


TAMPERED = {
    "a wrong residual": (RECORD, with_residual, NOT_THIS),
    **{f"{rows} rows": (RECORD, with_rows(rows), "undo record") for rows in (0, 1, 127, 129, 2**32 - 1)},
    **{
        f"version {version!r}": (RECORD, lambda r, v=version: {undo.VERSION_KEY: undo.as_bytes(v)}, "has version")
        for version in (b"\3", b"", b"\2\0", b"\0")
    },
    "two dimensions": (RECORD, lambda r: {GATE: r[GATE][None]}, "gate_proj"),
    "float64": (RECORD, lambda r: {GATE: np.zeros(4)}, "gate_proj"),
    "no residual": (RECORD, lambda r: {GATE: None}, "gate_proj"),
    "one tensor more": (RECORD, with_header(lambda s: s.update(zzz=TensorSpec("zzz", "BF16", (64,)))), "zzz"),
    "one tensor less": (RECORD, with_header(lambda s: s.pop(NORM)), ""),
    "another type": (RECORD, with_header(lambda s: s.update({NORM: replace(s[NORM], dtype="F16")})), NORM),
    "another shape": (RECORD, with_header(lambda s: s.update({GATE: replace(s[GATE], shape=(32, 2))})), ""),
    "no header": (RECORD, lambda r: {undo.HEADER: undo.as_bytes(b"{")}, ""),
    "an empty header": (RECORD, lambda r: {undo.HEADER: undo.as_bytes(b"")}, ""),
    **{
        f"a file named {name}": (FILES, lambda r, name=name: {name: undo.as_bytes(b"evil")}, "")
        for name in (
            *("../evil", "/tmp/evil", "a/b", "..", WEIGHTS, MANIFEST, "adaptkit-x", ".hidden"),
            *("a:b", "additional_chat_templates:..:x", "additional_chat_templates:", "additional_chat_templates:a:b"),
        )
    },
    **{
        f"a list of files that is {words}": (FILES, lambda r, c=content: {undo.ADDED: undo.as_bytes(c)}, "")
        for words, content in (("a number", b"3"), ("nested", b"[[1]]"), ("words", b"x"), ("deep", b"[" * 100_000))
    },
}
"""A record, a change of its tensors (None removes one), and words of the error."""


@pytest.mark.parametrize("name", TAMPERED)
def test_a_malformed_record_is_refused_even_if_its_hash_is_right(made_once, copy_of, name):
    """As an attacker could make it: its size and hash are those in the manifest."""
    folder, (record, change, error) = copy_of(made_once[0]), TAMPERED[name]
    records = load_arrays(folder / record)
    changed = {key: array for key, array in (records | change(records)).items() if array is not None}
    save_arrays(changed, folder / record)
    rehash(folder, record)
    caught = refuse(folder, [made_once[1]], match=error or None)
    assert "version of adaptkit" in caught.hint or error != "has version"


@pytest.mark.parametrize("change", ["changed", "deleted"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_changed_or_deleted_side_file_is_named(merged, adapter, name, change):
    if change == "deleted":
        (merged / name).unlink()
    else:
        (merged / name).write_text((merged / name).read_text() + "\n")
    refuse(merged, [adapter], (IntegrityError, UnsafeInputError), name)


def test_a_wrong_number_of_adapters_is_refused(merged, adapter, tmp_path):
    with pytest.raises(UsageError, match="expected 1 merged adapter, found 2"):
        unmerge(merged, [adapter, adapter], tmp_path / "out")
    with pytest.raises(UsageError, match="none is given and none is stored"):
        unmerge(merged, [], tmp_path / "out")


def test_a_merge_without_its_undo_record_is_refused(llama, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "no undo", MergeOptions(undo=False))
    caught = refuse(tmp_path / "no undo", [adapter], IntegrityError, "no undo record.*--no-undo")
    assert caught.hint == "merge again from the base"
    for weight in (1.0, 1.5):
        merge(llama, [adapter], tmp_path / str(weight), MergeOptions(weights=(weight,)))
    shutil.copy(tmp_path / "1.5" / RECORD, tmp_path / "1.0" / RECORD)
    refuse(tmp_path / "1.0", [adapter], IntegrityError, "shard-00001")


def rehash(folder, name):
    """Record a changed file's size and hash in the manifest, and change nothing else there."""
    manifest = require_manifest(folder)
    content = (folder / name).read_bytes()
    changed = FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
    files = tuple(changed if record.path == name else record for record in manifest.files)
    (folder / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


def test_a_manifest_with_an_edited_weight_or_malformed_options_is_refused(made_once, copy_of):
    folder, adapter = copy_of(made_once[0]), made_once[1]
    manifest = require_manifest(folder)
    weighted = [replace(p, weight=1.5) if p.role == "adapter" else p for p in manifest.parents]
    edit_manifest(folder, parents=tuple(weighted))
    refuse(folder, [adapter], IntegrityError, r"model\.layers\.\S+\.weight")
    given = manifest.operation["options"]
    wrong = ({"begun": 3}, {"begun": [[1]]}, {"adapters": 1}, {"small_files": [2]})
    for options in ([], *(given | change for change in wrong)):
        changed = replace(manifest, operation={"name": "merge", "options": options})
        (folder / MANIFEST).write_bytes(changed.to_bytes())
        refuse(folder, [adapter], IntegrityError)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("linear", "model.layers.0.self_attn.q_proj.weight"),
        ("linear", NORM),  # which no adapter changes
        ("resized", "lm_head.weight"),
        ("tokens_tied", "model.embed_tokens.weight"),
        ("dora", "model.layers.1.mlp.down_proj.weight"),
        ("biases_all", "lm_head.bias"),
        ("experts_mixtral", "model.layers.0.block_sparse_moe.experts.3.w3.weight"),
    ],
)
def test_a_merged_tensor_with_one_changed_bit_is_named(merged_case, name, tensor):
    folder, adapter = merged_case(name)
    located = Checkpoint(folder).tensors[tensor]
    flip(folder / located.file, located.position + located.spec.nbytes // 2, 16)
    refuse(folder, [adapter], IntegrityError, tensor.replace(".", r"\."))


@pytest.fixture
def merged_case(made, tmp_path):
    """Merge a case of ``peft_adapters``; return the merged model and the adapter."""

    def make(name):
        case = peft_adapters.make(made, name)
        merge(case.base, [case.adapter], tmp_path / "merged", MergeOptions(untie=case.case.untied))
        return tmp_path / "merged", case.adapter

    return make


@pytest.mark.parametrize("name", ["resized", "experts_mixtral"])
def test_changes_to_any_part_of_the_undo_record_are_detected(merged_case, name):
    folder, adapter = merged_case(name)
    records = sorted(folder.rglob("*undo*/*.safetensors"))
    assert records
    for path in records:
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        for where in (9, size, (size + len(content)) // 2, len(content) - 1):
            flip(path, where, 16)
            refuse(folder, [adapter], (IntegrityError, UnsafeInputError), path.name)
            path.write_bytes(content)
        path.unlink()
        refuse(folder, [adapter], IntegrityError, "undo")
        path.write_bytes(content)


OTHERS = [
    ("linear", f"{Q}.lora_B.weight"),
    ("saved_both", "lm_head.weight"),
    ("resized", "model.embed_tokens.weight"),
    ("tokens", "model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ("dora", f"{Q}.lora_magnitude_vector"),
    ("experts_mixtral", "model.layers.0.mlp.experts.base_layer.lora_B.weight"),
    ("linear", {"lora_alpha": 9}),
    ("linear", {"use_rslora": True}),
    ("tokens", {"trainable_token_indices": [7, 2, 41]}),
    ("experts_patterns", {"alpha_pattern": {}}),
]


@pytest.mark.parametrize(("name", "change"), OTHERS, ids=lambda value: str(value)[-40:])
def test_an_adapter_with_another_tensor_or_configuration_is_refused(merged_case, copy_of, name, change):
    folder, adapter = merged_case(name)
    other = copy_of(adapter)
    if isinstance(change, dict):
        peft_adapters.change_config(other, **change)
        refuse(folder, [other], BaseMismatchError, r"has the tensors of .* a different adapter_config\.json")
    else:
        peft_adapters.change_tensors(other, lambda t: t[f"base_model.model.{change}"].mul_(1.5))
        refuse(folder, [other], BaseMismatchError, "tensors_root")


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
        assert before.pop(MANIFEST) != after.pop(MANIFEST)
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


def test_the_output_is_checked_before_any_adapter_is_read(merged, tmp_path, copy_of):
    """The missing adapter would be the next error."""
    with pytest.raises(OutputExistsError):
        unmerge(merged, [tmp_path / "nowhere"], copy_of(merged, "out"))
    with pytest.raises(UsageError, match="would change its own input"):
        unmerge(merged, [tmp_path / "nowhere"], merged / "inside")


def test_embedded_adapters_contain_no_unrelated_files(tmp_path, llama, adapter, copy_of):
    folder = copy_of(adapter)
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.bin").write_bytes(b"state")
    merge(llama, [folder], tmp_path / "merged", MergeOptions(embed_adapter=True))
    held = {p.name for p in (tmp_path / "merged" / "adaptkit-adapters").rglob("*") if p.is_file()}
    assert held == {"adapter_config.json", "adapter_model.safetensors"}
