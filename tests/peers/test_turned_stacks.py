"""Stacks of experts that older releases of peft wrote transposed are read as the same change.

The matrices of a stack are (out, in), or (in, out) if the model's own code says ``is_transposed``. Up to 0.18, peft
always took the first dimension for the input, and 0.19.0 always took the wrong one. The tests make such adapters from
one that the installed peft writes and runs, by exchanging its factors.
"""

import json
import shutil
from contextlib import nullcontext

import peft_adapters
import pytest
import torch
from peft import PeftModel
from peft_adapters import CONFIG, WEIGHTS, Case
from safetensors.torch import load_file

from adaptkit.checkpoint.adapter import adapter_identity, read_adapter
from adaptkit.checkpoint.layout import read_json
from adaptkit.errors import BaseMismatchError
from adaptkit.operations.check import check
from adaptkit.operations.diff import diff
from adaptkit.operations.merge import merge
from adaptkit.operations.unmerge import unmerge
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import load_model

IDS = torch.arange(2, 298).view(8, 37)
EXPERTS = 4
NEW_IN_18 = {"alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "peft_version"}
BOTH = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
BASES = {
    "one by one": Case(family="olmoe", lora=BOTH),
    "stacks": Case(family="olmoe", fused=True, lora=BOTH),
    "transposed": Case(family="gpt_oss", lora=BOTH),
}
CASES = [
    ("one by one", "0.17", True),
    ("one by one", "0.19.0", True),
    ("one by one", "0.19.1", False),
    ("stacks", "0.18.0", True),
    ("stacks", None, False),
    ("transposed", "0.18.1", False),
    ("transposed", "0.19.0", True),
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The bases, each with the adapter that peft makes."""
    root = tmp_path_factory.mktemp("peers")
    with peft_adapters.quiet():
        bases = {name: peft_adapters.write_base(root / name, case) for name, case in BASES.items()}
        return {
            name: (base, peft_adapters.write_adapter(root / f"{name}-adapter", BASES[name], base))
            for name, base in bases.items()
        }


def stacks_of(folder):
    return {key: t for key, t in load_file(folder / WEIGHTS).items() if ".experts." in key}


def turn(tensors):
    """Exchange A and B of every expert: A is (experts · rank, in), and in B the expert's index varies fastest."""
    for key in [key for key in tensors if ".experts." in key and key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        tensors[key] = b.view(len(b), -1, EXPERTS).permute(2, 1, 0).reshape(-1, len(b))
        tensors[other] = a.view(EXPERTS, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)


def without_the_square(tensors):
    for key in [key for key in tensors if ".experts.base_layer." in key]:
        del tensors[key]


def written(folder, adapter, version, turned):
    shutil.copytree(adapter, folder)
    peft_adapters.change_config(folder, peft_version=version)
    if version == "0.17":  # which does not record its version
        config = read_json(folder / CONFIG)
        kept = {key: value for key, value in config.items() if key not in NEW_IN_18}
        (folder / CONFIG).write_text(json.dumps(kept), encoding="utf-8")
    if turned:
        peft_adapters.change_tensors(folder, turn)
    return folder


def test_some_matrices_are_square_and_others_are_not(peers):
    for _, adapter in peers.values():
        stacks = stacks_of(adapter)
        pairs = [(t, stacks[key.replace("lora_A", "lora_B")]) for key, t in stacks.items() if "lora_A" in key]
        assert {a.shape[1] == b.shape[0] for a, b in pairs} == {True, False}


@pytest.mark.parametrize(("name", "version", "turned"), CASES)
def test_the_merged_and_the_loaded_model_are_those_of_todays_adapter(name, version, turned, peers, tmp_path):
    base, today = peers[name]
    adapter = written(tmp_path / "adapter", today, version, turned)
    merge(base, [today], tmp_path / "expected")
    merge(base, [adapter], tmp_path / "merged")
    plain, expected, found = (
        (f / "model.safetensors").read_bytes() for f in (base, tmp_path / "expected", tmp_path / "merged")
    )
    assert found == expected != plain
    unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == plain
    logits = []
    for loaded in (today, adapter):
        model = load_model(base, torch.float32, torch.device("cpu"))
        load_adapter(model, read_adapter(loaded))
        with torch.no_grad():
            logits.append(model.network(IDS).logits)
    assert torch.equal(logits[0], logits[1])


def test_the_release_is_part_of_an_adapters_identity_if_matrices_are_square(peers, tmp_path):
    _, today = peers["stacks"]
    old = [written(tmp_path / version, today, version, False) for version in ("0.18.0", "0.18.1", "0.20.0")]
    identities = [adapter_identity(read_adapter(folder)) for folder in (today, *old)]
    assert identities[0] == identities[3] != identities[1] == identities[2]


def test_the_release_is_not_part_of_the_identity_if_shapes_decide(peers, tmp_path):
    """So merges and runs from before releases were distinguished still match their adapter."""
    _, today = peers["stacks"]
    found = set()
    for version in ("0.18.0", "0.20.0"):
        folder = written(tmp_path / version, today, version, False)
        peft_adapters.change_config(folder, target_parameters=["mlp.experts.down_proj"])
        peft_adapters.change_tensors(folder, without_the_square)
        found.add(adapter_identity(read_adapter(folder)))
    assert len(found) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_diff_notes_that_stacks_are_compared_as_stored(turned, peers, tmp_path):
    """It reads no base; if matrices are square, the same numbers may be a different change."""
    _, today = peers["stacks"]
    old, new = (written(tmp_path / version, today, version, turned) for version in ("0.18.1", "0.20.0"))
    assert diff(today, new, threads=1).same != turned
    found = diff(today, old, threads=1)
    assert not found.same
    assert any("are compared as stored" in remark for remark in found.remarks)
    assert not diff(old, old, threads=1).remarks


@pytest.mark.parametrize(("name", "version", "turned"), CASES)
def test_check_reports_stacks_that_the_installed_peft_cannot_load(name, version, turned, peers, tmp_path):
    base, today = peers[name]
    adapter = written(tmp_path / "adapter", today, version, turned)
    found = [finding.found for finding in check(adapter, "peft", base).verdicts[0].findings]
    assert any("stack of experts in the layout of peft" in what for what in found) == turned
    refused = pytest.raises(RuntimeError, match="size mismatch") if turned else nullcontext()
    with peft_adapters.quiet(), refused:
        PeftModel.from_pretrained(peft_adapters.load_float32(base), adapter)


def test_an_adapter_that_fits_in_neither_layout_is_refused(peers, tmp_path):
    base, today = peers["one by one"]
    adapter = written(tmp_path / "adapter", today, "0.18.1", True)
    narrow = {key: t[:, :-1] for key, t in stacks_of(adapter).items() if key.endswith("lora_A.weight")}
    peft_adapters.change_tensors(adapter, lambda tensors: tensors.update(narrow))
    with pytest.raises(BaseMismatchError, match="experts"):
        merge(base, [adapter], tmp_path / "merged")
