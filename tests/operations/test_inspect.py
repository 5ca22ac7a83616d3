"""The report of inspect agrees with the files."""

import shutil

import peft_adapters
import pytest
import tiny
import torch
from packing import encode
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.errors import CheckpointError, IntegrityError, UsageError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations.check import check
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.unmerge import unmerge

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = [
    "linear_patterns", "conv1d", "embedding", "dora_embedding", "lora_bias", "biases_all", "saved_norms", "resized",
    "tokens_both", "experts_mixtral", "experts_up_only", "everything",
]  # fmt: skip
"""Adapters that together contain every kind of tensor."""


def test_a_checkpoint_is_described(llama, llama_sharded):
    tensors = load_file(llama / "model.safetensors")
    for folder, files in ((llama, 1), (llama_sharded, 3)):
        report = inspect(folder)
        assert report.kind == "checkpoint"
        assert report.tensors == len(tensors)
        assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert report.dtypes == {"BF16": len(tensors)}
        assert report.details["architecture"] == ["LlamaForCausalLM"]
        assert report.details["files"] == files
        assert (report.details["layers"], report.details["tied_head"]) == (2, True)
        assert report.details["vocabulary"] == tensors["model.embed_tokens.weight"].shape[0]
        assert report.details["quantization"] is None
        assert (report.manifest_sha256, report.tensors_root, report.parents) == (None, None, ())


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_base_has_the_parameter_count_of_the_model(llama, tmp_path, double_quant):
    quantize(llama, tmp_path / "out", QuantizeOptions(block_size=128, double_quant=double_quant))
    report, plain = inspect(tmp_path / "out"), inspect(llama)
    assert report.kind == "quantized"
    assert report.parameters == plain.parameters
    assert report.details["quantized_matrices"] == 14
    assert report.details["block_sizes"] == {"128": 14}
    assert report.details["formats"] == {"nf4": 14}
    assert report.details["constants"] == {"nested" if double_quant else "float32": 14}
    assert report.details["quantization"] == "bitsandbytes"
    assert report.manifest_sha256 == require_manifest(tmp_path / "out").sha256
    assert [parent["role"] for parent in report.parents] == ["base"]
    (tmp_path / "out" / "adaptkit-manifest.json").unlink()
    assert inspect(tmp_path / "out").kind == "quantized"


@pytest.mark.parametrize("format_name", ["nf4", "fp4"])
def test_weights_with_odd_element_counts_and_mixed_encodings_are_counted(tmp_path, format_name):
    """The last byte of 4-bit codes may contain only one."""
    weights = {"model.layers.0.q_proj.weight": torch.randn(33, 65), "model.layers.0.k_proj.weight": torch.randn(8, 64)}
    tensors = {"model.layers.0.norm.weight": torch.ones(65)}
    for (name, weight), block_size in zip(weights.items(), (64, 32), strict=True):
        spec = TensorSpec(name, "F32", tuple(weight.shape))
        tensors |= encode(spec, weight, Encoding(format_name, block_size, double_quant=block_size == 64))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    report = inspect(tmp_path)
    assert (report.kind, report.parameters) == ("quantized", 33 * 65 + 8 * 64 + 65)
    assert report.details["quantized_parameters"] == 33 * 65 + 8 * 64
    assert report.details["block_sizes"] == {"32": 1, "64": 1}
    assert report.details["constants"] == {"float32": 1, "nested": 1}
    assert report.details["formats"] == {format_name: 2}
    inside = report.bytes - 4 * 65
    bits = 8 * inside / report.details["quantized_parameters"]
    assert report.details["bits_per_quantized_parameter"] == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_quantized_experts_are_counted_like_unquantized_ones(tmp_path, fused):
    source = tiny.write_family(tmp_path / "source", "mixtral", fused_experts=fused)
    quantize(source, tmp_path / "out", QuantizeOptions(moe="quantize"))
    report, plain = inspect(tmp_path / "out"), inspect(source)
    assert report.parameters == plain.parameters
    assert report.details["experts"] == plain.details["experts"] == 4
    assert report.details["quantized_stacks"] == (4 if fused else None)


def test_parameters_in_formats_of_other_tools_are_not_counted(tmp_path):
    save_file({"model.layers.0.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    report = inspect(tmp_path)
    assert (report.kind, report.parameters, report.details["quantization"]) == ("quantized", None, "gptq")


def test_an_adapter_is_described(adapter, tmp_path, llama):
    report, tensors = inspect(adapter), load_file(adapter / "adapter_model.safetensors")
    assert report.kind == "adapter"
    assert report.tensors == len(tensors)
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.details["modules"] == 14
    assert (report.details["ranks"], report.details["scalings"]) == ({"4": 14}, {"2.0": 14})
    assert report.details["base_model_name_or_path"] == str(llama)
    assert report.details["targets"] == dict.fromkeys(sorted(PROJECTIONS), 2)
    mixed = inspect(tiny.write_peft_adapter(tmp_path / "a", llama, rank_pattern={"q_proj": 2}, lora_alpha=4))
    assert (mixed.details["ranks"], mixed.details["scalings"]) == ({"2": 2, "4": 12}, {"1.0": 12, "2.0": 2})


def test_of_a_folder_that_also_holds_a_checkpoint_the_report_says_that_only_the_adapter_was_read(
    adapter, llama, copy_of, run_cli
):
    folder = copy_of(llama)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    alone, both, checked = inspect(adapter), inspect(folder), "the checkpoint in the same folder"
    assert both.details == alone.details | {"not_read": checked}
    assert alone.details["not_read"] is None
    assert (both.tensors, both.bytes) == (alone.tensors, alone.bytes)
    assert checked in check(folder).unknown
    assert checked not in check(adapter).unknown
    for command in ("inspect", "check"):
        assert run_cli(command, folder).stdout.count(checked) == 1


@pytest.mark.parametrize(
    ("source", "pickles"),
    [("llama", ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
     ("adapter", ["adapter_model.bin"]), ("adapter", ["pytorch_model.bin"])],
)  # fmt: skip
def test_pickled_weights_that_a_loader_could_take_are_named(source, pickles, copy_of, request):
    folder = copy_of(request.getfixturevalue(source))
    before, known = inspect(folder), check(folder)
    (folder / "training_args.bin").write_bytes(b"")
    assert (inspect(folder), check(folder)) == (before, known)
    for name in pickles:
        (folder / name).write_bytes(b"")
    assert inspect(folder).details == before.details | {"not_read": ", ".join(pickles)}
    said = f"the contents of {', '.join(pickles)}, which other programs may load"
    assert check(folder).unknown == (said, *known.unknown)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_counted(kind, made):
    """Compare with the names of its tensors, by which peft identifies their kinds."""
    case = peft_adapters.make(made, kind)
    report, tensors = inspect(case.adapter), load_file(case.adapter / "adapter_model.safetensors")
    details = report.details

    def having(*endings):
        return [name for name in tensors if name.endswith(endings)]

    halves = having("lora_A.weight", "lora_embedding_A")
    stacked = [name for name in halves if "experts.base_layer.lora_A" in name or "experts.lora_A" in name]
    assert details["modules"] == len(halves) - len(stacked)
    assert details["embeddings"] == (len(having("lora_embedding_A")) or None)
    assert details["dora_magnitudes"] == (len(having("lora_magnitude_vector")) or None)
    assert details["added_biases"] == (len(having("lora_B.bias")) or None)
    assert sum((details["expert_stacks"] or {}).values()) == len(stacked)
    rows = {name: len(tensors[name]) for name in having("trainable_tokens_delta")}
    assert list((details["replaced_rows"] or {}).values()) == list(rows.values())
    assert details["own_copies_of_the_base"] == (len(having("base_layer.weight")) or None)
    rest = [name for name in tensors if not any(part in name for part in ("lora_", "trainable_tokens", "base_layer.w"))]
    assert sum((details["replaced_tensors"] or {}).values()) == len(rest)
    assert details["rslora"] == bool(case.case.lora.get("use_rslora"))
    copies = ("base_layer.weight", *(["embed_tokens.weight", "lm_head.weight"] if kind == "resized" else []))
    assert report.parameters == sum(t.numel() for name, t in tensors.items() if not name.endswith(copies))
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(details["ranks"].values()) == sum(details["scalings"].values())


def test_every_expert_of_a_stack_is_counted(made):
    details = inspect(peft_adapters.make(made, "experts_patterns").adapter).details
    assert details["expert_stacks"] == {"4": 4}
    assert details["ranks"] == {"3": 8, "4": 10}  # two q_proj, and four experts of two stacks in each of two layers
    assert details["targets"] == {"down_proj": 2, "gate_up_proj": 2, "q_proj": 2}


def test_a_merged_model_reports_its_parents_and_undo_record(llama, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "out", MergeOptions(weights=(0.5,)))
    report = inspect(tmp_path / "out")
    assert report.kind == "merged"
    assert report.parameters == inspect(llama).parameters
    assert [(p["role"], p.get("weight")) for p in report.parents] == [("base", None), ("adapter", 0.5)]
    record = [path for path in (tmp_path / "out" / "adaptkit-undo").rglob("*") if path.is_file()]
    assert report.details["undo_record_bytes"] == sum(path.stat().st_size for path in record)
    assert (report.details["merged_adapters"], report.details["changed_tensors"]) == (1, 14)


def test_the_report_predicts_whether_and_how_unmerge_works(llama, adapter, second_adapter, tmp_path):
    """Compare with what unmerge then does."""
    for name, options, given, phrase in (
        ("with", MergeOptions(), [adapter, second_adapter], "exactly; needs 2 merged adapters"),
        ("copies", MergeOptions(embed_adapter=True), [], "exactly; needs nothing else"),
        ("without", MergeOptions(undo=False), [adapter, second_adapter], "no: there is no undo record"),
    ):
        merge(llama, [adapter, second_adapter], tmp_path / name, options)
        details = inspect(tmp_path / name).details
        assert details["unmerge"].startswith(phrase)
        assert details["adapter_copies"] == (2 if name == "copies" else None)
        if phrase.startswith("exactly"):
            assert unmerge(tmp_path / name, given, tmp_path / f"{name}-restored").identical
        else:
            with pytest.raises(IntegrityError, match="no undo record"):
                unmerge(tmp_path / name, given, tmp_path / f"{name}-restored")
    record = next(path for path in (tmp_path / "with" / "adaptkit-undo").rglob("*") if path.is_file())
    record.write_bytes(record.read_bytes()[:-1])
    assert (
        f"no: adaptkit-undo/{record.name} is missing or has the wrong size"
        == inspect(tmp_path / "with").details["unmerge"]
    )
    with pytest.raises(IntegrityError):
        unmerge(tmp_path / "with", [adapter, second_adapter], tmp_path / "x")


def test_folders_without_valid_content_are_errors(tmp_path, llama, copy_of):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        inspect(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "absent")
    folder = copy_of(llama)
    (folder / "adaptkit-manifest.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"adaptkit-manifest\.json"):
        inspect(folder)
