"""adopt copies another tool's artifact byte for byte, with a manifest that records its kind and its base."""

import json
import shutil
from dataclasses import replace

import peft_adapters
import pytest
import tiny
import torch
import xxhash
from folders import edited_tensors, tree
from huggingface_hub import ModelCard, ModelCardData
from peft_adapters import OF_EVERY_KIND
from safetensors import safe_open
from safetensors.torch import load_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.errors import (
    AdapterError,
    BaseMismatchError,
    CheckpointError,
    IntegrityError,
    OutputExistsError,
    UsageError,
)
from adaptkit.operations.adopt import adopt
from adaptkit.operations.inspect import trace
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import VerifyOptions, verify
from adaptkit.training.config import TrainConfig
from adaptkit.training.network.start import read_start

WEIGHTS = "adapter_model.safetensors"


def raw(folder):
    """Map the names of a checkpoint's tensors to their bytes."""
    tensors = {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def with_a_change(base, folder, name):
    """Copy a checkpoint and change one number of a tensor."""
    shutil.copytree(base, folder)
    (path,) = (path for path in folder.glob("model*.safetensors") if name in load_file(path))
    with edited_tensors(path) as tensors:
        tensors[name].view(-1)[0] += 1
    return folder


def test_an_adapter_is_copied_and_can_be_verified(tmp_path, adapter):
    before = tree(adapter)
    report = adopt(adapter, tmp_path / "out")
    made = tree(tmp_path / "out")
    manifest = made.pop(MANIFEST_NAME)
    assert made == before == tree(adapter)
    assert report.files == tuple(sorted(before))
    assert (report.kind, report.not_copied, report.base, report.base_fingerprints) == ("adapter", (), None, 0)
    assert report.bytes == sum(map(len, before.values()))
    found = verify(tmp_path / "out", VerifyOptions(manifest_sha256=report.manifest_sha256))
    assert found.kind == "adapter"
    document = json.loads(manifest)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        assert report.tensors == len(document["tensors"]) == len(file.keys())
        for tensor in document["tensors"]:
            content = file.get_tensor(tensor["name"]).contiguous().view(torch.uint8).numpy().tobytes()
            assert xxhash.xxh3_128_hexdigest(content) == tensor["xxh3_128"]
    assert (document["parents"], document["targets"]) == ([], [])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_copied_and_can_be_verified(tmp_path, shards):
    base = tiny.write_llama(tmp_path / "base", shards=shards)
    before = tree(base)
    report = adopt(base, tmp_path / "out")
    made = tree(tmp_path / "out")
    del made[MANIFEST_NAME]
    assert made == before == tree(base)
    assert (report.kind, report.not_copied) == ("checkpoint", ())
    assert verify(tmp_path / "out").kind == "checkpoint"
    found = {tensor.name: tensor.xxh3_128 for tensor in require_manifest(tmp_path / "out").tensors}
    assert found == {name: xxhash.xxh3_128_hexdigest(content) for name, content in raw(base).items()}


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_the_manifest_has_fingerprints_of_all_base_tensors_that_a_merge_changes(tmp_path, made, name):
    case, seen = peft_adapters.make(made, name), []
    report = adopt(case.adapter, tmp_path / "ours", base=case.base, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert {*seen[-1]} == {total for _, total in seen} == {sum(map(len, raw(case.base).values())) + report.bytes}
    targets = require_manifest(tmp_path / "ours").targets
    base = raw(case.base)
    named = {t.module if t.module in base else f"{t.module}.weight": t.base_xxh3_128 for t in targets}
    assert named == {name: xxhash.xxh3_128_hexdigest(base[name]) for name in named}
    assert report.base_fingerprints == len(targets)
    merged = merge(case.base, [tmp_path / "ours"], tmp_path / "merged", MergeOptions(untie=True))
    after = raw(tmp_path / "merged")
    assert {name for name in base if after[name] != base[name]} <= set(named)
    assert merged.base_verified
    assert merged.same_base
    merge(case.base, [case.adapter], tmp_path / "theirs", MergeOptions(untie=True, undo=False))
    assert raw(tmp_path / "theirs") == after


def test_a_different_base_is_rejected_only_if_the_adapter_records_its_base(tmp_path, llama, adapter):
    adopt(adapter, tmp_path / "ours", base=llama)
    found = verify(tmp_path / "ours", VerifyOptions(parents=(llama,)))
    assert [parent.path for parent in found.parents] == [str(llama)]
    changed = "model.layers.1.self_attn.k_proj.weight"
    other = with_a_change(llama, tmp_path / "other", changed)
    assert trace(tmp_path / "ours", other)[0].path is None
    with pytest.raises(BaseMismatchError, match=changed):
        merge(other, [tmp_path / "ours"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(other, [adapter], tmp_path / "out")  # this one does not record its base
    adopted = adopt(llama, tmp_path / "base")
    adopt(adapter, tmp_path / "of it", base=tmp_path / "base")
    (parent,) = require_manifest(tmp_path / "of it").parents
    assert (parent.role, parent.manifest_sha256) == ("base", adopted.manifest_sha256)


def test_other_files_of_a_training_run_are_listed_and_not_copied(tmp_path, adapter):
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "generation_config.json"):
        (source / name).write_bytes(b"{}")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / WEIGHTS).write_bytes(b"")
    ModelCard.from_template(ModelCardData(base_model="x")).save(source / "README.md")  # as peft writes it
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text("{}")
    report = adopt(source, tmp_path / "out")
    assert report.files == ("LICENSE", "adapter_config.json", WEIGHTS, "chat_template.jinja", "tokenizer.json")
    assert report.not_copied == (
        "README.md", "checkpoint-5/", "generation_config.json", "optimizer.pt", "trainer_state.json",
        "training_args.bin",
    )  # fmt: skip
    assert set(tree(tmp_path / "out")) == {*report.files, MANIFEST_NAME}
    for missing in (0, 3):  # a card that is mostly filled in
        (source / "README.md").write_text("# Answers about whales\n" + "[More Information Needed]\n" * missing)
        assert "README.md" in adopt(source, tmp_path / str(missing)).files


def test_what_an_adapter_began_with_is_copied_with_it(tmp_path, llama, adapter):
    """As in a copy, without its manifest, of one that was trained from a companion: a merge subtracts it."""
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(adapter, source)
    terms = {name: replace(term, scaling=term.scaling / 2) for name, term in read_adapter(adapter).modules.items()}
    with Output(other, []) as out:
        write_compensation(out, terms)
        shutil.copy(out.folder / COMPENSATION_NAME, source)
    report = adopt(source, tmp_path / "ours")
    assert COMPENSATION_NAME in report.files
    for name in (adapter, source, tmp_path / "ours"):
        merge(llama, [name], tmp_path / f"merged-{name.name}")
    assert raw(tmp_path / "merged-ours") == raw(tmp_path / "merged-source") != raw(tmp_path / "merged-adapter")


def companion(adapter, folder):
    """Copy an adapter, with what it adds as its own initial value."""
    shutil.copytree(adapter, folder)
    with Output(folder.with_name("begun"), []) as out:
        write_compensation(out, read_adapter(adapter).modules)
        shutil.copy(out.folder / COMPENSATION_NAME, folder)
    return folder


def test_an_adapter_that_compensates_for_quantization_is_bound_to_its_quantized_base(tmp_path, llama, adapter, gpt2):
    """And through it to the 16-bit one; without --base, or with another one, training from it is refused."""
    source, other = companion(adapter, tmp_path / "source"), with_a_change(llama, tmp_path / "x", "model.norm.weight")
    quantize(llama, tmp_path / "nf4")
    quantize(llama, tmp_path / "fp4", QuantizeOptions(format="fp4"))
    quantize(tiny.write_llama(tmp_path / "wide", hidden=128), tmp_path / "wide-nf4")  # the same names, other shapes
    for wrong in (llama, other, tmp_path / "wide-nf4"):
        with pytest.raises(BaseMismatchError, match="compensates for the error of another base") as caught:
            adopt(source, tmp_path / "out", base=wrong)
        assert "quantize" in caught.value.hint
    report = adopt(source, tmp_path / "ours", base=tmp_path / "nf4")
    assert report.base_fingerprints == len(read_adapter(adapter).modules)
    verify(tmp_path / "ours", VerifyOptions(parents=(tmp_path, llama)))
    adopt(source, tmp_path / "unbound")

    def start(base, init):
        return read_start(TrainConfig(str(base), ("rows.jsonl",), init=str(init)), require_manifest(base))

    assert start(tmp_path / "nf4", tmp_path / "ours").compensation
    for base, init in ((tmp_path / "fp4", "ours"), (tmp_path / "nf4", "unbound")):
        with pytest.raises(BaseMismatchError):
            start(base, tmp_path / init)
    quantize(gpt2, tmp_path / "gpt2-nf4")  # whose weights are stored as (in, out)
    of_gpt2 = companion(tiny.write_peft_adapter(tmp_path / "a", gpt2), tmp_path / "of gpt2")
    assert adopt(of_gpt2, tmp_path / "gpt2-ours", base=tmp_path / "gpt2-nf4").base_fingerprints == 8


@pytest.mark.parametrize("name", ["adapter_config.json", "chat_template.jinja", "README.md", WEIGHTS])
def test_a_source_that_changes_while_it_is_copied_is_refused(tmp_path, adapter, name):
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    for made in ("chat_template.jinja", "README.md"):
        (source / made).write_text("as it was")

    def change(done, total):
        (source / name).write_bytes((source / name).read_bytes() + b" ")

    with pytest.raises(IntegrityError, match=f"{name} changed while it was read"):
        adopt(source, tmp_path / "out", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_input_is_refused_and_nothing_written(tmp_path, llama, gpt2, adapter):
    work = tmp_path / "work"
    work.mkdir()
    adopt(adapter, work / "ours")
    quantize(llama, work / "nf4")
    shutil.copytree(adapter, work / "pickled")
    (work / "pickled" / WEIGHTS).rename(work / "pickled" / "adapter_model.bin")
    shutil.copytree(adapter, work / "cased")
    for name in ("tokenizer.json", "Tokenizer.json"):
        (work / "cased" / name).write_text("{}")
    before = tree(work)
    for source, base, kind, words in (
        (work / "ours", None, UsageError, "already has a manifest, made by adopt"),
        (llama, llama, UsageError, "applies only to adapters"),
        (work / "nf4", None, UsageError, "already has a manifest, made by quantize"),
        (adapter, work / "nf4", CheckpointError, "is quantized with"),
        (adapter, gpt2, BaseMismatchError, "adapter"),
        (adapter, adapter, CheckpointError, "not a checkpoint"),
        (work / "pickled", None, AdapterError, "pickle"),
        (work / "nothing", None, UsageError, "does not exist"),
        (work / "cased", None, CheckpointError, "differ only in case"),
    ):
        with pytest.raises(kind, match=words):
            adopt(source, work / "out", base=base)
    with pytest.raises(OutputExistsError):
        adopt(adapter, work / "ours")
    shutil.copytree(llama, work / "base")
    before = tree(work)
    for source, base in ((work / "base", None), (adapter, work / "base")):
        with pytest.raises(UsageError, match="would change its own input"):
            adopt(source, work / "base" / "out", base=base)
    assert tree(work) == before


def test_a_copy_of_a_base_tensor_in_the_adapter_must_equal_the_bases(tmp_path, made):
    """With ``save_embedding_layers``, peft saves the base's tensors of adapted embeddings, too."""
    case = peft_adapters.make(made, "embedding")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(case.adapter / WEIGHTS)
    other = with_a_change(case.base, tmp_path / "other", "model.embed_tokens.weight")
    with pytest.raises(BaseMismatchError, match="own copy") as caught:
        adopt(case.adapter, tmp_path / "out", base=other)
    assert "--allow-base-mismatch" not in caught.value.hint
    assert "--base" in caught.value.hint
