"""Comparing checkpoints: figures of tensors, when manifests are trusted, and all other files."""

import dataclasses
import json
import math

import pytest
import torch
from folders import changes_of, edit_json, edit_manifest, rewritten
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations.diff import diff
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize

MODEL = "model.safetensors"


def perturbed(weights, scale=0.02, seed=0):
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
    return (weights.float() * (1 + scale * noise)).to(weights.dtype)


@pytest.fixture
def tuned(llama, copy_of):
    """A copy with a low-rank change, a change of full rank, a changed norm, and one element changed by a bit."""

    def change(tensors):
        generator = torch.Generator().manual_seed(1)
        name = "model.layers.0.mlp.up_proj.weight"
        b, a = torch.randn(128, 3, generator=generator), torch.randn(3, 64, generator=generator)
        tensors[name] = (tensors[name].float() + 0.01 * b @ a).to(torch.bfloat16)
        tensors["model.layers.1.mlp.down_proj.weight"] = perturbed(tensors["model.layers.1.mlp.down_proj.weight"])
        tensors["model.norm.weight"] = perturbed(tensors["model.norm.weight"])
        tensors["model.layers.0.self_attn.k_proj.weight"].view(torch.int16)[3, 4] += 1

    return rewritten(copy_of(llama, "tuned"), change)


def test_figures_equal_those_computed_from_the_tensors(llama, tuned):
    report = diff(llama, tuned)
    one, two = load_file(llama / MODEL), load_file(tuned / MODEL)
    unlike = {name for name in one if not torch.equal(one[name], two[name])}
    assert len(unlike) == 4
    assert {t.name for t in report.tensors} == unlike
    assert (report.same, report.equal, report.only_in_first, report.only_in_second) == (False, len(one) - 4, (), ())
    assert report.equal_bytes == sum(t.nbytes for name, t in one.items() if name not in unlike)
    for found in report.tensors:
        x, y = one[found.name].double(), two[found.name].double()
        assert found.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-12)
        assert found.difference == pytest.approx(float((x - y).norm()), rel=1e-12)
        assert found.relative == pytest.approx(found.difference / max(found.norms), rel=1e-12)
        assert (found.changed, found.compared) == (int((x != y).sum()), x.numel())
        assert (found.change is None) == (x.dim() != 2)
        if found.change:
            sigma = torch.linalg.svdvals(x - y)
            assert found.change.sigma == pytest.approx(sigma[:64].tolist(), abs=1e-6 * float(sigma[0]))
            for rank, energy in found.change.energy.items():
                assert energy == pytest.approx(
                    float(sigma[: int(rank)].square().sum() / sigma.square().sum()), abs=1e-9
                )
            shares = sigma[sigma > 0] / sigma.sum()
            assert found.change.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2))
            assert found.change.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)
    x, y = (torch.cat([t[n].double().reshape(-1) for n in sorted(unlike)]) for t in (one, two))
    assert report.relative == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-12)
    squares = [torch.linalg.svdvals(one[n].double() - two[n].double()).square() for n in unlike if one[n].dim() == 2]
    total = sum(float(square.sum()) for square in squares)
    for rank, energy in report.energy.items():
        assert energy == pytest.approx(sum(float(square[: int(rank)].sum()) for square in squares) / total, abs=1e-9)
    relative = [t.relative for t in report.tensors]
    assert relative == sorted(relative, reverse=True)
    low_rank = next(t for t in report.tensors if "up_proj" in t.name)
    full_rank = next(t for t in report.tensors if "down_proj" in t.name)
    assert low_rank.change.energy["8"] > 0.99 > full_rank.change.energy["16"]


def test_estimated_spectra_of_large_changes_are_close_lower_bounds(tmp_path, llama, copy_of):
    """A matrix wider and longer than the sketch, read in several pieces, is compared with a dense decomposition."""
    generator = torch.Generator().manual_seed(0)
    out, into = 1500, 1100
    base = torch.randn(out, into, generator=generator)
    change = torch.randn(out, 12, generator=generator) @ torch.randn(12, into, generator=generator) * 0.05
    change += torch.randn(out, into, generator=generator) * 0.01
    folders = []
    for name, weight in (("one", base), ("two", base + change)):
        folders.append(copy_of(llama, name))
        save_file({"model.layers.0.mlp.up_proj.weight": weight}, folders[-1] / MODEL)
    (found,) = diff(*folders).tensors
    one, two = (load_file(folder / MODEL)["model.layers.0.mlp.up_proj.weight"].double() for folder in folders)
    sigma = torch.linalg.svdvals(one - two)
    assert found.difference == pytest.approx(float((one - two).norm()), rel=1e-12)
    assert found.change.sigma[:12] == pytest.approx(sigma[:12].tolist(), rel=1e-6)
    assert all(mine <= theirs * (1 + 1e-9) for mine, theirs in zip(found.change.sigma, sigma.tolist(), strict=False))
    for rank, energy in found.change.energy.items():
        exact = float(sigma[: int(rank)].square().sum() / sigma.square().sum())
        assert exact - 0.02 < energy <= exact + 1e-9
    shares = sigma / sigma.sum()
    exact = float((-(shares * shares.log()).sum()).exp())
    assert exact < found.change.effective_rank < 1.25 * exact
    assert found.change.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-6)


def test_a_checkpoint_is_the_same_in_different_shards(llama, llama_sharded):
    report = diff(llama, llama_sharded)
    assert report.same
    assert report.fingerprints == ("computed", "computed")
    assert report.tensors_roots[0] == report.tensors_roots[1]


def test_missing_tensors_different_dtypes_and_different_shapes_are_reported(llama, copy_of):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["new.weight"] = torch.ones(3)
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].float()
        tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].T
        embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:2]])

    other = rewritten(copy_of(llama), change)
    report = diff(llama, other)
    assert (report.only_in_first, report.only_in_second) == (("model.norm.weight",), ("new.weight",))
    found = {t.name: t for t in report.tensors}
    assert len(found) == 3
    typed = found["model.layers.0.mlp.up_proj.weight"]
    assert (typed.dtypes, typed.relative, typed.changed, typed.change) == (("BF16", "F32"), 0, 0, None)
    turned = found["model.layers.0.mlp.gate_proj.weight"]
    assert (turned.shapes, turned.relative, turned.remark) == (((128, 64), (64, 128)), None, "shapes differ")
    resized = found["model.embed_tokens.weight"]
    rows = load_file(llama / MODEL)["model.embed_tokens.weight"].shape[0]
    assert (resized.relative, resized.remark) == (0, f"first {rows:,} rows of each compared")
    turned_round = {t.name: t for t in diff(other, llama).tensors}["model.embed_tokens.weight"]
    assert (turned_round.compared, turned_round.remark) == (resized.compared, resized.remark)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensors_that_are_not_finite_get_a_remark_and_come_first(bad, llama, tuned):
    rewritten(tuned, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].view(-1)[5].fill_(bad))
    report = diff(llama, tuned)
    found = report.tensors[0]
    assert found.name == "model.layers.1.self_attn.v_proj.weight"
    assert (found.norms, found.difference, found.relative, found.change) == (None, None, None, None)
    assert (found.changed, "NaN, infinite" in found.remark) == (1, True)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_quantized_checkpoints_are_compared_as_they_are_stored(llama, llama_nf4, tmp_path):
    quantize(llama, tmp_path / "blocks", QuantizeOptions(block_size=128))
    report = diff(llama_nf4, tmp_path / "blocks")
    assert report.quantizations == ("bitsandbytes", "bitsandbytes")
    codes = [t for t in report.tensors if t.dtypes == ("U8", "U8") and t.compared]
    assert codes
    assert all(t.norms is None and t.change is None for t in codes)
    assert all(0 < t.changed <= t.compared for t in codes)
    against = diff(llama_nf4, llama)
    assert against.quantizations == ("bitsandbytes", None)
    assert any(v.key.startswith("quantization_config") for v in against.config)
    assert any(t.dtypes == ("U8", "BF16") for t in against.tensors)
    assert any("quant_state" in name for name in against.only_in_first)


def test_fingerprints_come_from_manifests_unless_these_cannot_be_right(llama_nf4, copy_of):
    one, two = copy_of(llama_nf4, "one"), copy_of(llama_nf4, "two")
    report = diff(one, two)
    assert report.same
    assert report.fingerprints == ("manifest", "manifest")
    assert report.manifests[0] == report.manifests[1] is not None
    names = [name for name in load_file(two / MODEL) if name.endswith("up_proj.weight")]
    with (two / MODEL).open("r+b") as file:  # flip one bit of a tensor in place
        position = Checkpoint(two).tensors[names[0]].position
        file.seek(position)
        code = file.read(1)[0]
        file.seek(position)
        file.write(bytes([code ^ 1]))
    believed = diff(one, two)
    assert (believed.same, believed.fingerprints[1]) == (True, "manifest"), "nothing was read, and it says so"
    read = diff(one, two, recompute=True)
    assert read.fingerprints == ("computed", "computed")
    assert [(t.name, t.changed) for t in read.tensors] == [(names[0], 1)]
    rewritten(two, lambda tensors: tensors.pop(names[1]))
    disbelieved = diff(one, two)
    assert disbelieved.fingerprints == ("manifest", "computed")
    assert "its manifest is ignored" in disbelieved.remarks[0]
    assert (disbelieved.only_in_first, len(disbelieved.tensors)) == ((names[1],), 1)


def test_a_manifest_whose_tensors_differ_from_the_headers_is_ignored(llama_nf4, copy_of):
    folder = copy_of(llama_nf4)
    manifest = read_manifest(folder)
    edit_manifest(folder, tensors=manifest.tensors[1:])
    report = diff(llama_nf4, folder)
    assert report.fingerprints == ("manifest", "computed")
    assert manifest.tensors[0].name in report.remarks[0]
    assert report.same


def test_a_manifest_whose_file_sizes_differ_is_ignored(llama_nf4, copy_of):
    folder = copy_of(llama_nf4)
    save_file(load_file(folder / MODEL), folder / MODEL, {"format": "pt", "more": "metadata"})
    report = diff(llama_nf4, folder)
    assert report.fingerprints == ("manifest", "computed")
    assert f"{MODEL} has a different size" in report.remarks[0]
    assert report.same


def test_a_merged_checkpoint_differs_from_its_base_by_the_adapter(llama, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "merged")
    report = diff(llama, tmp_path / "merged")
    changes = changes_of(adapter)
    assert {t.name.removesuffix(".weight") for t in report.tensors} == set(changes)
    for found in report.tensors:
        change = changes[found.name.removesuffix(".weight")]
        assert found.difference == pytest.approx(float(change.norm()), rel=0.05), "but for rounding to bfloat16"
        assert found.change.energy["8"] > 0.9
    assert [(f.file, f.sha256[0]) for f in report.beside.files] == [("adaptkit-undo/", None)]
    merge(llama, [adapter], tmp_path / "again")
    assert diff(tmp_path / "merged", tmp_path / "again").same
    record = max((tmp_path / "again" / "adaptkit-undo").rglob("*.safetensors"))
    record.write_bytes(record.read_bytes() + b" ")
    assert [f.file for f in diff(tmp_path / "merged", tmp_path / "again").beside.files] == ["adaptkit-undo/"]


def test_configuration_is_compared_key_by_key(llama, copy_of):
    folder = copy_of(llama)
    edit_json(folder / "config.json", rope_theta=5e5, extra={"deep": {"er": [1, 2]}, "none": None})
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    assert not diff(llama, folder).same
    edit_json(folder / "generation_config.json", temperature=0.5)
    report = diff(llama, folder)
    assert not report.tensors
    assert {v.key: (v.first, v.second) for v in report.config} == {
        "extra.deep.er": (None, "[1, 2]"),
        "extra.none": (None, "null"),
        "hidden_act": ('"silu"', None),
        "rope_theta": (None, "500000.0"),
    }
    assert [(v.file, v.key, v.second) for v in report.beside.values] == [
        ("generation_config.json", "temperature", "0.5")
    ]


def test_json_formatting_and_key_order_do_not_matter(llama, copy_of):
    folder = copy_of(llama)
    for file in folder.glob("*.json"):
        value = json.loads(file.read_text())
        file.write_text(json.dumps(dict(reversed(value.items())), indent=9))
    assert diff(llama, folder).same


def test_differences_in_added_tokens_vocabulary_and_merges_are_described(llama, copy_of):
    folder = copy_of(llama)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append({"id": 999, "content": "<|tool|>", "special": True})
    tokenizer["added_tokens"][0]["special"] = False
    tokenizer["model"]["vocab"]["zzz"] = 1000
    tokenizer["model"]["merges"][3:5] = tokenizer["model"]["merges"][4:2:-1]
    tokenizer["truncation"] = {"max_length": 5}
    file.write_text(json.dumps(tokenizer))
    report = diff(llama, folder)
    found = {v.key: (v.first, v.second) for v in report.beside.values}
    assert not report.same
    assert found["added token '<|tool|>'"][0] is None
    assert '"special": false' in found["added token '<|endoftext|>'"][1]
    count = len(tokenizer["model"]["vocab"])
    assert found["model.vocab"] == (
        f"{count - 1} entries, 0 of them only here",
        f"{count} entries, 1 of them only here",
    )
    assert all("entry 3 is" in side for side in found["model.merges"]), "the same ones in another order"
    assert found["truncation.max_length"] == (None, "5")
    assert found["truncation"] == ("null", None)


TEMPLATE = "{{ messages }}"


def moved(folder):
    """Move the chat template from its own file into the tokenizer's configuration."""
    template = (folder / "chat_template.jinja").read_text()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").unlink()


def test_chat_templates_are_compared_wherever_they_are_stored(llama, copy_of):
    folder = copy_of(llama)
    moved(folder)
    assert diff(llama, folder).same, "it is another place alone"
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    report = diff(llama, folder)
    (found,) = report.beside.templates
    assert (report.same, found.name) == (False, "default")
    assert found.files == ("chat_template.jinja", "tokenizer_config.json")
    assert f"+{TEMPLATE}" in found.lines
    assert not report.beside.values


def test_named_chat_templates_are_compared_across_files(llama, copy_of):
    one, two = copy_of(llama, "one"), copy_of(llama, "two")
    (one / "additional_chat_templates").mkdir()
    (one / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATE)
    moved(two)
    default = (one / "chat_template.jinja").read_text()
    named = [{"name": "default", "template": default}, {"name": "tools", "template": TEMPLATE}]
    edit_json(two / "tokenizer_config.json", chat_template=named)
    assert diff(one, two).same
    edit_json(two / "tokenizer_config.json", chat_template=named[:1])
    (found,) = diff(one, two).beside.templates
    assert (found.name, found.files) == ("tools", ("additional_chat_templates/tools.jinja", None))
    assert f"-{TEMPLATE}" in found.lines


def test_other_files_are_compared_by_hash(llama, copy_of):
    one, two = copy_of(llama, "one"), copy_of(llama, "two")
    (one / "merges.txt").write_text("a b")
    (two / "merges.txt").write_text("a c")
    (one / "vocab.model").write_bytes(b"\x00")
    (two / "list.json").write_text("[1]")
    (one / "broken.json").write_text("{")
    (two / "broken.json").write_text("{ ")
    report = diff(one, two)
    found = {f.file: [digest is not None for digest in f.sha256] for f in report.beside.files}
    assert found == {
        "merges.txt": [True, True], "vocab.model": [True, False], "list.json": [False, True],
        "broken.json": [True, True],
    }  # fmt: skip
    assert not report.same
