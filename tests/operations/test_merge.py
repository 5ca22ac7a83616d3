"""A merge is base + Σ weight · Δ, rounded once; a base that the adapter was not trained on is an error."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from folders import add_listed, edit_json, edit_manifest, edited_tensors, flip, rewritten, tensors_of, tree
from peft_adapters import change_tensors, quiet
from peft_formulas import rounded_once
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from undo_frames import frames

from adaptkit.checkpoint.manifest import parent_of, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import (
    BaseMismatchError,
    IntegrityError,
    NonFiniteError,
    UsageError,
)
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._merge.edits import AdapterStep, Edit
from adaptkit.operations._merge.folding import Fold, find_lengths, jobs_of
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.stack import stack
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify

WEIGHTS, RECORD = "model.safetensors", "adaptkit-undo/shard-00001-of-00003.safetensors"


def expected_merge(base, adapters, weights):
    """Compute the definition from the files in numpy: float64 sums in order, one rounding."""
    deltas = {}
    for folder, weight in zip(adapters, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        assert not config["rank_pattern"]
        for key in tensors:
            if ".lora_A." not in key:
                continue
            a, b = (tensors[key.replace("lora_A", half)].double().numpy() for half in ("lora_A", "lora_B"))
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            scaling = config["lora_alpha"] / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
            inner = np.zeros((len(b), a.shape[1]))
            for k in range(len(a)):
                inner += np.outer(b[:, k], a[k])
            change = inner * (scaling * weight)
            change = change.T if config["fan_in_fan_out"] else change
            deltas[name] = deltas[name] + change if name in deltas else 0.0 + change
    merged = {}
    for name, weight in tensors_of(base).items():
        if name in deltas:
            total = weight.double().numpy() + deltas[name]
            weight = rounded_once(torch.from_numpy(total), weight.dtype)
        merged[name] = weight
    return merged, set(deltas)


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        pytest.param("bfloat16", (1.0,), marks=pytest.mark.quick),
        *(("float16", (0.7, -1.3)), ("float32", (1.0, 1.0)), ("bfloat16", (0.7, -1.3)), ("float32", (2,))),
    ],
)
def test_every_element_is_the_float64_result_rounded_once(tmp_path, adapter, second_adapter, dtype, weights):
    """Also with an empty tensor in the base, and in every way to divide the work."""
    base = tiny.write_llama(tmp_path / "base", dtype=dtype, seed=4)
    save_file(load_file(base / WEIGHTS) | {"nothing": torch.empty(0, 3)}, base / WEIGHTS, {"format": "pt"})
    adapters = [adapter, second_adapter][: len(weights)]
    report = merge(base, adapters, tmp_path / "out", MergeOptions(weights=weights, threads=1))
    expected, changed = expected_merge(base, adapters, weights)
    assert_equal(tensors_of(tmp_path / "out"), expected)
    before = tensors_of(base)
    assert report.merged == len(changed) == 14
    moved = sum(int((expected[name] != before[name]).sum()) for name in changed)
    assert report.moved == pytest.approx(moved / sum(before[name].numel() for name in changed))
    assert 0 < report.moved <= 1
    again = merge(base, adapters, tmp_path / "again", MergeOptions(weights=tuple(map(float, weights)), threads=2))
    assert again.manifest_sha256 == report.manifest_sha256
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    without = merge(base, adapters, tmp_path / "without", MergeOptions(weights=weights, undo=False))
    assert without.undo_bits == 0
    one, two = tree(tmp_path / "out"), tree(tmp_path / "without")
    assert set(one) - set(two) == {"adaptkit-undo/shard-00001-of-00001.safetensors"}
    assert one[WEIGHTS] == two[WEIGHTS]


def test_headers_and_files_without_weights_are_copied_unchanged(tmp_path, llama, llama_sharded, adapter):
    before, given = tree(llama_sharded), tree(adapter)
    merge(llama_sharded, [adapter], tmp_path / "out")
    assert (tree(llama_sharded), tree(adapter)) == (before, given)
    after = tree(tmp_path / "out")
    changed = {name for name, content in before.items() if after.get(name) != content}
    assert all(name.startswith("model-0") for name in changed)
    assert {name for name in after if name not in before} == {
        "adaptkit-manifest.json",
        *(f"adaptkit-undo/shard-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)),
    }
    for name in changed:  # headers are copied byte by byte
        size = 8 + int.from_bytes(before[name][:8], "little")
        assert before[name][:size] == after[name][:size]
    verify(tmp_path / "out")
    merge(llama, [adapter], tmp_path / "one file")
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "one file"))


@pytest.mark.parametrize("change", [{"target_modules": ["q_proj"]}, {"exclude_modules": ["up_proj"]}])
def test_tensors_that_the_configuration_does_not_select_are_merged_and_reported(
    change, llama, adapter, copy_of, tmp_path
):
    """peft drops them silently."""
    other = copy_of(adapter)
    edit_json(other / "adapter_config.json", **change)
    (told,) = [told for told in merge(llama, [other], tmp_path / "out").notes if "does not select" in told]
    assert str(other) in told
    merge(llama, [adapter], tmp_path / "whole")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_dry_run_raises_the_same_errors_and_writes_nothing(tmp_path, llama, gpt2, adapter):
    report = merge(llama, [adapter], tmp_path / "out", dry_run=True)
    assert {report.moved, report.relative_delta, report.effect, report.undo_bits} == {None}  # nothing was measured
    assert (report.merged, report.tensors_root) == (14, None)
    with pytest.raises(BaseMismatchError):
        merge(gpt2, [adapter], tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())


def test_reported_figures_show_the_share_of_the_change_left_by_rounding(tmp_path, llama, adapter):
    strong = merge(llama, [adapter], tmp_path / "strong")
    weak = merge(llama, [adapter], tmp_path / "weak", MergeOptions(weights=(0.01,)))
    assert weak.relative_delta == pytest.approx(0.01 * strong.relative_delta, rel=1e-9)
    assert weak.moved < strong.moved
    assert strong.effect == pytest.approx(1, abs=0.01)
    assert 0 < weak.undo_bits < strong.undo_bits


def test_weights_that_an_adapter_replaces_need_not_be_known_to_verify_its_base(
    tmp_path, llama, adapter, copy_of, certified
):
    """With another weight, or with a second adapter that changes them, the result depends on the base's values."""
    known = certified(tiny.write_peft_adapter(tmp_path / "a", llama, modules_to_save=["norm"]), llama)
    assert all(target.module != "model.norm" for target in require_manifest(known).targets)
    assert merge(llama, [known], tmp_path / "out").base_verified
    assert merge(llama, [known, certified(adapter, llama)], tmp_path / "two").base_verified
    assert not merge(llama, [known, known], tmp_path / "twice").base_verified
    assert not merge(llama, [known], tmp_path / "half", MergeOptions(weights=(0.5,))).base_verified
    other = copy_of(llama)
    with edited_tensors(other / WEIGHTS) as tensors:
        tensors["model.norm.weight"] *= 2
    merge(other, [known], tmp_path / "other")
    assert_equal(tensors_of(tmp_path / "other"), tensors_of(tmp_path / "out"))
    edit_manifest(known, targets=require_manifest(known).targets[1:])
    assert not merge(llama, [known], tmp_path / "one unknown").base_verified


@pytest.mark.parametrize("form", ["keep", "nf4"])
def test_same_base_requires_all_tensors_to_match_not_only_the_changed_ones(
    form, tmp_path, llama, adapter, copy_of, certified, run_cli
):
    known, other = certified(adapter, llama), copy_of(llama)
    with edited_tensors(other / WEIGHTS) as tensors:
        tensors["model.norm.weight"] *= 2
    options = MergeOptions(format=form)
    assert not merge(llama, [known], tmp_path / "no parent", options).same_base
    parent = require_manifest(tmp_path / "no parent").parents[form == "nf4"]
    edit_manifest(known, parents=(parent,))
    report = merge(llama, [known], tmp_path / "right", options)
    assert (report.base_verified, report.same_base) == (True, True)
    report = merge(other, [known], tmp_path / "other", options)
    assert (report.base_verified, report.same_base) == (True, False)
    told = run_cli("merge", other, known, "-o", tmp_path / "told", "--format", form).stdout
    assert "the changed weights match those that the adapters were trained on" in told
    quantize(llama, tmp_path / "quantized")  # merge looks for its 16-bit parent in the same folder
    of_quantized = parent_of("base", require_manifest(tmp_path / "quantized"), ())
    edit_manifest(known, parents=(of_quantized,))
    copy_of(llama, "original")
    assert merge(tmp_path / "quantized", [known], tmp_path / "onto quantized", options).same_base
    assert not merge(tmp_path / "quantized", [known, adapter], tmp_path / "both", options).same_base
    # The manifest of an adapter with only other kinds of changes names the base but no targets.
    edit_manifest(known, targets=(), parents=(parent,))
    assert merge(llama, [known], tmp_path / "no targets", options).base_verified
    assert not merge(other, [known], tmp_path / "unknown", options).base_verified


def test_the_base_is_verified_only_if_all_adapters_record_what_they_were_trained_on(
    tmp_path, llama, adapter, second_adapter, certified
):
    known = certified(adapter, llama)
    stack([adapter, adapter], tmp_path / "stacked")  # has a manifest that names no base
    for number, (adapters, is_verified) in enumerate(
        [
            ([known], True),
            ([adapter], False),
            ([known, certified(second_adapter, llama)], True),
            ([known, second_adapter], False),
            ([tmp_path / "stacked"], False),
        ]
    ):
        assert merge(llama, adapters, tmp_path / str(number), dry_run=number > 2).base_verified == is_verified


@pytest.mark.parametrize("differs", ["everywhere", "in one bit"])
def test_a_different_base_of_the_same_shape_is_refused_and_a_tensor_named(
    tmp_path, llama, adapter, certified, copy_of, differs
):
    known, name = certified(adapter, llama), r"model\.layers\.\d\..*_proj\.weight"
    if differs == "everywhere":
        other = tiny.write_llama(tmp_path / "other", seed=9)
    else:
        other, name = copy_of(llama), r"model\.layers\.1\.mlp\.gate_proj\.weight"
        with edited_tensors(other / WEIGHTS) as tensors:
            tensors["model.layers.1.mlp.gate_proj.weight"].view(torch.int16)[3, 3] ^= 1
    with pytest.raises(BaseMismatchError, match=name) as caught:
        merge(other, [known], tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    report = merge(other, [known], tmp_path / "out", MergeOptions(allow_base_mismatch=True))
    assert not report.base_verified
    assert require_manifest(tmp_path / "out").operation["options"]["allow_base_mismatch"] is True


@pytest.mark.parametrize("dry_run", [True, False])
def test_adapters_of_different_bases_are_refused_before_any_output(
    tmp_path, llama, adapter, second_adapter, certified, dry_run
):
    other = tiny.write_llama(tmp_path / "other", seed=9)
    known = [certified(adapter, llama), certified(second_adapter, other)]
    before, seen = tree(tmp_path), []
    with pytest.raises(BaseMismatchError, match="different bases"):
        merge(llama, known, tmp_path / "out", dry_run=dry_run, progress=lambda *now: seen.append(now))
    assert not seen
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("out*"))


def test_changes_of_a_tied_head_alone_are_refused(tmp_path, llama, adapter, copy_of):
    """peft would merge them and leave the configuration tied, though the file has no such tensor."""
    folder, key = copy_of(adapter), "base_model.model.lm_head.lora_{}.weight"
    head = {key.format("A"): torch.ones(4, 64), key.format("B"): torch.ones(301, 4)}
    change_tensors(folder, lambda t: t.update(head))
    with pytest.raises(BaseMismatchError, match="lm_head"):
        merge(llama, [folder], tmp_path / "out")
    base = copy_of(llama)  # now with a tensor for the head, which transformers would ignore
    with edited_tensors(base / WEIGHTS) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    with pytest.raises(BaseMismatchError, match="tied"):
        merge(base, [folder], tmp_path / "out")


KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
A, B, UP = KEY.format(0, "A"), KEY.format(0, "B"), "model.layers.0.mlp.up_proj.weight"


def of_all(dtype):
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


UNFIT = {
    "a module more": ("adapter", lambda t: t.update({KEY.format(7, h): t[KEY.format(0, h)].clone() for h in "AB"}),
                      BaseMismatchError, r"model\.layers\.7\.self_attn\.q_proj\.weight"),
    "A too narrow": ("adapter", lambda t: t.update({A: t[A][:, :32]}), BaseMismatchError, r"32.*\[64, 64\]"),
    "B too short": ("adapter", lambda t: t.update({B: t[B][:32]}), BaseMismatchError, r"32.*\[64, 64\]"),
    "nothing changed": ("adapter", lambda t: [t[key].zero_() for key in t if "lora_A" in key], UsageError,
                        "unfit: changes nothing"),
    "a weight turned": ("base", lambda t: t.update({UP: t[UP].T}), BaseMismatchError, re.escape(UP)),
    "NaN": ("base", lambda t: t[UP][1].fill_(math.nan), NonFiniteError, rf"{UP}: the weight at \[1, 0\] is nan"),
    "float64": ("base", of_all(torch.float64), BaseMismatchError, "is F64(?s:.*)save the base in float32"),
    "integers": ("base", of_all(torch.int32), BaseMismatchError, "is I32(?s:.*)quantized from"),
}  # fmt: skip
"""What is changed and how, and the error."""


@pytest.mark.parametrize("name", UNFIT)
def test_a_base_and_an_adapter_that_do_not_fit_are_refused_and_the_tensor_named(
    tmp_path, llama, adapter, copy_of, name
):
    which, change, error, words = UNFIT[name]
    folder = copy_of(adapter if which == "adapter" else llama, "unfit")
    rewritten(folder, change, "adapter_model.safetensors" if which == "adapter" else WEIGHTS)
    with pytest.raises(error, match=words):
        merge(*((llama, [adapter, folder]) if which == "adapter" else (folder, [adapter])), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("count", "weights", "error"),
    [
        (0, (), "no adapter"),
        (1, (1.0, 2.0), r"(?m)^2 weights for 1 adapter$"),
        (2, (1.0,), r"(?m)^1 weight for 2 adapters$"),
    ],
)
def test_other_numbers_of_weights_and_no_adapters_are_refused(tmp_path, llama, adapter, count, weights, error):
    with pytest.raises(UsageError, match=error):
        merge(llama, [adapter] * count, tmp_path / "out", MergeOptions(weights=weights))


def test_a_sum_that_overflows_is_refused_and_its_tensor_named(tmp_path, adapter):
    base = tiny.write_llama(tmp_path / "base", dtype="float16")
    with pytest.raises(NonFiniteError, match=r"_proj\.weight: the merged weight overflows"):
        merge(base, [adapter], tmp_path / "out", MergeOptions(weights=(1e9,)))


def test_a_weight_of_zero_gives_the_base(tmp_path, llama, adapter):
    report = merge(llama, [adapter], tmp_path / "out", MergeOptions(weights=(0.0,)))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (llama / WEIGHTS).read_bytes()
    assert (report.moved, report.relative_delta, report.effect) == (0, 0, 1)


LORA_BIAS = {"lora_bias": True, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2 with biases and an untied head."""
    return tiny.write_family(tmp_path_factory.mktemp("qwen") / "qwen", "qwen2")


@pytest.mark.parametrize("form", ["keep", "nf4"])
@pytest.mark.parametrize("features", [{}, LORA_BIAS, {"target_modules": ["embed_tokens"]}])
def test_an_adapter_that_changes_nothing_is_refused_unless_its_weight_is_zero(tmp_path, qwen, features, form):
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", qwen, **features)
    change_tensors(folder, lambda t: [t[key].zero_() for key in t if "lora_B" in key or "lora_embedding_B" in key])
    options = MergeOptions(format=form)
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=f"{folder}: changes nothing"):
            merge(qwen, [folder], tmp_path / "out", options, dry_run=dry_run)
    assert not list(tmp_path.glob("out*"))
    merge(qwen, [folder], tmp_path / "out", replace(options, weights=(0.0,)))


@pytest.mark.parametrize(
    "features",
    [
        LORA_BIAS,
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [3]},
        {"bias": "all"},
        {},
    ],
    ids=str,
)
def test_an_adapter_with_one_nonzero_kind_of_change_is_merged(tmp_path, qwen, features):
    """Without other features, a single element of B is nonzero."""
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", qwen, **features)
    change_tensors(folder, lambda t: [t[key].zero_() for key in t if "lora_B.weight" in key])
    if not features:
        change_tensors(folder, lambda t: t[max(key for key in t if "lora_B" in key)][1, 0:1].fill_(1e-30))
    merge(qwen, [folder], tmp_path / "out")


def test_a_zero_row_that_dora_cannot_scale_is_reported_once(tmp_path, llama, copy_of):
    name, base = "model.layers.0.self_attn.q_proj", copy_of(llama)
    with edited_tensors(base / WEIGHTS) as tensors:
        tensors[f"{name}.weight"][3] = 0
    with quiet():
        folder = tiny.write_peft_adapter(tmp_path / "a", llama, use_dora=True)
    change_tensors(folder, lambda t: t[f"base_model.model.{name}.lora_B.weight"][3].zero_())
    with pytest.raises(NonFiniteError, match="a row of the changed weight is zero") as caught:
        merge(base, [folder], tmp_path / "out")
    assert caught.value.message.count(name) == 1
    assert caught.value.hint


@pytest.mark.parametrize(
    "features",
    [
        {"target_modules": [], "modules_to_save": ["norm"]},
        {"target_modules": [], "trainable_token_indices": [3, 1]},
    ],
    ids=["saved alone", "tokens alone"],
)
def test_an_adapter_without_low_rank_changes_is_merged(tmp_path, llama, adapter, copy_of, features):
    """peft cannot write one, but other tools do; removing the LoRA tensors of peft's gives the same."""
    folder = tiny.write_peft_adapter(tmp_path / "a", llama, **(features | {"target_modules": ["q_proj"]}))
    change_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "lora_" in key])
    report = merge(llama, [folder], tmp_path / "out")
    assert report.merged == (5 if "modules_to_save" in features else 1)


@pytest.mark.parametrize(
    ("name", "gone"),
    [("README.md", True), (RECORD, False), ("adaptkit-undo/base/README.md", True), ("tokenizer_config.json", False),
     ("model.safetensors.index.json", False), ("model-00001-of-00003.safetensors", False)],
)  # fmt: skip
def test_a_base_that_could_not_be_fully_restored_is_refused_before_writing(
    name, gone, tmp_path, llama_sharded, adapter, second_adapter
):
    """E.g. an artifact that was published and pulled, and whose card was edited since; also one of other weights."""
    merge(llama_sharded, [adapter], tmp_path / "first")
    add_listed(tmp_path / "first", "README.md", "a card")
    merge(tmp_path / "first", [second_adapter], tmp_path / "base")
    add_listed(tmp_path / "base", "README.md", "a card")
    path, seen = tmp_path / "base" / name, []
    if gone:
        path.unlink()
    elif name.startswith("model-"):
        flip(path, Checkpoint(tmp_path / "base").tensors["model.embed_tokens.weight"].position)
    else:
        path.write_text(path.read_text(errors="ignore") + " ")
    is_weight = name.startswith("model-")  # which is compared as it is copied
    error = "tensors do not match its manifest" if is_weight else f"{re.escape(path.name)} (has|is not|changed|does)"
    for dry_run in (True, False)[is_weight:]:
        with pytest.raises(IntegrityError, match=error):
            merge(tmp_path / "base", [adapter], tmp_path / "out", dry_run=dry_run, progress=lambda *_: seen.append(1))
    assert is_weight or not seen
    assert not list(tmp_path.glob("out*"))
    if path.name == "README.md":  # which only unmerge needs
        merge(tmp_path / "base", [adapter], tmp_path / "out", MergeOptions(undo=False))
        merge(tmp_path / "base", [adapter], tmp_path / "nf4", MergeOptions(format="nf4"))


def test_the_result_cannot_replace_the_16_bit_parent_of_a_quantized_base(tmp_path, llama, adapter, second_adapter):
    merge(llama, [adapter], tmp_path / "parent")
    quantize(tmp_path / "parent", tmp_path / "quantized")
    before = tree(tmp_path / "parent")
    with pytest.raises(UsageError, match="would change its own input"):
        merge(tmp_path / "quantized", [second_adapter], tmp_path / "parent", force=True)
    assert tree(tmp_path / "parent") == before


def test_the_runs_of_an_undo_record_are_the_same_in_every_version():
    """With different runs, verifying an older merge by recomputing it would fail: its record would differ."""
    spec = TensorSpec("w", "BF16", (1024, 1536))
    fold = Fold(Edit(spec, "w", spec.shape), {})
    assert [(run.start, run.count) for run in fold.pieces()] == [(0, 341), (341, 341), (682, 341), (1023, 1)]
    checkpoint = None  # no job is run here
    assert len(jobs_of(fold, checkpoint, with_undo=True)) == 4
    assert len(jobs_of(fold, checkpoint, with_undo=False)) == 2


def test_a_tensor_of_several_runs_has_a_frame_for_each_and_is_restored(tmp_path):
    """It has 2.25 MiB in bfloat16. A merge without a record uses longer runs."""
    base = tiny.write_llama(tmp_path / "base", hidden=768, layers=1)
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", base, target_modules=["down_proj"])
    merge(base, [adapter], tmp_path / "with")
    merge(base, [adapter], tmp_path / "without", MergeOptions(undo=False))
    (weights,) = (tmp_path / "with").glob("model*.safetensors")
    assert weights.read_bytes() == (tmp_path / "without" / weights.name).read_bytes()
    (record,) = (tmp_path / "with" / "adaptkit-undo").glob("shard-*.safetensors")
    found = frames(load_arrays(record)["model.layers.0.mlp.down_proj.weight"])
    assert [rows for rows, _ in found] == [341, 341, 86]
    unmerge(tmp_path / "with", [adapter], tmp_path / "back")
    (before,) = base.glob("model*.safetensors")
    assert (tmp_path / "back" / before.name).read_bytes() == before.read_bytes()


@pytest.mark.parametrize("per_column", [False, True])
def test_dora_lengths_computed_by_two_threads_equal_those_of_one(tmp_path, per_column):
    """Of four runs; each length is √Σ (W + Δ)², added in order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 1536, generator=generator).bfloat16()
    save_file({"w": weight}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    term = LowRank.of_tensors(torch.randn(4, 1536, generator=generator), torch.randn(1100, 4, generator=generator), 0.5)
    spec = TensorSpec("w", "BF16", (1100, 1536))
    magnitude = np.ones(1536 if per_column else 1100, np.float32)
    step = AdapterStep(0, 1.0, panels=((term,),), magnitude=magnitude, per_column=per_column)
    edit, checkpoint = Edit(spec, "w", spec.shape, (step,)), Checkpoint(tmp_path)
    (alone,) = find_lengths(checkpoint, edit, 1).values()
    expected = (weight.double() + 0.5 * (term.lora_b.double() @ term.lora_a.double())).norm(dim=int(not per_column))
    torch.testing.assert_close(torch.from_numpy(alone), expected)
    (found,) = find_lengths(checkpoint, edit, 2).values()
    assert np.array_equal(found, alone)
