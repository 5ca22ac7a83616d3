"""Quantization is recognized by a checkpoint's configuration, or else by its tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdaptkitError
from adaptkit.operations.check import check
from adaptkit.operations.dequantize import dequantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.network.start import resolve_method

LINEAR = "model.layers.0.mlp.up_proj"
BYTES, FLOATS = torch.ones(64, 8, dtype=torch.uint8), torch.ones(64)
MADE = {
    "GPTQ": {f"{LINEAR}.{part}": BYTES.int() for part in ("qweight", "qzeros", "g_idx")} | {f"{LINEAR}.scales": FLOATS},
    "GPTQ or AWQ": {f"{LINEAR}.{part}": BYTES.int() for part in ("qweight", "qzeros")} | {f"{LINEAR}.scales": FLOATS},
    "bitsandbytes (LLM.int8())": {f"{LINEAR}.weight": BYTES.to(torch.int8), f"{LINEAR}.SCB": FLOATS},
    "fp8": {f"{LINEAR}.weight": FLOATS.to(torch.float8_e4m3fn), f"{LINEAR}.weight_scale_inv": FLOATS},
    "fp8, in E5M2": {f"{LINEAR}.weight": FLOATS.to(torch.float8_e5m2)},
    "compressed-tensors": {f"{LINEAR}.weight_packed": BYTES.int(), f"{LINEAR}.weight_scale": FLOATS},
    "AQLM": {f"{LINEAR}.codes": BYTES.to(torch.int8), f"{LINEAR}.codebooks": FLOATS, f"{LINEAR}.scales": FLOATS},
    "BitNet": {f"{LINEAR}.weight": BYTES, f"{LINEAR}.weight_scale": FLOATS},
    "BitNet, beside a plain weight with a scale": {
        "a.weight": FLOATS, "a.weight_scale": FLOATS, f"{LINEAR}.weight": BYTES, f"{LINEAR}.weight_scale": FLOATS,
    },
    "HQQ": {f"{LINEAR}.{part}": BYTES for part in ("W_q", "nbits", "scale", "zero", "shape")},
    "quanto": {f"{LINEAR}.weight._data": BYTES.to(torch.int8), f"{LINEAR}.weight._scale": FLOATS},
    "quanto, in 4 bits": {
        f"{LINEAR}.weight._data._data": BYTES, f"{LINEAR}.weight._scale": FLOATS, f"{LINEAR}.weight._shift": FLOATS,
    },
    "torchao": {f"{LINEAR}._weight_qdata": FLOATS.to(torch.float8_e4m3fn), f"{LINEAR}._weight_scale": FLOATS},
    "mxfp4": {f"model.layers.0.mlp.experts.down_proj_{part}": BYTES for part in ("blocks", "scales")},
}  # fmt: skip


def folder_of(path, tensors, config=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", MADE)
def test_a_method_is_recognized_by_its_tensors(tmp_path, name):
    assert quantization_found(Checkpoint(folder_of(tmp_path, MADE[name]))) == name.partition(",")[0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_bitsandbytes_is_recognized_by_its_state(tmp_path, kind):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind)
    state = torch.nn.ModuleDict({"up_proj": layer}).to("cpu").state_dict()
    assert quantization_found(Checkpoint(folder_of(tmp_path, state))) == "bitsandbytes (4 bits)"


@pytest.mark.parametrize("says_so", [True, False])
def test_errors_about_8_bit_bitsandbytes_name_llm_int8(tmp_path, says_so):
    """Its 4-bit formats are supported, so the name bitsandbytes alone would mislead."""
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if says_so else {})
    folder = folder_of(tmp_path / "base", MADE["bitsandbytes (LLM.int8())"], config)
    named = r"quantized with bitsandbytes \(LLM\.int8\(\)\), which "
    with pytest.raises(AdaptkitError, match=f"{named}is not supported"):
        dequantize(folder, tmp_path / "out")
    with pytest.raises(AdaptkitError, match=f"{named}cannot be trained"):
        resolve_method(TrainConfig(base=str(folder), data=["x.jsonl"]), Checkpoint(folder))
    (verdict,) = check(folder, "vllm").verdicts
    assert ("quant_method is bitsandbytes in config.json" in {finding.found for finding in verdict.findings}) == says_so


def test_8_bit_compressed_tensors_are_recognized_and_decoded_without_a_configuration(tmp_path):
    """Shapes are those of a plain checkpoint."""
    scale = torch.rand(64, 1).bfloat16()
    tensors = {f"{LINEAR}.weight": BYTES.to(torch.int8), f"{LINEAR}.weight_scale": scale, "lm_head.weight": FLOATS}
    folder = folder_of(tmp_path / "base", tensors)
    assert quantization_found(Checkpoint(folder)) == "compressed-tensors"
    dequantize(folder, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")[f"{LINEAR}.weight"]
    assert torch.equal(made, scale.expand(64, 8))


def test_the_configuration_takes_precedence_over_tensors(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    assert quantization_found(Checkpoint(folder_of(tmp_path, MADE["GPTQ"], config))) == "hqq"


def test_a_gguf_file_does_not_make_other_weights_quantized(tmp_path):
    """Some repositories hold a model in both formats."""
    folder = folder_of(tmp_path, {f"{LINEAR}.weight": FLOATS})
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    assert quantization_found(Checkpoint(folder)) is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"quantizer.codebooks": FLOATS},  # of an audio model, without codes
        {f"{LINEAR}.mask": BYTES, f"{LINEAR}.weight": FLOATS},
        {f"{LINEAR}.weight": FLOATS, f"{LINEAR}.weight_scale": FLOATS},
        {f"{LINEAR}.ids": BYTES.to(torch.int8), f"{LINEAR}.weight_scale": FLOATS},
    ],
)
def test_plain_weights_with_bytes_codebooks_or_scales_are_not_quantized(tmp_path, tensors):
    assert quantization_found(Checkpoint(folder_of(tmp_path, tensors))) is None
