"""Unmerging restores every file of the base byte by byte, for every kind of adapter that can be merged."""

import dataclasses
import json
import shutil

import peft_adapters
import peft_formulas
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors, tree
from peft_adapters import CASES, OF_EVERY_KIND, PREFIX

from adaptkit.errors import BaseMismatchError, IntegrityError
from adaptkit.operations._merge import folding
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify

MANIFEST = "adaptkit-manifest.json"
HALF = ["embedding_tied", "dora", "resized_phi", "tokens_resized_tied", "experts_mixtral"]


@pytest.fixture
def case_of(made):
    def make(name, dtype="bfloat16"):
        return peft_adapters.make(made, name, dtype)

    return make


def options_for(*names, **options):
    untie = {"untie": True} if any(CASES[name].untied for name in names) else {}
    return MergeOptions(**options, **untie)


def files_of(folder):
    """Map the relative path of every file, except adaptkit's own, to its content."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("adaptkit-")}


def assert_same_files(found, base):
    """Check that the files are those of ``base``, and only the manifest is added."""
    ours, theirs = files_of(found), files_of(base)
    assert set(ours) == set(theirs)
    assert [name for name, content in theirs.items() if ours[name] != content] == []
    assert [path.name for path in found.glob("adaptkit-*")] == [MANIFEST]


def assert_comes_back(tmp_path, base, adapters, options):
    merge(base, adapters, tmp_path / "merged", options)
    assert files_of(tmp_path / "merged") != files_of(base)
    report = unmerge(tmp_path / "merged", adapters, tmp_path / "out")
    assert report.identical
    assert_same_files(tmp_path / "out", base)
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", CASES)
def test_the_files_of_the_base_are_restored(tmp_path, case_of, name):
    case = case_of(name)
    assert_comes_back(tmp_path, case.base, [case.adapter], options_for(name))


@pytest.mark.parametrize("name", ["resized", "saved_head_tied", "resized_head_tied", "tokens_both_tied"])
def test_without_an_undo_record_a_model_is_refused(tmp_path, case_of, name):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", dataclasses.replace(options_for(name), undo=False))
    with pytest.raises(IntegrityError, match="no undo record") as caught:
        unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
    assert caught.value.hint == "merge again from the base"


def test_tensors_without_elements_are_restored(tmp_path, llama, adapter):
    base = shutil.copytree(llama, tmp_path / "base")
    with edited_tensors(base / "model.safetensors") as tensors:
        tensors["model.unused.weight"] = torch.zeros(0, 4)
    assert_comes_back(tmp_path, base, [adapter], MergeOptions())


@pytest.mark.parametrize(("before", "after"), [(8192, 8194), (8192, 3 * 8192), (8194, 8192), (8193, 8192 + 8192)])
@pytest.mark.parametrize(
    "name", ["resized", "resized_tied", "resized_embedding", "resized_dora_embedding", "resized_embedding_tied"]
)
def test_vocabularies_are_restored_wherever_the_runs_of_rows_end(tmp_path, name, before, after):
    """Runs of these embeddings have 8192 rows, so that some consist of added rows alone, as in models of real size."""
    case = dataclasses.replace(CASES[name], vocabulary=after, shards=1)
    base = tiny.write_llama(tmp_path / "base", tied=case.tied, layers=1)
    with edited_tensors(base / "model.safetensors") as tensors:
        for tensor in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
            tensors[tensor] = torch.randn(before, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    edit_json(base / "config.json", vocab_size=before)
    adapter = peft_adapters.write_adapter(tmp_path / "adapter", case, base)
    assert_comes_back(tmp_path, base, [adapter], options_for(name))


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_neither_result_depends_on_where_runs_of_rows_end(tmp_path, monkeypatch, case_of, name):
    """Matrices this small are a single run. Here every row is one, and of a vocabulary some are added rows."""
    case, options, pieces = case_of(name), options_for(name), folding.Fold.pieces
    merge(case.base, case.adapter, tmp_path / "usual", options)
    monkeypatch.setattr(folding.Fold, "pieces", lambda fold, run_bytes=0: pieces(fold, 1))
    assert_comes_back(tmp_path, case.base, [case.adapter], options)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "usual")


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float32") for name in OF_EVERY_KIND] + [(name, "float16") for name in HALF]
)
def test_bases_of_other_dtypes_are_restored(tmp_path, case_of, name, dtype):
    case = case_of(name, dtype)
    assert_comes_back(tmp_path, case.base, [case.adapter], options_for(name))


@pytest.mark.parametrize("weight", [0.3, -1.3, 30.0])
@pytest.mark.parametrize(
    "name",
    ["linear", "embedding_tied", "dora", "dora_conv1d", "biases_all", "lora_bias", "saved_mlp", "saved_both_tied",
     "tokens_both_tied", "experts_mixtral", "everything_phi"],
)  # fmt: skip
def test_bases_merged_with_other_weights_are_restored(tmp_path, case_of, name, weight):
    case = case_of(name)
    assert_comes_back(tmp_path, case.base, [case.adapter], options_for(name, weights=(weight,)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "names",
    [("linear_rslora", "dora"), ("dora", "dora_rslora"), ("saved_mlp", "linear_patterns"), ("head", "saved_head"),
     ("tokens_tied", "embedding_tied_ensured"), ("lora_bias", "biases_lora_only"),
     ("experts_mixtral", "experts_up_only"), ("embedding_tied", "saved_head_tied"), ("conv1d", "tokens_conv1d")],
    ids="+".join,
)  # fmt: skip
def test_two_adapters_are_unmerged_together(tmp_path, case_of, names, dtype):
    base = case_of(names[0], dtype).base
    adapters = [case_of(name, dtype).adapter for name in names]
    assert_comes_back(tmp_path, base, adapters, options_for(*names, weights=(0.7, 0.3)))


@pytest.mark.parametrize("name", ["saved_both_tied", "resized_embedding", "dora", "tokens_tied", "experts_qwen2"])
def test_signed_zeros_and_extremes_of_changed_tensors_are_restored(tmp_path, case_of, name):
    case = case_of(name)
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    changed = peft_formulas.judge(case.base, case.adapter, name).changes
    top = float(torch.finfo(torch.bfloat16).max) / 64
    for path in base.glob("model*.safetensors"):
        with edited_tensors(path) as tensors:
            for key in set(changed) & set(tensors):
                tensors[key].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, top, -top]).bfloat16()
    assert_comes_back(tmp_path, base, [case.adapter], options_for(name))


@pytest.mark.parametrize("name", ["everything_qwen2_moe", "resized_embedding_tied", "tokens_both_tied"])
def test_threads_do_not_change_the_bytes(tmp_path, case_of, name):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name))
    for threads in (1, 3):
        unmerge(tmp_path / "merged", [case.adapter], tmp_path / str(threads), threads=threads)
        assert_same_files(tmp_path / str(threads), case.base)


def test_the_bases_tokenizer_is_restored(tmp_path, case_of, copy_of):
    import tiny

    case = case_of("resized_tied")
    adapter = copy_of(case.adapter)
    tokenizer = tiny.write_tokenizer(adapter)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    (adapter / "added_tokens.json").write_text("{}")  # which the base does not have
    merge(case.base, [adapter], tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    unmerge(tmp_path / "merged", [adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", case.base)


STEPS = [
    ("resized", "linear"),
    ("resized_embedding_tied", "saved_norms"),
    ("embedding_tied", "tokens_tied"),
    ("tokens_tied", "tokens_both_tied"),
    ("dora", "saved_mlp"),
    ("saved_both", "tokens_both"),
    ("experts_mixtral", "router_saved"),
    ("biases_all", "everything_phi"),
]


@pytest.mark.parametrize("names", STEPS, ids=" then ".join)
def test_merges_of_merges_are_unmerged_in_reverse_order_from_the_last_alone(tmp_path, case_of, names):
    first, second = (case_of(name) for name in names)
    base = tmp_path / "base"
    shutil.copytree(first.base, base)
    merge(base, [first.adapter], tmp_path / "once", options_for(names[0]))
    base.rename(tmp_path / "gone")
    merge(tmp_path / "once", [second.adapter], tmp_path / "twice", options_for(names[1]))
    (tmp_path / "once").rename(tmp_path / "gone too")
    with pytest.raises((BaseMismatchError, IntegrityError)):
        unmerge(tmp_path / "twice", [first.adapter], tmp_path / "wrong")
    assert not list(tmp_path.glob("wrong*"))
    unmerge(tmp_path / "twice", [second.adapter], tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "gone too")
    unmerge(tmp_path / "back", [first.adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "gone")


# Bases that cannot be restored


def flip(folder, name, byte=3):
    """Change a bit in the middle of a tensor of a checkpoint."""
    for path in folder.glob("model*.safetensors"):
        content = bytearray(path.read_bytes())
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        if name in header:
            begin, end = header[name]["data_offsets"]
            content[8 + size + begin + (end - begin) // 2 + byte] ^= 16
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("resized", "lm_head.weight"),
        ("saved_embedding_tied", "lm_head.weight"),  # which the base does not have
        ("saved_mlp", "model.layers.0.mlp.up_proj.weight"),
        ("tokens_tied", "model.embed_tokens.weight"),
        ("dora", "model.layers.1.mlp.down_proj.weight"),
        ("biases_all", "lm_head.bias"),
        ("experts_mixtral", "model.layers.0.block_sparse_moe.experts.3.w3.weight"),
        ("experts_mixtral_fused", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_a_tensor_with_one_changed_bit_is_named(tmp_path, case_of, name, tensor):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name))
    flip(tmp_path / "merged", tensor)
    with pytest.raises(IntegrityError, match=tensor.replace(".", r"\.")):
        unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["resized", "saved_both_tied", "tokens_tied", "dora", "biases_all", "experts_mixtral"])
def test_changes_to_any_part_of_the_undo_record_are_detected(tmp_path, case_of, name):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name))
    records = sorted((tmp_path / "merged").rglob("*undo*/*.safetensors"))
    assert records
    for path in records:
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        for where in (size, (size + len(content)) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[where] ^= 16
            path.write_bytes(changed)
            with pytest.raises(IntegrityError):
                unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
            assert not (tmp_path / "out").exists()
        path.unlink()
        with pytest.raises(IntegrityError, match=r"undo"):
            unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
        path.write_bytes(content)
    unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", case.base)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("saved_both", "lm_head.weight"),
        ("resized", "model.embed_tokens.weight"),
        ("tokens", "model.embed_tokens.token_adapter.trainable_tokens_delta"),
        ("dora", "model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ("lora_bias", "model.layers.0.self_attn.q_proj.lora_B.bias"),
        ("experts_mixtral", "model.layers.0.mlp.experts.base_layer.lora_B.weight"),
        ("embedding", "model.embed_tokens.lora_embedding_B"),
    ],
)
def test_a_different_adapter_of_the_same_shape_is_refused(tmp_path, case_of, copy_of, name, key):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name))
    other = copy_of(case.adapter)
    peft_adapters.change_tensors(other, lambda tensors: tensors[PREFIX + key].mul_(1.5))
    with pytest.raises((BaseMismatchError, IntegrityError)):
        unmerge(tmp_path / "merged", [other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dora", {"lora_alpha": 5}),
        ("tokens", {"trainable_token_indices": [7, 2, 41]}),
        ("lora_bias", {"use_rslora": True}),
        ("experts_patterns", {"alpha_pattern": {}}),
        ("embedding", {"lora_alpha": 1}),
    ],
)
def test_the_same_tensors_with_a_different_configuration_are_refused(tmp_path, case_of, copy_of, name, changes):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name))
    other = copy_of(case.adapter)
    peft_adapters.change_config(other, **changes)
    with pytest.raises((BaseMismatchError, IntegrityError)):
        unmerge(tmp_path / "merged", [other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["saved_mlp", "resized", "tokens", "dora", "experts_mixtral", "biases_lora_only"])
def test_a_merge_without_an_undo_record_is_refused(tmp_path, case_of, name):
    case = case_of(name)
    merge(case.base, [case.adapter], tmp_path / "merged", options_for(name, undo=False))
    with pytest.raises(IntegrityError, match="undo record"):
        unmerge(tmp_path / "merged", [case.adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_restores_the_base(tmp_path, case_of, run_cli):
    case = case_of("resized_embedding_tied")
    merged = run_cli("merge", case.base, case.adapter, "-o", tmp_path / "merged", "--untie")
    assert merged.code == 0, merged.stderr
    done = run_cli("unmerge", tmp_path / "merged", "--adapter", case.adapter, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert_same_files(tmp_path / "out", case.base)
