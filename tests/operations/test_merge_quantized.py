"""Merging to 4 bits changes the 16-bit weights and then quantizes; quantized weights are never merged into."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from folders import edit_manifest, flip, tree
from peft_adapters import quiet
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.layout import JOURNAL_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, parent_of, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, IntegrityError, UsageError
from adaptkit.hub.parts import part_of, select
from adaptkit.operations import _shards
from adaptkit.operations._merge import quantized as _merge_quantized
from adaptkit.operations._merge.folding import RUN_BYTES
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import VerifyOptions, verify
from adaptkit.training.network.packed import read_quantized

NF4 = MergeOptions(format="nf4")


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("base", "features", "scale"),
    [
        ("llama_sharded", {}, 1.0),
        ("llama_sharded", {}, 0.3),
        ("llama", {"use_dora": True}, 1.0),
        ("llama", {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, 1.0),
        ("gpt2", {}, 1.0),  # whose weights are stored transposed
    ],
)
def test_merging_to_nf4_equals_merging_then_quantizing(tmp_path, request, monkeypatch, base, features, scale):
    """Also with pieces that begin and end within a row, and with any number of threads."""
    base, weighted = request.getfixturevalue(base), MergeOptions(weights=(scale,))
    adapter = tiny.write_peft_adapter(tmp_path / "a", base, **features)
    merge(base, [adapter], tmp_path / "merged", weighted)
    quantize(tmp_path / "merged", tmp_path / "two steps")
    reports = []
    for threads in (1, 3):
        options = replace(weighted, format="nf4", threads=threads)
        reports.append(merge(base, [adapter], tmp_path / f"one step {threads}", options).changes)
    assert reports[0] == reports[1]
    one, two = tmp_path / "one step 1", tmp_path / "two steps"
    assert weights(one) == weights(tmp_path / "one step 3") == weights(two)
    verify(one)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    monkeypatch.setattr(_shards, "PIECE_BYTES", 400)  # 192 weights, one and a half rows of llama's down_proj
    merge(base, [adapter], tmp_path / "pieces", replace(weighted, format="nf4"))
    assert weights(tmp_path / "pieces") == weights(two)


def test_the_manifest_names_the_merged_model_its_base_and_adapters(tmp_path, llama, adapter, certified):
    folder = certified(adapter, llama)
    merge(llama, [folder], tmp_path / "merged")
    merge(llama, [folder], tmp_path / "out", NF4)
    manifest, merged = require_manifest(tmp_path / "out"), require_manifest(tmp_path / "merged")
    assert manifest.kind == "quantized"
    assert manifest.operation["name"] == "merge"
    assert manifest.operation["options"]["quantize"]["format"] == "nf4"
    assert [(p.role, p.tensors_root) for p in manifest.parents] == [
        ("merged", merged.tensors_root),
        *((p.role, p.tensors_root) for p in merged.parents),
    ]
    with pytest.raises(IntegrityError, match="not a merged model: its manifest says quantized") as raised:
        unmerge(tmp_path / "out", [folder], tmp_path / "back")
    assert raised.value.hint == "a merge that quantizes its result cannot be undone"


def test_the_16_bit_parent_of_a_quantized_base_is_found_in_the_same_folder(
    tmp_path, llama, adapter, copy_of, certified
):
    base = copy_of(llama, "original")
    copy_of(tiny.write_llama(tmp_path / "elsewhere" / "another", seed=5), "another")
    quantize(base, tmp_path / "a quantized base")
    folder = certified(adapter, base)
    report = merge(tmp_path / "a quantized base", [folder], tmp_path / "out")
    assert report.base == str(base)
    assert report.base_verified
    assert any("is quantized; merged into " in told for told in report.notes)
    merge(base, [folder], tmp_path / "directly")
    assert weights(tmp_path / "out") == weights(tmp_path / "directly")


@pytest.mark.parametrize("form", ["keep", "nf4"])
def test_fingerprints_of_a_quantized_base_alone_do_not_verify_it_for_an_adapter(
    form, tmp_path, llama, adapter, second_adapter, certified
):
    """The adapter has a different base, no manifest, or a manifest without fingerprints."""
    base, allowed = tmp_path / "base", MergeOptions(format=form, allow_base_mismatch=True)
    merge(llama, [second_adapter], base)
    quantize(base, tmp_path / "quantized")
    silent, other = certified(adapter, base, "silent"), certified(adapter, llama)
    targets = require_manifest(silent).targets
    edit_manifest(silent, targets=tuple(replace(target, base_xxh3_128=None) for target in targets))
    for name, folder, options in [
        ("other", other, allowed),
        ("plain", adapter, MergeOptions(format=form)),
        ("silent", silent, MergeOptions(format=form)),
    ]:
        assert not merge(tmp_path / "quantized", [folder], tmp_path / f"onto {name}", options).base_verified
    assert not merge(tmp_path / "quantized", [adapter, silent], tmp_path / "dry", dry_run=True).base_verified
    assert merge(tmp_path / "quantized", [certified(adapter, base)], tmp_path / "out", dry_run=True).base_verified


@pytest.mark.parametrize(("changed", "name"), [("model.embed_tokens.weight", "alike"), ("model.norm.weight", "zalike")])
def test_all_tensors_are_compared_to_choose_among_possible_parents(changed, name, tmp_path, llama, adapter, copy_of):
    """The wrong one differs in a tensor that is not quantized; its name sorts before or after the right one's."""
    base, alike = copy_of(llama, "original"), copy_of(llama, name)
    located = Checkpoint(alike).tensors[changed]
    flip(alike / located.file, located.position + 4)
    quantize(base, tmp_path / "quantized")
    report = merge(tmp_path / "quantized", [adapter], tmp_path / "out")
    assert report.base == str(base)
    merge(base, [adapter], tmp_path / "directly")
    assert weights(tmp_path / "out") == weights(tmp_path / "directly")


@pytest.mark.parametrize("changed", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_the_parent_of_a_partial_pull_is_found_by_all_known_fingerprints(changed, tmp_path, llama, adapter, copy_of):
    """It does not record its parent's tensors_root, and the smallest weight of both candidates is the same."""
    base, alike = copy_of(llama, "original"), copy_of(llama, "alike")
    located = Checkpoint(alike).tensors[changed]
    flip(alike / located.file, located.position + 4)
    quantize(base, tmp_path / "quantized")
    manifest = require_manifest(tmp_path / "quantized")
    part = part_of(manifest, select(manifest, ["weights", "config"]), ["weights", "config"])
    assert [parent.role for parent in part.parents] == ["whole"]
    (tmp_path / "quantized" / MANIFEST_NAME).write_bytes(part.to_bytes())
    assert merge(tmp_path / "quantized", [adapter], tmp_path / "out").base == str(base)
    shutil.rmtree(base)
    with pytest.raises((BaseMismatchError, CheckpointError)):  # the remaining candidate is not the parent
        merge(tmp_path / "quantized", [adapter], tmp_path / "again")
    shutil.rmtree(alike)
    with pytest.raises(CheckpointError, match="was not found beside it") as caught:
        merge(tmp_path / "quantized", [adapter], tmp_path / "again")
    assert "None" not in caught.value.hint


def test_the_parent_of_a_model_merged_and_quantized_at_once_is_the_merged_model(tmp_path, llama, adapter, copy_of):
    """The base of that merge is not, though most weights are the same, including the smallest."""
    base = copy_of(llama, "a base")
    first = tiny.write_peft_adapter(tmp_path / "first", llama, seed=5, target_modules=["q_proj", "v_proj"])
    merge(base, [first], tmp_path / "merged")
    merge(base, [first], tmp_path / "quantized", NF4)
    assert merge(tmp_path / "quantized", [adapter], tmp_path / "out").base == str(tmp_path / "merged")
    root = require_manifest(tmp_path / "merged").tensors_root
    shutil.rmtree(tmp_path / "merged")
    for allow in (False, True):  # allowing mismatches of adapters does not replace the missing merged model
        with pytest.raises(BaseMismatchError, match=r": .* is not the tensor that .* was quantized from") as found:
            merge(tmp_path / "quantized", [adapter], tmp_path / "again", MergeOptions(allow_base_mismatch=allow))
        assert root in found.value.hint
        assert "--allow" not in found.value.hint
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="was not found beside it") as caught:
        merge(tmp_path / "quantized", [adapter], tmp_path / "again")
    assert root in caught.value.hint


def test_candidates_that_are_malformed_or_cannot_be_read_are_skipped(tmp_path, llama, adapter, copy_of):
    """E.g. a different user's private folder. Root can read that, but nobody can follow a link to so long a name."""
    base, broken = copy_of(llama, "original"), copy_of(llama, "broken")
    (broken / MANIFEST_NAME).write_text("{}")
    quantize(base, tmp_path / "quantized")
    (tmp_path / "a link").symlink_to("x" * 300)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").symlink_to("x" * 300)
    assert merge(tmp_path / "quantized", [adapter], tmp_path / "out").base == str(base)
    shutil.rmtree(broken)
    report = verify(tmp_path / "quantized", VerifyOptions(parents=(tmp_path,)))
    assert report.parents[0].path == str(base)


def test_a_candidate_with_one_changed_weight_is_refused(tmp_path, llama, adapter, copy_of):
    """The search compares only some weights, but the merge compares all."""
    base = copy_of(llama, "original")
    quantize(base, tmp_path / "quantized")
    located = Checkpoint(base).tensors["model.layers.1.mlp.down_proj.weight"]
    flip(base / located.file, located.position + 4)
    with pytest.raises(BaseMismatchError, match=r": .*down_proj\.weight is not the tensor that .* was quantized from"):
        merge(tmp_path / "quantized", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_trained_on_a_dequantized_base_is_merged_into_it(tmp_path, llama, llama_nf4, adapter, certified):
    dequantize(llama_nf4, tmp_path / "back")
    of_back, of_llama = certified(adapter, tmp_path / "back"), certified(adapter, llama)
    assert merge(tmp_path / "back", [of_back], tmp_path / "out").base_verified
    with pytest.raises(BaseMismatchError, match=r"is not the tensor that .*adapter-of-llama was trained on") as caught:
        merge(tmp_path / "back", [of_llama], tmp_path / "other", dry_run=True)
    assert "into the original 16-bit checkpoint" in caught.value.hint
    with pytest.raises(BaseMismatchError, match="was quantized and dequantized"):  # the second has no manifest
        merge(tmp_path / "back", [of_back, adapter], tmp_path / "other", dry_run=True)
    parent = parent_of("base", require_manifest(tmp_path / "back"), ())
    edit_manifest(of_back, targets=(), parents=(parent,))
    assert merge(tmp_path / "back", [of_back], tmp_path / "no targets").base_verified


def test_tensors_in_16_and_in_4_bits_are_reported_together(tmp_path):
    base = tiny.write_llama(tmp_path / "base", tied=False)
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", base, target_modules=["lm_head", "q_proj"])
    report = merge(base, [folder], tmp_path / "out", NF4)
    assert report.merged == len(report.changes) == 3
    kept = {change.name: change.effect for change in report.changes}
    assert kept.pop("lm_head.weight") == pytest.approx(1, abs=0.02)
    assert 0.8 < min(kept.values()) < max(kept.values()) < 0.98
    squares = {change.name: change.delta_norm**2 for change in report.changes}
    overlap = sum(change.effect * squares[change.name] for change in report.changes)
    assert report.effect == pytest.approx(overlap / sum(squares.values()))


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        (None, (RUN_BYTES // 128, 64)),  # in two runs of rows
        (None, (RUN_BYTES // 128, 66)),  # in runs that would not begin with a block
        ("gpt2", (RUN_BYTES // 128, 64)),  # stores its weights transposed
        ("gpt2", (33, 65)),
    ],
)
def test_the_share_left_is_that_of_the_formula_over_the_whole_matrix(tmp_path, model_type, shape):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    is_transposed, module = model_type == "gpt2", "h.0.mlp.c_fc" if model_type else "model.layers.0.mlp.up_proj"
    target = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear", "fan_in_fan_out": %s}'
    for place, name, content in (
        (base, "config.json", json.dumps({"model_type": model_type} if model_type else {})),
        (folder, "adapter_config.json", target % json.dumps(is_transposed)),
    ):
        place.mkdir()
        (place / name).write_text(content)
    rows, columns = reversed(shape) if is_transposed else shape
    noise = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=noise)
    a, b = (torch.randn(size, generator=noise) * 0.1 for size in ((2, columns), (rows, 2)))
    save_file({f"{module}.weight": weight}, base / "model.safetensors")
    named = {f"base_model.model.{module}.lora_{letter}.weight": factor for letter, factor in (("A", a), ("B", b))}
    save_file(named, folder / "adapter_model.safetensors")
    (found,) = merge(base, [folder], tmp_path / "out", NF4).changes
    quantize(base, tmp_path / "plain", QuantizeOptions(double_quant=False))
    after, before = (
        read_quantized(Checkpoint(tmp_path / made), f"{module}.weight").dequantize(torch.float32).double()
        for made in ("out", "plain")
    )
    change, delta = (after - before).reshape(rows, columns), b.double() @ a.double()
    assert found.effect == pytest.approx(float((change * delta).sum() / delta.square().sum()), rel=1e-7)
    assert found.moved == pytest.approx(float((change != 0).double().mean()))
    assert found.delta_norm == pytest.approx(float(delta.norm()))
    assert found.weight_norm == pytest.approx(float(weight.double().norm()))


def test_peak_memory_grows_by_less_than_half_the_size_of_the_matrix(run_cli, tmp_path):
    columns, peaks, module = 2048, [], "model.layers.0.mlp.up_proj"
    for rows in (2048, 16384):
        folders = [tmp_path / f"{name}-{rows}" for name in ("base", "adapter", "out")]
        adapter = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "all-linear"}'
        for folder, name, content in zip(folders, ("config", "adapter_config"), ("{}", adapter), strict=False):
            folder.mkdir()
            (folder / f"{name}.json").write_text(content)
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
        save_file({f"{module}.weight": weight}, folders[0] / "model.safetensors")
        factors = {"A": torch.ones(1, columns), "B": torch.ones(rows, 1)}
        named = {f"base_model.model.{module}.lora_{letter}.weight": factor for letter, factor in factors.items()}
        save_file(named, folders[1] / "adapter_model.safetensors")
        done = run_cli("merge", *folders[:2], "-o", folders[2], "--format", "nf4", "--threads", 2)
        assert done.code == 0, done.stderr
        peaks.append(done.peak_bytes)
    assert peaks[1] - peaks[0] < 14336 * columns  # half of what the larger matrix has more; its codes are a quarter


@pytest.mark.parametrize("form", ["keep", "nf4"])
def test_an_adapter_or_base_that_changes_during_the_merge_is_detected(tmp_path, llama, copy_of, form):
    """Tensors that replace whole ones are read only when they are written."""
    folder = tiny.write_peft_adapter(tmp_path / "a", llama, modules_to_save=["norm"])
    for changing in (folder / "adapter_model.safetensors", copy_of(llama, "base") / "model.safetensors"):

        def change(done, total, path=changing):
            other = {name: tensor * 2 for name, tensor in load_file(path).items()}
            save_file(other, tmp_path / "other", {"format": "pt"})
            (tmp_path / "other").replace(path)

        with pytest.raises(IntegrityError, match=f"{changing.name} changed while it was read"):
            merge(tmp_path / "base", [folder], tmp_path / "out", MergeOptions(format=form), progress=change)
        assert not list(tmp_path.glob("out*"))


def test_untying_and_quantizing_in_one_merge_is_refused(tmp_path, llama):
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", llama, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UsageError, match=r"lm_head\.weight") as caught:
        merge(llama, [folder], tmp_path / "out", MergeOptions(format="nf4", untie=True))
    assert "then quantize" in caught.value.hint


@pytest.mark.parametrize("form", ["keep", "nf4"])
def test_a_partial_folder_from_a_different_adapter_is_not_used(
    tmp_path, llama_sharded, adapter, copy_of, form, monkeypatch
):
    """The first run is interrupted after two shards; the adapters differ only in the values of their tensors."""
    other = copy_of(adapter)
    doubled = {name: tensor * 2 for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(doubled, other / "adapter_model.safetensors", {"format": "pt"})
    monkeypatch.setattr(_merge_quantized, "QuantizeOptions", partial(QuantizeOptions, max_shard_bytes=20_000))
    options, out = MergeOptions(format=form), tmp_path / "out"
    folder, left = tmp_path / "out.partial", {}

    def stop_after_two_shards(done, total):
        journal = folder / JOURNAL_NAME
        lines = journal.read_text().splitlines()[1:] if journal.is_file() else []
        names = [json.loads(line)["file"]["path"] for line in lines]
        left.update({name: (folder / name).read_bytes() for name in names if name.startswith("model-")})
        if len(left) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        merge(llama_sharded, [other], out, options, progress=stop_after_two_shards)
    assert left.items() <= weights(folder).items()
    merge(llama_sharded, [adapter], out, options)
    merge(llama_sharded, [adapter], tmp_path / "clean", options)
    assert tree(out) == tree(tmp_path / "clean")
    made = weights(out)
    assert len(made) > 2
    assert any(content != made[name] for name, content in left.items())  # so the two adapters' shards differ


def test_a_merged_base_is_merged_and_quantized_like_any_other(llama, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "base")
    merge(tmp_path / "base", [adapter], tmp_path / "out", NF4)
    manifest = require_manifest(tmp_path / "out")
    assert manifest.parents[1].manifest_sha256 == require_manifest(tmp_path / "base").sha256
    merge(tmp_path / "base", [adapter], tmp_path / "twice")
    quantize(tmp_path / "twice", tmp_path / "plain")
    assert manifest.tensors_root == require_manifest(tmp_path / "plain").tensors_root
