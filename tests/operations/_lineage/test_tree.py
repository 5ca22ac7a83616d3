"""An artifact's ancestors are found by hash alone, and a replaced or changed ancestor is detected."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny
from folders import add_listed, edit_manifest, edited_tensors, flip

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, parent_of, require_manifest, tensors_root
from adaptkit.errors import IntegrityError, UsageError
from adaptkit.hub.parts import part_of
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.inspect import trace
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.stack import StackOptions, stack
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import VerifyOptions, verify


@pytest.fixture(scope="module")
def family(tmp_path_factory, llama, adapter, second_adapter):
    """A folder of artifacts of many operations, all made from ``base``, ``tuner`` and ``other-tuner``."""
    root = tmp_path_factory.mktemp("family")
    shutil.copytree(llama, root / "base")
    shutil.copytree(adapter, root / "tuner")
    shutil.copytree(second_adapter, root / "other-tuner")
    base, options = root / "base", ExtractOptions(rank=4)
    merge(base, [root / "tuner"], root / "tuned")
    merge(base, [root / "other-tuner"], root / "other-tuned")
    extract(root / "tuned", base, root / "one", options)
    extract(root / "other-tuned", base, root / "two", options)
    stack([root / "one", root / "two"], root / "both", StackOptions("dare", (0.5, 1.0), settings={"seed": 3}))
    resize(root / "both", root / "small", ResizeOptions(energy=0.9))
    merge(base, [root / "small", root / "one"], root / "merged", MergeOptions((1.0, -0.25), embed_adapter=True))
    merge(base, [root / "two"], root / "merged-nf4", MergeOptions(format="nf4"))
    unmerge(root / "merged", [root / "small", root / "one"], root / "back")
    quantize(root / "merged", root / "nf4", QuantizeOptions(block_size=128, skip=("*.o_proj",), max_shard_bytes=60_000))
    dequantize(root / "nf4", root / "plain")
    return root


@pytest.fixture
def copied(family, tmp_path):
    """A copy of the family that a test may change."""
    return shutil.copytree(family, tmp_path / "family")


def verified(path, *folders, **options):
    return verify(path, VerifyOptions(parents=folders, **options))


def states(report):
    """(depth, role, folder or state) of every ancestor."""

    def walk(parents, depth):
        for parent in parents:
            yield depth, parent.role, parent.path.rpartition("/")[2] if parent.path else parent.state
            yield from walk(parent.parents, depth + 1)

    return list(walk(report.parents, 0))


TUNED = [(0, "base", "base"), (0, "adapter", "tuner")]
ONE = [(0, "base", "base"), (0, "tuned", "tuned"), *((depth + 1, role, name) for depth, role, name in TUNED)]
TWO = [(0, "base", "base"), (0, "tuned", "other-tuned"), (1, "base", "base"), (1, "adapter", "other-tuner")]
BOTH = [
    (0, "adapter", "one"), *((depth + 1, role, name) for depth, role, name in ONE),
    (0, "adapter", "two"), *((depth + 1, role, name) for depth, role, name in TWO),
]  # fmt: skip
SMALL = [(0, "adapter", "both"), *((depth + 1, role, name) for depth, role, name in BOTH)]


def below(role, name, line):
    return [(0, role, name), *((depth + 1, r, n) for depth, r, n in line)]


MERGED = [(0, "base", "base"), *below("adapter", "small", SMALL), *below("adapter", "one", ONE)]
EXPECTED = {
    "tuned": TUNED,
    "one": ONE,
    "both": BOTH,
    "small": SMALL,
    "merged": MERGED,
    "merged-nf4": [(0, "merged", "never written"), (0, "base", "base"), *below("adapter", "two", TWO)],
    "back": below("merged", "merged", MERGED),
    "nf4": below("base", "merged", MERGED),
    "plain": below("base", "nf4", below("base", "merged", MERGED)),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_all_ancestors_are_found_and_verified(family, name):
    assert states(verified(family / name, family)) == EXPECTED[name]


@pytest.mark.parametrize("name", ["tuned", "both", "small", "merged", "merged-nf4", "back", "nf4", "plain"])
def test_recomputing_an_artifact_gives_the_same_bytes(family, name):
    done = dict(verified(family / name, family, recompute=True, threads=1).recomputed)
    assert done[str(family / name)] == "same bytes"
    assert all("extract cannot" in told for path, told in done.items() if path.endswith(("one", "two")))
    expected = {entry for _, _, entry in EXPECTED[name]} - {"base", "tuner", "other-tuner", "never written"}
    assert {path.rpartition("/")[2] for path in done} == expected | {name}


def test_fingerprints_are_compared_with_the_parents(family):
    report = verified(family / "merged", family)
    base, small, one = report.parents
    targets = len(require_manifest(family / "merged").targets)
    assert base.targets == targets > 0
    assert small.targets == len(require_manifest(family / "small").targets) > 0
    assert one.parents[0].targets == len(require_manifest(family / "one").targets) > 0


def test_location_and_order_of_the_parent_folders_do_not_matter(family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "x" / "y")
    shutil.copytree(family / "tuner", tmp_path / "z")
    for folders in ([tmp_path / "z", tmp_path / "x"], [tmp_path / "x" / "y", tmp_path / "z"]):
        assert states(verified(family / "tuned", *folders)) == [(0, "base", "y"), (0, "adapter", "z")]


def test_a_missing_parent_is_named_by_its_hash(family, copied):
    shutil.rmtree(copied / "two")
    digest = require_manifest(family / "two").sha256[:16]
    with pytest.raises(IntegrityError, match=rf"1 of 5 ancestors .*adapter {digest} not found") as caught:
        verified(copied / "both", copied)
    assert caught.value.exit_code == 3
    assert "--parents" in caught.value.hint
    assert "tuned" in caught.value.message  # ancestors that were found are listed too


def test_a_changed_byte_in_any_ancestor_is_detected(family, copied):
    """Ancestors without a manifest are known by their tensors only; of others, every file counts."""
    ancestors = {name for _, _, name in MERGED}
    for folder in copied.iterdir():
        if folder.name not in {"merged", *ancestors}:
            shutil.rmtree(folder)  # so that no other folder has the same tensors
    for name in sorted(ancestors):
        has_manifest = (copied / name / MANIFEST_NAME).is_file()
        found = (copied / name).rglob("*" if has_manifest else "*.safetensors")
        files = sorted(path for path in found if path.is_file())
        assert files
        for number, path in enumerate(files):
            before = path.read_bytes()
            flip(path, len(before) // 2 if number % 2 else -1)
            with pytest.raises(IntegrityError, match=r"1 of \d ancestors cannot be verified"):
                verified(copied / "merged", copied)
            path.write_bytes(before)
    verified(copied / "merged", copied)


def test_a_folder_that_holds_an_adapter_and_a_checkpoint_is_found_as_either(llama, adapter, tmp_path):
    """For example a merged model that was saved into the folder of its adapter."""
    both = tmp_path / "both"
    for folder in (llama, adapter):
        shutil.copytree(folder, both, dirs_exist_ok=True)
    merge(both, [both], tmp_path / "merged")
    (base, used) = verified(tmp_path / "merged", both, recompute=True).parents
    assert (base.role, base.path, used.role, used.path) == ("base", str(both), "adapter", str(both))


def test_a_checkpoint_with_the_parents_shapes_but_other_weights_is_not_accepted(copied):
    other = tiny.write_llama(copied / "other-base")
    with edited_tensors(other / "model.safetensors") as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * 1.5
    shutil.rmtree(copied / "base")
    shutil.rmtree(copied / "back")  # has the base's tensors
    with pytest.raises(IntegrityError, match=r"base [0-9a-f]{16} not found"):
        verified(copied / "tuned", copied)


def test_an_artifact_with_the_same_tensors_but_a_different_manifest_is_the_parent(copied):
    """Publishing adds a model card, and so changes the manifest."""
    add_listed(copied / "one", "README.md", "card")
    report = verified(copied / "both", copied, recompute=True)
    assert [parent.found_by for parent in report.parents] == ["tensors", "manifest"]
    assert "not the one that was used" in dict(report.recomputed)[str(copied / "both")]


@pytest.mark.parametrize("name", ["merged", "nf4", "one"])
def test_wrong_fingerprints_or_shapes_in_a_manifest_are_refused(copied, name):
    manifest = require_manifest(copied / name)
    first, *rest = manifest.targets
    for wrong in (replace(first, base_xxh3_128="00" * 16), replace(first, shape=(*first.shape, 1))):
        edit_manifest(copied / name, targets=(wrong, *rest))
        with pytest.raises(IntegrityError, match=f"{first.module} is not the tensor that was used"):
            verified(copied / name, copied)


@pytest.mark.parametrize("name", ["merged", "nf4"])
def test_a_partial_copy_is_verified_against_the_whole_artifact(copied, name):
    whole = require_manifest(copied / name)
    some = [file for file in whole.files if not file.path.startswith("tokenizer")]
    part = copied / "part"
    for file in some:
        (part / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copied / name / file.path, part / file.path)
    (part / MANIFEST_NAME).write_bytes(part_of(whole, some, ["weights", "config"]).to_bytes())
    (found,) = verified(part, copied).parents
    assert (found.role, found.path, found.targets) == ("whole", str(copied / name), len(whole.targets))
    first, *rest = whole.targets
    targets = (replace(first, base_xxh3_128="00" * 16), *rest)
    changed = replace(part_of(whole, some, ["weights", "config"]), targets=targets)
    (part / MANIFEST_NAME).write_bytes(changed.to_bytes())
    with pytest.raises(IntegrityError, match=f"{first.module} is not the tensor that was used"):
        verified(part, copied)


def trained_on(folder, quantization, extra=(), parents=()):
    """Rewrite an adapter's manifest as if it was trained on its base quantized in the given way."""
    manifest = require_manifest(folder)
    targets = tuple(replace(target, quantized_root=quantization * 64) for target in manifest.targets)
    for name in extra:
        shutil.copy(folder / "adapter_model.safetensors", folder / name)
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST_NAME]
    files = tuple(FileRecord(name, (folder / name).stat().st_size, file_sha256(folder / name)) for name in names)
    manifest = replace(manifest, targets=targets, files=files, parents=parents)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return manifest


def test_training_may_continue_an_adapter_trained_on_a_different_quantization(certified, copied):
    """Both have the same 16-bit base; only a compensation file is specific to one quantization."""
    first, second = (certified(copied / "tuner", copied / "base", f"family/{name}") for name in ("first", "second"))
    begun = trained_on(first, "1")
    trained_on(second, "2", parents=(parent_of("init", begun, ()),))
    (found,) = verified(second, copied).parents
    assert (found.state, found.targets) == ("verified", len(begun.targets))
    begun = trained_on(first, "1", extra=[COMPENSATION_NAME])
    trained_on(second, "2", parents=(parent_of("init", begun, ()),))
    with pytest.raises(IntegrityError, match="is not the tensor that was used"):
        verified(second, copied)


def test_a_stack_of_adapters_trained_on_two_quantizations_of_a_base_is_verified(certified, copied):
    parents = [certified(copied / name, copied / "base", f"family/{name}-on") for name in ("tuner", "other-tuner")]
    for folder, quantization in zip(parents, "12", strict=True):
        trained_on(folder, quantization)
    stack(parents, copied / "stacked")
    assert {parent.state for parent in verified(copied / "stacked", copied).parents} == {"verified"}


def test_a_quantized_artifact_that_does_not_match_its_quantized_root_is_refused(copied):
    manifest = require_manifest(copied / "nf4")
    first, *rest = manifest.targets
    edit_manifest(copied / "nf4", targets=(replace(first, quantized_root="00" * 32), *rest))
    with pytest.raises(IntegrityError, match=f"{first.module}.weight does not match its quantized_root"):
        verify(copied / "nf4")


def test_recomputing_detects_an_artifact_that_its_operation_does_not_produce(copied):
    """Its hashes and parents are correct; only repeating the operation shows that its options are not."""
    merge(copied / "base", [copied / "tuner"], copied / "twice", MergeOptions(weights=(2.0,)))
    manifest = require_manifest(copied / "twice")
    options = manifest.operation["options"] | {"weights": [1.0]}
    parents = tuple(replace(p, weight=1.0) if p.role == "adapter" else p for p in manifest.parents)
    edit_manifest(copied / "twice", operation={"name": "merge", "options": options}, parents=parents)
    verified(copied / "twice", copied)
    with pytest.raises(IntegrityError, match=r"again on the same parents gives a different result: .* differs"):
        verified(copied / "twice", copied, recompute=True)


def test_invalid_options_in_a_manifest_are_an_integrity_error(copied):
    manifest = require_manifest(copied / "tuned")
    recorded = manifest.operation["options"]
    different, impossible = "gives a different result", "cannot be run again with the options of its manifest"
    cases = (({}, different), ({"weights": [1.0]}, different), (recorded | {"format": "gguf"}, impossible))
    for options, problem in (*cases, (recorded | {"shape": "round"}, impossible)):
        edit_manifest(copied / "tuned", operation={"name": "merge", "options": options})
        with pytest.raises(IntegrityError, match=problem):
            verified(copied / "tuned", copied, recompute=True)


def test_an_artifact_is_not_its_own_ancestor(copied):
    """``back`` has the tensors of ``base``: if that is missing, ``back`` replaces it, but not in its own lineage."""
    assert require_manifest(copied / "back").tensors_root == require_manifest(copied / "tuned").parents[0].tensors_root
    shutil.rmtree(copied / "base")
    with pytest.raises(IntegrityError, match=r"base [0-9a-f]{16} not found"):
        verified(copied / "back", copied)
    assert states(verified(copied / "tuned", copied)) == [(0, "base", "back"), (0, "adapter", "tuner")]


def test_tracing_finds_ancestors_without_verifying_their_weights(family, copied):
    flip(copied / "tuned" / "model.safetensors")
    assert {found.state for found in trace(copied / "one", [copied])} == {"found"}
    assert {found.state for found in trace(copied / "one", [])} == {"not found"}
    with pytest.raises(IntegrityError, match=MANIFEST_NAME):
        trace(copied / "base", [])


def test_parents_without_artifacts_and_recompute_without_parents_are_errors(family, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UsageError):
            verified(family / "tuned", folder)
    with pytest.raises(UsageError, match="needs the parents"):
        VerifyOptions(recompute=True)


def test_a_damaged_manifest_is_reported_only_if_its_artifact_is_needed(copied):
    (copied / "two" / MANIFEST_NAME).write_text("{}")
    verified(copied / "tuned", copied)
    with pytest.raises(IntegrityError, match=r"two: adaptkit-manifest\.json: malformed|two: .*schema None"):
        verified(copied / "both", copied)


def test_verify_prints_the_tree_and_fails_if_an_ancestor_is_missing(run_cli, family, copied):
    done = run_cli("verify", family / "merged", "--parents", family, "--recompute")
    assert done.code == 0, done.stderr
    assert f"{family / 'small'}, verified, " in done.stdout
    assert f"recomputed       {family / 'merged'}: same bytes\n" in done.stdout
    report = json.loads(run_cli("verify", family / "merged", "--parents", family, "--json").stdout)
    assert [parent["role"] for parent in report["parents"]] == ["base", "adapter", "adapter"]
    shutil.rmtree(copied / "base")
    done = run_cli("verify", copied / "merged", "--parents", copied / "small", "--parents", copied / "one")
    error, hint = done.refusal(3)
    assert "not found" in error
    assert hint.startswith("hint: give the folders")


def test_inspect_prints_the_lineage_as_text_json_and_mermaid(run_cli, family):
    root = tensors_root(require_manifest(family / "tuned").tensors)
    bare = run_cli("inspect", family / "both", "--lineage")
    assert bare.code == 0, bare.stderr
    assert bare.stdout.count("not found") == 2
    full = run_cli("inspect", family / "both", "--lineage", "--parents", family).stdout
    assert "│   └── tuned: merged manifest " in full
    assert "not found" not in full
    document = json.loads(run_cli("inspect", family / "both", "--lineage", "--parents", family, "--json").stdout)
    assert document["lineage"][0]["parents"][1]["tensors_root"] == root
    chart = run_cli("inspect", family / "both", "--mermaid", "--parents", family).stdout.splitlines()
    assert chart[0] == "flowchart TD"
    nodes = [re.fullmatch(r' {4}(a\d+)\["(.*)"\]', line) for line in chart[1:] if "-->" not in line]
    assert [node[1] for node in nodes] == [f"a{number}" for number in range(8)]
    names = {node[1]: re.split("[/ ]", node[2].split("<br>")[-1])[-1] for node in nodes[1:]} | {"a0": "both"}
    assert sorted(names.values()) == sorted({"both"} | {name for _, _, name in BOTH})  # each once
    edges = [re.fullmatch(r' {4}(a\d+) -- "(\w+).*" --> (a\d+)', line) for line in chart if "-->" in line]
    assert sorted((names[edge[1]], edge[2], names[edge[3]]) for edge in edges) == [
        ("base", "base", "one"),
        ("base", "base", "other-tuned"),
        ("base", "base", "tuned"),
        ("base", "base", "two"),
        ("one", "adapter", "both"),
        ("other-tuned", "tuned", "two"),
        ("other-tuner", "adapter", "other-tuned"),
        ("tuned", "tuned", "one"),
        ("tuner", "adapter", "tuned"),
        ("two", "adapter", "both"),
    ]
    assert run_cli("inspect", family / "both", "--mermaid", "--json").code == 2
