"""Merging into the codes of a quantized base: what stays, what moves, what is refused; and back to the last byte."""

import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from folders import tree
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, IntegrityError, UsageError
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import VerifyOptions, verify

OPTIONS = {
    "fp8": QuantizeOptions("fp8"),
    "fp8 blocks": QuantizeOptions("fp8", block_size=128),
    "int8": QuantizeOptions("int8"),
    "w4a16": QuantizeOptions("w4a16", block_size=32),
    "w4a16 zeros": QuantizeOptions("w4a16", block_size=32, zero_points=True),
    "mxfp4": QuantizeOptions("mxfp4"),
    "nvfp4": QuantizeOptions("nvfp4"),
}
EIGHT_BITS = ("fp8", "fp8 blocks", "int8")
FOUR_BITS = ("w4a16", "w4a16 zeros", "mxfp4", "nvfp4")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the {s} {p}, and {n}" for n in range(9) for s in tiny.SUBJECTS for p in tiny.PLACES))
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory, llama):
    """Make a base in a format, without a manifest or an original beside it, as others release them."""
    folder = tmp_path_factory.mktemp("released")

    @cache
    def made(kind):
        quantize(llama, folder / kind, OPTIONS[kind])
        (folder / kind / MANIFEST_NAME).unlink()
        return folder / kind

    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory, llama):
    """An adapter of which 4-bit levels keep about half, on the queries and up projections."""
    folder = tmp_path_factory.mktemp("small") / "adapter"
    tiny.write_peft_adapter(folder, llama, target_modules=["q_proj", "up_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({k: v * 0.3 if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    return folder


def change(adapter, module=QUERY):
    tensors = load_file(adapter / "adapter_model.safetensors")
    b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    return (2.0 * b @ a).numpy()  # alpha / r is 2 in tiny's adapters


def decoded(folder, module=QUERY):
    return DecodedCheckpoint(Checkpoint(folder), "F32").read(f"{module}.weight").astype(np.float64)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_8_bits_move_to_the_nearest_level_and_back_to_the_byte(kind, released, small, tmp_path):
    base = released(kind)
    report = merge(base, small, tmp_path / "merged")
    assert report.onto == "trained"
    before, after, asked = decoded(base), decoded(tmp_path / "merged"), change(small)
    assert (before != after).any()
    distances = np.abs(before + asked - after), np.abs(asked)
    assert (distances[0] <= distances[1] * (1 + 1e-6)).all()  # staying is one of the levels
    kept = (after - before).ravel() @ asked.ravel() / (asked**2).sum()
    assert kept == pytest.approx(next(c.effect for c in report.changes if QUERY in c.name), rel=1e-3)
    verify(tmp_path / "merged")
    assert unmerge(tmp_path / "merged", None, tmp_path / "back").identical
    assert {k: v for k, v in tree(tmp_path / "back").items() if k != MANIFEST_NAME} == tree(base)


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_is_not_changed_keeps_its_bytes_and_so_do_all_scales(kind, released, small, text, tmp_path):
    base = released(kind)
    merge(base, small, tmp_path / "merged", MergeOptions(calibrate=(text,)))
    before, after = Checkpoint(base), Checkpoint(tmp_path / "merged")
    assert list(before.tensors) == list(after.tensors)
    differing = {name for name in before.tensors if (before.read(name) != after.read(name)).any()}
    codes = {DecodedCheckpoint(before).parts(f"{m}.weight")[0] for m in _changed(small)}
    assert differing
    assert differing <= codes
    assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()


def _levels(base, module):
    """Return the values that each weight could have, (out, in, 16) float64."""
    weight = DecodedCheckpoint(Checkpoint(base)).weights[f"{module}.weight"]
    coded = weight.rows(Checkpoint(base), 0, weight.shape[0])
    every = [replace(coded, codes=np.full_like(coded.codes, code)).decode(np.float32) for code in range(16)]
    return np.stack(every, -1).astype(np.float64)


def _changed(adapter):
    keys = load_file(adapter / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for k in keys if "lora_A" in k}


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_4_bits_are_refused_with_the_share_that_would_be_kept(kind, released, small, tmp_path):
    base = released(kind)
    with pytest.raises(CheckpointError, match=r"rounding to its 4-bit levels would keep .*% of the change") as raised:
        merge(base, small, tmp_path / "merged")
    assert "--calibrate FILE" in str(raised.value.hint)
    kept = asked = 0.0
    for module in _changed(small):
        coded, before, delta = _levels(base, module), decoded(base, module), change(small, module)
        near = np.abs((before + delta)[..., None] - coded).argmin(-1)
        after = np.take_along_axis(coded, near[..., None], -1)[..., 0]
        kept, asked = kept + ((after - before) * delta).sum(), asked + (delta**2).sum()
    share = float(re.search("keep (.*)%", str(raised.value)).group(1)) / 100
    assert share == pytest.approx(kept / asked, abs=0.1)  # the message's is of some rows
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_calibrated_4_bits_keep_much_of_the_change_of_the_outputs(kind, released, small, text, tmp_path):
    base = released(kind)
    report = merge(base, small, tmp_path / "merged", MergeOptions(calibrate=(text,), text=(text,)))
    moved, asked = decoded(tmp_path / "merged") - decoded(base), change(small)
    share = (moved * asked).sum() / (asked**2).sum()
    assert 1.2 > report.outputs_effect > share > 0.1
    assert report.text.divergence < 0.7 * report.text.base_divergence
    assert unmerge(tmp_path / "merged", None, tmp_path / "back").identical
    assert {k: v for k, v in tree(tmp_path / "back").items() if k != MANIFEST_NAME} == tree(base)


def test_dora_and_saved_modules_go_into_codes_too(released, llama, tmp_path):
    base = released("int8")
    adapter = tiny.write_peft_adapter(tmp_path / "dora", llama, use_dora=True, target_modules=["q_proj"])
    merge(base, adapter, tmp_path / "merged")
    magnitude = load_file(adapter / "adapter_model.safetensors")[
        f"base_model.model.{QUERY}.lora_magnitude_vector"
    ].double()
    changed = decoded(base) + change(adapter)
    expected = magnitude.numpy()[:, None] / np.linalg.norm(changed, axis=1, keepdims=True) * changed
    scale = Checkpoint(base).read(f"{QUERY}.weight_scale").astype(np.float64)
    inside = np.abs(expected) < 127 * scale
    error = np.abs(decoded(tmp_path / "merged") - expected) / scale
    assert error[inside].max() < 0.51  # half a step, and the rounding of the norms' weights to bfloat16
    assert unmerge(tmp_path / "merged", None, tmp_path / "back").identical


def test_an_adapter_of_a_quantized_base_goes_into_its_original_or_into_its_values(llama, small, tmp_path):
    """The reports of both merges agree on how far the two are apart, and on what each predicts."""
    (tmp_path / "near").mkdir()
    plain, base = tmp_path / "near" / "plain", tmp_path / "near" / "nf4"
    plain.symlink_to(llama)
    quantize(plain, base)
    dequantize(base, tmp_path / "dequantized")
    trained = certified_on(small, base, tmp_path)
    one = merge(base, trained, tmp_path / "one")
    two = merge(base, trained, tmp_path / "two", MergeOptions(onto="trained", format="plain"))
    assert (one.onto, two.onto) == ("original", "trained")
    weight = Checkpoint(llama).read(f"{QUERY}.weight").astype(np.float64)
    held = Checkpoint(tmp_path / "dequantized").read(f"{QUERY}.weight").astype(np.float64)
    for report in (one, two):
        (found,) = (c for c in report.changes if QUERY in c.name)
        assert found.distance == pytest.approx(np.linalg.norm(weight - held))
        distances = sum(c.distance**2 for c in report.changes), sum(c.delta_norm**2 for c in report.changes)
        assert report.quantization_error == pytest.approx((distances[0] / distances[1]) ** 0.5)
    merged = Checkpoint(tmp_path / "two").read(f"{QUERY}.weight")
    assert (merged == torch.tensor(held + change(small)).bfloat16().float().numpy().astype(merged.dtype)).all()
    merge(tmp_path / "dequantized", trained, tmp_path / "three")  # needs no --allow-base-mismatch
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "three" / "model.safetensors"
    ).read_bytes()


def test_the_divergences_are_those_of_the_models(llama, small, text, tmp_path):
    """Computed independently, by transformers and peft, from the folders."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adaptkit.data.windows import read_tokens

    (tmp_path / "near").mkdir()
    plain, base = tmp_path / "near" / "plain", tmp_path / "near" / "nf4"
    plain.symlink_to(llama)
    quantize(plain, base)
    dequantize(base, tmp_path / "dequantized")
    merge(base, small, tmp_path / "other", MergeOptions(onto="trained", format="plain"))
    found = merge(base, small, tmp_path / "merged", MergeOptions(text=(text,))).text
    tokens = read_tokens([text], llama, window=512, max_tokens=8192)

    def predicted(folder, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        with torch.no_grad():
            return model(tokens).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)

    labels = tokens[:, 1:].reshape(-1)
    reference = predicted(tmp_path / "dequantized", small)
    loss = torch.nn.functional.nll_loss
    assert found.tokens == len(labels)
    assert found.adapted_loss == pytest.approx(loss(reference, labels).item(), rel=1e-5)
    for name, divergence, nll in (
        ("dequantized", found.base_divergence, found.base_loss),
        ("merged", found.divergence, found.merged_loss),
        ("other", found.other_divergence, found.other_loss),
    ):
        other = predicted(tmp_path / name)
        expected = (reference.exp() * (reference - other)).sum(-1).mean().item()
        assert divergence == pytest.approx(expected, rel=2e-3, abs=1e-9)
        assert nll == pytest.approx(loss(other, labels).item(), rel=1e-5)
    assert found.other == "trained"
    assert found.other_divergence < found.divergence  # the adapter is added to the values that it was trained on


@pytest.mark.parametrize("form", ["fp8", "int8", "mxfp4", "nvfp4", "fp4"])
def test_a_merge_that_quantizes_equals_merging_then_quantizing_in_every_format(form, released, llama, small, tmp_path):
    """Also from the decoded values of a quantized base."""
    for base in (llama, released("fp8")):
        folder = tmp_path / base.name
        report = merge(base, small, folder / "one", MergeOptions(format=form))
        merge(base, small, folder / "merged", MergeOptions(format="plain" if base != llama else "keep"))
        quantize(folder / "merged", folder / "two", QuantizeOptions(form))
        one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)
        verify(folder / "one")
        quantize(_plain(base, folder), folder / "without", QuantizeOptions(form))
        moved = decoded(folder / "one") - decoded(folder / "without")
        share = (moved * change(small)).sum() / (change(small) ** 2).sum()
        assert next(c.effect for c in report.changes if QUERY in c.name) == pytest.approx(share, rel=0.03, abs=0.02)


def _plain(base, folder):
    if (base / MANIFEST_NAME).exists() or base.name == "llama":
        return base
    dequantize(base, folder / "plain")
    return folder / "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MergeOptions(onto="trained"), "is not quantized, so there is one answer"),
        (MergeOptions(format="plain"), "is not quantized"),
        (MergeOptions(calibrate=("t.txt",)), "only for a merge into the codes of a quantized base"),
    ],
)
def test_options_of_quantized_bases_are_refused_for_others(options, message, llama, small, tmp_path):
    with pytest.raises(UsageError, match=message):
        merge(llama, small, tmp_path / "merged", options)
    assert not (tmp_path / "merged").exists()


def test_nf4_has_no_codes_that_could_move_alone(llama, small, tmp_path):
    quantize(llama, tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="in a layout in which a merge cannot change single weights") as raised:
        merge(tmp_path / "nf4", small, tmp_path / "merged", MergeOptions(onto="trained"))
    assert "--format plain" in str(raised.value.hint)


def test_a_released_base_that_an_adapter_was_not_trained_on_is_refused(released, small, tmp_path):
    other = tiny.write_llama(tmp_path / "other", seed=7)
    quantize(other, tmp_path / "other-fp8", OPTIONS["fp8"])
    trained = certified_on(small, tmp_path / "other-fp8", tmp_path)
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        merge(released("fp8"), trained, tmp_path / "merged")
    trained = certified_on(small, released("fp8"), tmp_path)
    assert merge(released("fp8"), trained, tmp_path / "merged").base_verified


def certified_on(adapter, base, folder):
    """Copy an adapter with the manifest that ``train`` gives to one that was trained on a quantized base."""
    from adaptkit.checkpoint.adapter import read_adapter
    from adaptkit.checkpoint.hashing import fingerprint
    from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, tensors_root

    copy = folder / f"on-{base.name}"
    shutil.copytree(adapter, copy)
    files = DecodedCheckpoint(Checkpoint(base))

    def root(names):
        return tensors_root(TensorRecord.of(files.stored.spec(n), fingerprint(files.stored.read(n))) for n in names)

    read = read_adapter(copy)
    targets = [Target(m, files.spec(f"{m}.weight").shape, None, root(files.parts(f"{m}.weight"))) for m in read.modules]
    parent = Parent("base", "checkpoint", root(files.stored.tensors))
    manifest = Manifest("adapter", {"name": "train"}, (), read.records, (parent,), tuple(targets))
    (copy / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return copy


def test_the_manifest_names_the_stored_parts_and_the_merge_runs_again(released, small, tmp_path):
    base = released("fp8")
    merge(base, small, tmp_path / "merged")
    manifest = require_manifest(tmp_path / "merged")
    assert manifest.operation["options"]["values"] == "recoded"
    assert inspect(tmp_path / "merged").details["unmerge"] == "exactly; needs nothing else"
    targets = {target.module: target for target in manifest.targets}
    assert set(targets) == _changed(small)
    assert all(target.quantized_root for target in targets.values())
    report = verify(tmp_path / "merged", VerifyOptions(parents=(base, small), recompute=True))
    assert all("same bytes" in how for _, how in report.recomputed)


def test_adapters_are_not_needed_to_unmerge_but_must_not_be_others(released, llama, small, tmp_path):
    merge(released("fp8"), small, tmp_path / "merged")
    other = tiny.write_peft_adapter(tmp_path / "other", llama, target_modules=["q_proj"])
    with pytest.raises(BaseMismatchError, match="none of those given has it"):
        unmerge(tmp_path / "merged", other, tmp_path / "back")
    assert unmerge(tmp_path / "merged", small, tmp_path / "back").identical


def test_a_damaged_undo_record_is_an_error(released, small, tmp_path):
    merge(released("fp8"), small, tmp_path / "merged")
    (record,) = (tmp_path / "merged" / "adaptkit-undo").glob("shard-*")
    content = bytearray(record.read_bytes())
    content[-9] ^= 1
    record.write_bytes(content)
    with pytest.raises(IntegrityError, match="changed since the merge"):
        unmerge(tmp_path / "merged", None, tmp_path / "back")
    assert not (tmp_path / "back").exists()
