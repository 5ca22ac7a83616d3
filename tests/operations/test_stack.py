"""A stacked adapter equals the weighted sum of its parts, in adaptkit and in peft."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from folders import edit_manifest, edited_tensors
from peft_adapters import quiet
from peft_formulas import running

from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.operations.merge import merge
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.stack import StackOptions, stack


def logits(base, adapters):
    """Compute logits with peft in float32, with all adapters at once."""
    with quiet(), torch.no_grad():
        model = running(base, adapters[0])
        for number, folder in enumerate(adapters[1:]):
            model.load_adapter(folder, str(number))
        model.base_model.set_adapter(list(model.peft_config))
        return model.eval()(torch.arange(3, 43).view(2, 20)).logits


@pytest.mark.parametrize("head_first", [False, True])
def test_gpt2_adapters_with_and_without_a_head_can_be_stacked(tmp_path, gpt2, head_first):
    """With a head among the targets, peft writes fan_in_fan_out: false, though the other layers are still Conv1D."""
    with quiet():
        plain = tiny.write_peft_adapter(tmp_path / "plain", gpt2, seed=1)
        headed = tiny.write_peft_adapter(tmp_path / "headed", gpt2, seed=2, target_modules=["c_attn", "lm_head"])
    flags = [json.loads((path / "adapter_config.json").read_text())["fan_in_fan_out"] for path in (plain, headed)]
    assert flags == [True, False]
    stack([headed, plain] if head_first else [plain, headed], tmp_path / "out")
    ours, theirs = logits(gpt2, [tmp_path / "out"]), logits(gpt2, [plain, headed])
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (logits(gpt2, [plain]) - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_the_manifest_names_the_parts_and_their_base(tmp_path, llama, adapter, second_adapter, certified):
    known = [certified(adapter, llama), certified(second_adapter, llama)]
    stack(known, tmp_path / "out", StackOptions(weights=(1.0, 0.5)))
    manifest = require_manifest(tmp_path / "out")
    assert [(p.role, p.manifest_sha256, p.weight) for p in manifest.parents] == [
        ("adapter", require_manifest(known[0]).sha256, 1.0),
        ("adapter", require_manifest(known[1]).sha256, 0.5),
    ]
    assert manifest.targets == require_manifest(known[0]).targets
    other = tiny.write_llama(tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError):
        merge(other, [tmp_path / "out"], tmp_path / "merged")
    stack([known[0], second_adapter], tmp_path / "half known")
    assert require_manifest(tmp_path / "half known").targets == ()


def test_adapters_of_different_bases_are_refused(tmp_path, llama, adapter, second_adapter, certified):
    other = tiny.write_llama(tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError, match="different bases") as caught:
        stack([certified(adapter, llama), certified(second_adapter, other)], tmp_path / "out")
    assert caught.value.hint == "stack adapters of the same base"
    assert not (tmp_path / "out").exists()


def test_base_fingerprints_that_only_one_adapter_records_are_copied_in_either_order(
    tmp_path, llama, adapter, certified
):
    knowing, silent = (certified(adapter, llama, name) for name in ("knowing", "silent"))
    for folder, change in ((knowing, {"quantized_root": "1" * 64}), (silent, {"base_xxh3_128": None})):
        edit_manifest(folder, targets=tuple(replace(t, **change) for t in require_manifest(folder).targets))
    for number, parts in enumerate(([knowing, silent], [silent, knowing])):
        stack(parts, tmp_path / str(number))
        assert require_manifest(tmp_path / str(number)).targets == require_manifest(knowing).targets


def test_no_quantized_base_is_recorded_if_adapters_name_different_ones(tmp_path, llama, adapter, certified):
    known = [certified(adapter, llama, name) for name in "123"]
    for folder in known:
        targets = (replace(t, quantized_root=folder.name * 64) for t in require_manifest(folder).targets)
        edit_manifest(folder, targets=tuple(targets))
    stack(known, tmp_path / "out")
    assert {target.quantized_root for target in require_manifest(tmp_path / "out").targets} == {None}


def test_different_shapes_and_layouts_are_refused(tmp_path, adapter, copy_of, gpt2):
    folder = copy_of(adapter)
    with edited_tensors(folder / "adapter_model.safetensors") as tensors:
        key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        tensors[key] = tensors[key][:64].clone()
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.up_proj: shape \[128, 64\] .* \[64, 64\]"):
        stack([adapter, folder], tmp_path / "out")
    with pytest.raises(AdapterError, match="store weights differently"):
        stack([adapter, tiny.write_peft_adapter(tmp_path / "gpt2", gpt2)], tmp_path / "out")


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_value_head_beside_an_adapter_is_left_out_with_a_note(tmp_path, adapter, copy_of, run_cli, name):
    scoring = copy_of(adapter)
    (scoring / name).write_bytes(b"not read")
    note = f"{scoring}: {name} is left out"
    for command in (("stack", scoring, adapter, scoring), ("resize", scoring, "--rank", 2)):
        out = tmp_path / command[0]
        result = run_cli(*command, "-o", out)
        assert result.code == 0
        assert result.stdout.count(note) == 1
        assert not (out / name).exists()
        told = json.loads(run_cli(*command, "-o", out, "--force", "--json", "--dry-run").stdout)["notes"]
        assert sum(line.startswith(note) for line in told) == 1
    (scoring / "model.safetensors").write_bytes(b"not read")  # so pickled weights would be the base's
    if name == "pytorch_model.bin":
        assert resize(scoring, tmp_path / "other", ResizeOptions(rank=2)).notes == ()
