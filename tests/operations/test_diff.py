"""Factored comparisons are those of the dense matrices."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.errors import AdapterError
from adaptkit.operations.diff import diff

WEIGHTS = "adapter_model.safetensors"


def dense(folder):
    read = read_adapter(folder)
    return {m: t.scaling * t.lora_b.double() @ t.lora_a.double() for m, t in read.modules.items()}


def cosine(one, two):
    return float((one * two).sum() / (one.norm() * two.norm()))


@pytest.fixture
def other(tmp_path, llama):
    return tiny.write_peft_adapter(tmp_path / "other", llama, rank=6, seed=3, use_rslora=True)


def test_figures_are_those_of_the_dense_matrices(adapter, other):
    report, one, two = diff(adapter, other), dense(adapter), dense(other)
    assert {m.module for m in report.modules} == set(one) == set(two)
    for found in report.modules:
        x, y = one[found.module], two[found.module]
        assert found.ranks == (4, 6)
        assert found.norms == (pytest.approx(float(x.norm()), rel=1e-10), pytest.approx(float(y.norm()), rel=1e-10))
        assert found.cosine == pytest.approx(cosine(x, y), abs=1e-10)
        assert found.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-10)
    x, y = (torch.cat([changes[m].reshape(-1) for m in sorted(changes)]) for changes in (one, two))
    assert report.norms == (pytest.approx(float(x.norm()), rel=1e-10), pytest.approx(float(y.norm()), rel=1e-10))
    assert report.cosine == pytest.approx(cosine(x, y), abs=1e-10)
    assert report.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-10)
    assert not report.same


def test_an_adapter_is_the_same_as_itself(adapter, copy_of):
    report = diff(adapter, copy_of(adapter))
    assert report.same
    assert report.relative < 1e-14
    assert report.cosine == pytest.approx(1, abs=1e-12)
    assert (report.only_in_first, report.only_in_second) == ((), ())
    assert all(module.relative < 1e-13 for module in report.modules)


def test_comparing_the_other_way_round_gives_the_mirror_image(adapter, second_adapter):
    there, back = diff(adapter, second_adapter), diff(second_adapter, adapter)
    assert there.norms == back.norms[::-1]
    assert there.tensors_roots == back.tensors_roots[::-1]
    assert there.cosine == pytest.approx(back.cosine, abs=1e-14)
    assert there.relative == pytest.approx(back.relative, rel=1e-12)
    assert there.only_in_first == back.only_in_second
    mirrored = {m.module: m for m in back.modules}
    for module in there.modules:
        twin = mirrored[module.module]
        assert (module.norms, module.ranks) == (twin.norms[::-1], twin.ranks[::-1])
        assert module.relative == pytest.approx(twin.relative, rel=1e-12)


def test_modules_of_one_adapter_only_are_told_and_count(adapter, second_adapter):
    report, one, two = diff(adapter, second_adapter), dense(adapter), dense(second_adapter)
    assert set(report.only_in_first) == set(one) - set(two)
    assert report.only_in_second == ()
    squared = sum(float((one[m] - two.get(m, torch.zeros_like(one[m]))).norm() ** 2) for m in one)
    assert report.relative == pytest.approx(squared**0.5 / max(report.norms), rel=1e-10)
    lonely = next(m for m in report.modules if m.module == report.only_in_first[0])
    assert (lonely.ranks[1], lonely.norms[1], lonely.cosine, lonely.relative) == (0, 0.0, 0.0, 1.0)


def test_those_that_differ_most_come_first(adapter, other):
    found = [module.relative for module in diff(adapter, other).modules]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 1


def test_one_unit_in_the_last_place_is_a_difference(adapter, copy_of):
    folder = copy_of(adapter)
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors[key].view(torch.int32)[1, 1] += 1
    save_file(tensors, folder / WEIGHTS)
    report = diff(adapter, folder)
    assert not report.same
    assert 0 < report.relative < 1e-6
    assert report.modules[0].module == "model.layers.0.mlp.up_proj"


def test_another_scaling_of_the_same_tensors_is_a_difference(adapter, copy_of):
    folder = copy_of(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    report = diff(adapter, folder)
    assert report.tensors_roots[0] == report.tensors_roots[1]
    assert not report.same
    assert report.relative == pytest.approx(0.5, rel=1e-10)
    assert report.cosine == pytest.approx(1, abs=1e-12)


def test_the_same_change_in_other_factors_differs_in_tensors_but_not_in_effect(adapter, copy_of):
    folder = copy_of(adapter)
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t * (2.0 if "lora_A" in k else 0.5) for k, t in tensors.items()}, folder / WEIGHTS)
    report = diff(adapter, folder)
    assert not report.same
    assert report.relative < 1e-14


def test_changes_of_zero_are_compared_without_dividing_by_zero(adapter, copy_of):
    folders = [copy_of(adapter, name) for name in ("one", "two")]
    for folder in folders:
        tensors = load_file(folder / WEIGHTS)
        save_file({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}, folder / WEIGHTS)
    report = diff(*folders)
    assert (report.norms, report.cosine, report.relative) == ((0.0, 0.0), 0.0, 0.0)
    against = diff(folders[0], adapter)
    assert (against.cosine, against.relative) == (0.0, 1.0)


def test_modules_of_different_shapes_count_as_altogether_different(adapter, copy_of):
    folder = copy_of(adapter)
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[key] = tensors[key][:64].clone()
    save_file(tensors, folder / WEIGHTS)
    found = diff(adapter, folder).modules[0]
    assert found.module == "model.layers.0.mlp.up_proj"
    assert found.cosine == 0
    assert found.relative > 1


def test_what_is_no_adapter_is_refused(adapter, llama):
    with pytest.raises(AdapterError, match="not an adapter"):
        diff(adapter, llama)
