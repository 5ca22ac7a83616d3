"""A description says what is in the files."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.encoding import Encoding
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.quantized import encode
from adaptkit.errors import CheckpointError, IntegrityError, UsageError
from adaptkit.operations.inspect import inspect
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize


def test_a_checkpoint(llama, llama_sharded):
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
        assert report.details["quantization"] is None
        assert (report.manifest_sha256, report.tensors_root, report.parents) == (None, None, ())


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_base_counts_the_parameters_of_the_model(llama, tmp_path, double_quant):
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


@pytest.mark.parametrize("format_name", ["nf4", "fp4", "int8"])
def test_weights_of_odd_number_and_mixed_encodings_are_counted(tmp_path, format_name):
    """A byte of 4-bit codes may hold but one."""
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
def test_packed_experts_count_like_plain_ones(tmp_path, fused):
    source = tiny.write_family(tmp_path / "source", "mixtral", fused_experts=fused)
    quantize(source, tmp_path / "out", QuantizeOptions(moe="quantize"))
    report, plain = inspect(tmp_path / "out"), inspect(source)
    assert report.parameters == plain.parameters
    assert report.details["experts"] == plain.details["experts"] == 4
    assert report.details["quantized_stacks"] == (4 if fused else None)


def test_what_another_tools_format_hides_is_not_guessed(tmp_path):
    save_file({"model.layers.0.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    report = inspect(tmp_path)
    assert (report.kind, report.parameters, report.details["quantization"]) == ("quantized", None, "gptq")


def test_an_adapter(adapter, tmp_path, llama):
    report, tensors = inspect(adapter), load_file(adapter / "adapter_model.safetensors")
    assert report.kind == "adapter"
    assert report.tensors == len(tensors)
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.details["modules"] == 14
    assert (report.details["ranks"], report.details["scalings"]) == ([4], [2.0])
    mixed = inspect(tiny.write_peft_adapter(tmp_path / "a", llama, rank_pattern={"q_proj": 2}, lora_alpha=4))
    assert (mixed.details["ranks"], mixed.details["scalings"]) == ([2, 4], [1.0, 2.0])


def test_a_merged_model_names_what_it_was_made_from(llama, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "out", MergeOptions(weights=(0.5,)))
    report = inspect(tmp_path / "out")
    assert report.kind == "merged"
    assert report.parameters == inspect(llama).parameters
    assert [(p["role"], p.get("weight")) for p in report.parents] == [("base", None), ("adapter", 0.5)]


def test_what_it_is_not_is_said(tmp_path, llama, copy_of):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        inspect(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "absent")
    folder = copy_of(llama)
    (folder / "adaptkit-manifest.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"adaptkit-manifest\.json"):
        inspect(folder)
