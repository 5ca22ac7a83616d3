"""Comparisons of factors equal those of dense matrices, and everything in two artifacts is compared."""

import dataclasses
import json
import math
import shutil

import peft_adapters
import pytest
import tiny
import torch
from folders import changes_of, edit_json, edit_manifest, rewritten
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.operations.diff import AdapterDiffReport, CheckpointDiffReport, diff

WEIGHTS = "adapter_model.safetensors"
UP = "base_model.model.model.layers.0.mlp.up_proj"


def cosine(one, two):
    return float((one * two).sum() / (one.norm() * two.norm()))


def edit(folder, change):
    return rewritten(folder, change, WEIGHTS)


@pytest.fixture
def other(tmp_path, llama):
    return tiny.write_peft_adapter(tmp_path / "other", llama, rank=6, seed=3, use_rslora=True)


def test_figures_equal_those_of_the_dense_matrices(adapter, other):
    report, one, two = diff(adapter, other), changes_of(adapter), changes_of(other)
    assert {m.module for m in report.modules} == set(one) == set(two)
    for found in report.modules:
        x, y = one[found.module], two[found.module]
        assert (found.ranks, found.shapes) == ((4, 6), (tuple(x.shape), tuple(x.shape)))
        assert found.norms == (pytest.approx(float(x.norm()), rel=1e-10), pytest.approx(float(y.norm()), rel=1e-10))
        assert found.cosine == pytest.approx(cosine(x, y), abs=1e-10)
        assert found.difference == pytest.approx(float((x - y).norm()), rel=1e-10)
        assert found.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-10)
        for spectrum, matrix, rank in zip(
            (*found.spectra, found.difference_spectrum), (x, y, x - y), (4, 6, 10), strict=True
        ):
            assert spectrum == pytest.approx(torch.linalg.svdvals(matrix)[:rank].tolist(), rel=1e-8)
        for which, spectrum in enumerate(found.spectra):
            shares = [s / sum(spectrum) for s in spectrum]
            assert found.effective_ranks[which] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
            assert found.stable_ranks[which] == pytest.approx(sum(s * s for s in spectrum) / spectrum[0] ** 2)
        bases = [torch.linalg.svd(matrix)[0][:, :rank] for matrix, rank in ((x, 4), (y, 6))]
        assert found.columns.cosines == pytest.approx(torch.linalg.svdvals(bases[0].T @ bases[1]).tolist(), abs=1e-8)
        assert found.columns.random == pytest.approx(math.sqrt(6 / x.shape[0]))
    assert not report.same


def stacked(changes, names):
    return torch.cat([changes[m].reshape(-1) for m in names])


def test_figures_of_groups_treat_their_modules_as_one_vector(adapter, other):
    report, one, two = diff(adapter, other), changes_of(adapter), changes_of(other)
    groups = {
        "all": (report.total, set(one)),
        **{g.name: (g, {m for m in one if m.startswith(f"{g.name}.")}) for g in report.layers},
        **{g.name: (g, {m for m in one if m.endswith(g.name.split("*")[1])}) for g in report.types},
    }
    assert len(groups) == 1 + 2 + 7
    for group, names in groups.values():
        x, y = stacked(one, sorted(names)), stacked(two, sorted(names))
        assert group.modules == len(names)
        assert group.norms == (pytest.approx(float(x.norm()), rel=1e-10), pytest.approx(float(y.norm()), rel=1e-10))
        assert group.cosine == pytest.approx(cosine(x, y), abs=1e-10)
        assert group.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-10)
        inside = [m for m in report.modules if m.module in names]
        angles = [c for m in inside for c in m.columns.cosines]
        assert group.columns == pytest.approx(math.sqrt(sum(c * c for c in angles) / len(angles)))
        randoms = [m.rows.random**2 for m in inside for _ in m.rows.cosines]
        assert group.rows_random == pytest.approx(math.sqrt(sum(randoms) / len(randoms)))
        assert group.interference == pytest.approx(sum(m.interference for m in inside))
        sizes = [m.shapes[0][0] * m.shapes[0][1] for m in inside]
        signs = sum(m.sign_agreement * size for m, size in zip(inside, sizes, strict=True)) / sum(sizes)
        assert group.sign_agreement == pytest.approx(signs)
        assert group.effective_ranks[1] == pytest.approx(sum(m.effective_ranks[1] for m in inside) / len(inside))


def test_an_adapter_is_the_same_as_its_copy(adapter, copy_of):
    report = diff(adapter, copy_of(adapter))
    assert report.same
    assert (report.total.relative, report.total.difference) == (0, 0)
    assert report.total.cosine == pytest.approx(1, abs=1e-12)
    assert report.total.interference_share == pytest.approx(1)
    assert report.total.sign_agreement == 1
    assert (report.only_in_first, report.only_in_second) == ((), ())
    assert all(module.relative == 0 for module in report.modules)


def test_modules_in_only_one_adapter_are_listed_and_count(adapter, second_adapter):
    report, one, two = diff(adapter, second_adapter), changes_of(adapter), changes_of(second_adapter)
    assert set(report.only_in_first) == set(one) - set(two)
    assert report.only_in_second == ()
    squared = sum(float((one[m] - two.get(m, torch.zeros_like(one[m]))).norm() ** 2) for m in one)
    assert report.total.relative == pytest.approx(squared**0.5 / max(report.total.norms), rel=1e-10)
    lonely = next(m for m in report.modules if m.module == report.only_in_first[0])
    assert (lonely.ranks[1], lonely.norms[1], lonely.cosine, lonely.relative) == (0, 0.0, 0.0, 1.0)
    assert (lonely.columns, lonely.sign_agreement, lonely.interference, lonely.shapes[1]) == (None, None, None, None)


def test_one_unit_in_the_last_place_is_a_difference(adapter, copy_of):
    def change(tensors):
        tensors[f"{UP}.lora_A.weight"].view(torch.int32)[1, 1] += 1

    report = diff(adapter, edit(copy_of(adapter), change))
    assert not report.same
    assert 0 < report.total.relative < 1e-6
    assert report.modules[0].module == "model.layers.0.mlp.up_proj"


def test_a_different_scaling_of_the_same_tensors_is_a_difference(adapter, copy_of):
    folder = copy_of(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    edit_json(folder / "adapter_config.json", lora_alpha=2 * config["lora_alpha"])
    report = diff(adapter, folder)
    assert report.tensors_roots[0] == report.tensors_roots[1]
    assert not report.same
    assert report.total.relative == pytest.approx(0.5, rel=1e-10)
    assert report.total.cosine == pytest.approx(1, abs=1e-12)
    assert [(v.key, v.first, v.second) for v in report.config] == [("lora_alpha", "8", "16")]


def test_different_factors_of_the_same_change_differ_as_tensors_but_not_in_effect(adapter, copy_of):
    def change(tensors):
        tensors.update({k: t * (2.0 if "lora_A" in k else 0.5) for k, t in tensors.items()})

    report = diff(adapter, edit(copy_of(adapter), change))
    assert not report.same
    assert report.total.relative < 1e-14


def test_the_same_numbers_in_a_different_dtype_are_a_difference(adapter, copy_of):
    folders = [copy_of(adapter, name) for name in ("one", "two")]
    edit(folders[0], lambda tensors: tensors.update({k: t.bfloat16().float() for k, t in tensors.items()}))
    edit(folders[1], lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    report = diff(*folders)
    assert (report.same, report.total.relative) == (False, 0)


def test_configuration_without_effect_on_the_change_is_listed_but_does_not_count(adapter, copy_of):
    folder = copy_of(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    changes = {"peft_version": "0.0", "base_model_name_or_path": "a/b", "target_modules": ["zzz", "aaa"]}
    edit_json(folder / "adapter_config.json", **changes)
    report = diff(adapter, folder)
    assert report.same
    assert {v.key for v in report.config} == set(changes)
    edit_json(folder / "adapter_config.json", **config | {"target_modules": list("ba")})
    twin = copy_of(folder, "twin")
    edit_json(twin / "adapter_config.json", target_modules=list("ab"))
    assert diff(folder, twin).config == (), "peft writes sets, in any order"


def test_changes_of_zero_are_compared_without_dividing_by_zero(adapter, copy_of):
    def change(tensors):
        tensors.update({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()})

    folders = [edit(copy_of(adapter, name), change) for name in ("one", "two")]
    total = diff(*folders).total
    assert (total.norms, total.cosine, total.relative, total.columns) == ((0.0, 0.0), 0.0, 0.0, None)
    assert (total.sign_agreement, total.interference_share, total.effective_ranks) == (None, None, (0.0, 0.0))
    against = diff(folders[0], adapter).total
    assert (against.cosine, against.relative) == (0.0, pytest.approx(1.0, rel=1e-12))


def test_modules_of_different_shapes_count_as_entirely_different(adapter, copy_of):
    def change(tensors):
        tensors[f"{UP}.lora_B.weight"] = tensors[f"{UP}.lora_B.weight"][:64].clone()

    found = diff(adapter, edit(copy_of(adapter), change)).modules[0]
    assert found.module == "model.layers.0.mlp.up_proj"
    assert found.shapes == ((128, 64), (64, 64))
    assert found.cosine == 0
    assert found.relative > 1


KINDS = [
    "linear_as_parameter", "conv1d", "embedding_tied", "dora_embedding", "lora_bias_phi", "biases_all", "saved_norms",
    "resized_embedding_tied", "tokens_both", "tokens_same_tied", "experts_qwen3", "experts_bias_stack",
    "experts_one_by_one_mixtral",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_no_tensor_of_any_kind_of_adapter_is_ignored(name, made, tmp_path):
    folder = peft_adapters.make(made, name).adapter
    twin = shutil.copytree(folder, tmp_path / "twin")
    report = diff(folder, twin)
    assert report.same
    assert (report.tensors, report.tensors_only_in_first, report.tensors_only_in_second) == ((), (), ())
    for key in sorted(load_file(folder / WEIGHTS)):
        shutil.copy(folder / WEIGHTS, twin / WEIGHTS)

        def change(tensors, key=key):
            tensors[key].view(-1)[0] += tensors[key].abs().max()

        report = diff(folder, edit(twin, change))
        assert not report.same, key
        if report.tensors:
            (found,) = report.tensors
            assert (found.changed, found.relative > 0) == (1, True), key
            assert report.total.relative == 0
        else:
            assert report.total.relative > 0, key


def test_a_note_says_that_stacked_and_single_experts_are_not_compared(made):
    """Which of them are the same depends on the model: its base merges both into the same tensors."""
    stacked = peft_adapters.make(made, "experts_mixtral").adapter
    single = peft_adapters.make(made, "experts_one_by_one_mixtral").adapter
    for first, second in ((stacked, single), (single, stacked)):
        (remark,) = diff(first, second).remarks
        assert remark.startswith(f"experts are not compared: {stacked} changes stacks")
    for folder in (stacked, single):
        assert diff(folder, folder).remarks == ()


def test_tensors_that_are_not_low_rank_changes_are_compared_directly(made, tmp_path):
    folder = peft_adapters.make(made, "dora").adapter
    twin = shutil.copytree(folder, tmp_path / "twin")
    key = next(k for k in load_file(folder / WEIGHTS) if "magnitude" in k)
    edit(twin, lambda tensors: tensors[key].mul_(torch.linspace(0.9, 1.3, tensors[key].numel())))
    report = diff(folder, twin)
    (found,) = report.tensors
    one, two = (load_file(path / WEIGHTS)[key].double() for path in (folder, twin))
    assert found.role == "DoRA magnitude"
    assert found.relative == pytest.approx(float((one - two).norm() / max(one.norm(), two.norm())), rel=1e-12)
    assert found.norms == pytest.approx((float(one.norm()), float(two.norm())))
    assert any("DoRA" in remark for remark in report.remarks)
    assert report.tensors_equal == len([k for k in load_file(folder / WEIGHTS) if "magnitude" in k]) - 1


def test_tensors_in_only_one_adapter_are_listed(made, adapter):
    dora = peft_adapters.make(made, "dora").adapter
    report = diff(dora, adapter)
    assert not report.same
    assert report.tensors_only_in_second == ()
    assert all(name.endswith("lora_magnitude_vector") for name in report.tensors_only_in_first)
    assert len(report.tensors_only_in_first) == 6


def test_trained_token_rows_are_compared_for_tokens_in_both_adapters(made, tmp_path):
    folder = peft_adapters.make(made, next(n for n in peft_adapters.CASES if n.startswith("tokens"))).adapter
    twin = shutil.copytree(folder, tmp_path / "twin")
    config = json.loads((twin / "adapter_config.json").read_text())
    indices = config["trainable_token_indices"]
    renamed = {k: [9, *v[1:]] for k, v in indices.items()} if isinstance(indices, dict) else [9, *indices[1:]]
    edit_json(twin / "adapter_config.json", trainable_token_indices=renamed)
    found = next(t for t in diff(folder, twin).tensors if t.role == "token rows")
    assert (found.remark, found.relative) == ("3 and 3 tokens, 2 in both", 0)


def test_equivalent_tensor_names_are_not_a_difference(adapter, copy_of):
    folder = copy_of(adapter)
    peft_adapters.rename_keys(folder, lambda key: key.replace("lora_A.weight", "lora_A.default.weight"))
    report = diff(adapter, folder)
    assert report.same
    assert report.tensors_roots[0] != report.tensors_roots[1]


def test_mismatched_manifests_and_different_bases_are_remarked(certified, adapter, llama, tmp_path, copy_of):
    base = rewritten(copy_of(llama), lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(2))
    first, second = certified(adapter, llama, "first"), certified(adapter, base, "second")
    report = diff(first, second)
    assert report.same
    assert report.remarks == ("trained on different bases: 1 module differs, such as model.layers.1.mlp.up_proj",)
    assert None not in report.manifests
    edit(second, lambda tensors: tensors[f"{UP}.lora_A.weight"].mul_(2))
    assert any("its tensors do not match its manifest" in remark for remark in diff(first, second).remarks)


@pytest.mark.parametrize("silent", [{"base_xxh3_128": None}, {"base_xxh3_128": None, "quantized_root": "11" * 32}])
def test_a_manifest_without_base_fingerprints_causes_no_remark_about_different_bases(certified, adapter, llama, silent):
    first, second = certified(adapter, llama, "first"), certified(adapter, llama, "second")
    targets = require_manifest(second).targets
    edit_manifest(second, targets=tuple(dataclasses.replace(target, **silent) for target in targets))
    assert diff(first, second).remarks == diff(second, first).remarks == ()


def test_compensation_files_are_compared_too(made, llama, tmp_path, copy_of):
    source = peft_adapters.make(made, "saved_norms").adapter
    tensors = {}
    for module, t in read_adapter(source).modules.items():
        tensors |= {f"{module}.lora_A": t.lora_a, f"{module}.lora_B": t.lora_b}
        tensors[f"{module}.scaling"] = torch.tensor([t.scaling], dtype=torch.float64)
    one, two = copy_of(source, "one"), copy_of(source, "two")
    save_file(tensors, one / COMPENSATION_NAME)
    lonely = diff(one, two)
    assert not lonely.same
    assert all(name.endswith("(compensation)") for name in lonely.tensors_only_in_first)
    assert len(lonely.tensors_only_in_first) == 2 * len(lonely.modules)
    assert lonely.tensors_equal > 0
    save_file({k: t * 2 if k.endswith("lora_A") else t for k, t in tensors.items()}, two / COMPENSATION_NAME)
    report = diff(one, two)
    assert {(t.role, t.name.partition(".lora_")[2]) for t in report.tensors} == {("compensation", "A (compensation)")}
    assert [t.relative for t in report.tensors] == pytest.approx([0.5] * len(lonely.modules))


@pytest.fixture
def tuned(llama, copy_of):
    """A copy of the checkpoint with two matrices and a norm changed."""

    def change(tensors):
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
            tensors[name] *= torch.linspace(0.9, 1.1, tensors[name].shape[-1]).bfloat16()

    return rewritten(copy_of(llama, "tuned"), change)


def test_the_number_of_threads_changes_nothing(llama, tuned, adapter, other):
    assert diff(llama, tuned, threads=1) == diff(llama, tuned, threads=3)
    assert diff(adapter, other, threads=1) == diff(adapter, other, threads=3)


def test_an_adapter_is_compared_only_with_an_adapter(adapter, llama, tmp_path):
    for pair in ((adapter, llama), (llama, adapter)):
        with pytest.raises(UsageError, match="is an adapter, but") as caught:
            diff(*pair)
        assert "merge" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        diff(adapter, tmp_path / "empty")
    with pytest.raises(UsageError, match="does not exist"):
        diff(adapter, tmp_path / "absent")


def test_reports_are_json_of_finite_numbers(adapter, second_adapter, llama, tuned):
    for first, second, kind in ((adapter, second_adapter, AdapterDiffReport), (llama, tuned, CheckpointDiffReport)):
        report = diff(first, second)
        assert isinstance(report, kind)
        assert json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))["same"] is False


def test_a_tokenizer_in_the_adapters_folder_counts_since_merge_copies_it(adapter, llama, copy_of):
    folder = copy_of(adapter)
    assert diff(adapter, folder).same
    shutil.copy(llama / "tokenizer.json", folder)
    report = diff(adapter, folder)
    assert not report.same
    assert [f.file for f in report.beside.files] == ["tokenizer.json"]
