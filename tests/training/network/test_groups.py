"""Packed matrices with groups decode to what ``dequantize`` writes, and train as these do."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from packing import encode
from safetensors.torch import load_file, save_file

from adaptkit import dequantize, quantize
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._find import stored_weights
from adaptkit.formats._format import encoding_of
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import DTYPES, as_array
from adaptkit.operations.options import DequantizeOptions, QuantizeOptions
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.network.groups import PackedGroups
from adaptkit.training.network.model import load_model

CPU = torch.device("cpu")
ENCODINGS = {
    "w4a16": encoding_of("w4a16", 32),
    "w4a16 with zero points": encoding_of("w4a16", 64, zero_points=True),
    "int8": encoding_of("int8"),
    "fp8": encoding_of("fp8"),
    "fp8 in blocks": encoding_of("fp8", 128),
    "mxfp4": encoding_of("mxfp4"),
    "nvfp4": encoding_of("nvfp4"),
}


def gptq(folder, desc_act):
    """A matrix of random words in GPTQ's layout."""
    any_word = -(2**31), 2**31
    stored = {
        "m.qweight": torch.randint(*any_word, (256 // 8, 192), dtype=torch.int32),
        "m.qzeros": torch.randint(*any_word, (4, 192 // 8), dtype=torch.int32),
        "m.scales": (torch.rand(4, 192) + 0.1).half(),
        "m.g_idx": torch.arange(256, dtype=torch.int32) // 64,
    }
    if desc_act:
        stored["m.g_idx"] = stored["m.g_idx"][torch.randperm(256)]
    save_file(stored, folder / "model.safetensors")
    block = {"quant_method": "gptq", "bits": 4, "desc_act": desc_act}
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return "gptq"


def written(folder, encoding):
    values = torch.randn(192, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(encode(TensorSpec("m.weight", "BF16", (192, 256)), values, encoding), folder / "model.safetensors")
    block = encoding.codec.config_block([], encoding)
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    return "compressed-tensors"


@pytest.mark.parametrize("name", [*ENCODINGS, "gptq", "gptq with desc_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_matrix_decodes_to_the_formats_own_weights(tmp_path, name, dtype):
    torch.manual_seed(0)
    method = gptq(tmp_path, "desc" in name) if "gptq" in name else written(tmp_path, ENCODINGS[name])
    files = Checkpoint(tmp_path)
    (weight,) = stored_weights(files, method)
    packed = PackedGroups(weight, files)
    kind = as_array(torch.empty(0, dtype=dtype)).dtype
    expected = weight.decode(files, 0, 192 * 256, kind).reshape(192, 256)
    assert np.array_equal(
        as_array(packed.dequantize(dtype)).view(f"i{kind.itemsize}"), expected.view(f"i{kind.itemsize}")
    )
    held = sum(buffer.nbytes for buffer in packed.buffers())
    stored = sum(located.spec.nbytes for located in files.tensors.values())
    assert held < stored + 2 * 192 * 16 + 4 * 256 + 1024  # scales of 8 bits have 16 in memory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama whose matrices have multiples of 128 columns."""
    return tiny.write_llama(tmp_path_factory.mktemp("base"), tied=False, hidden=128)


@pytest.mark.parametrize("name", ENCODINGS)
def test_logits_and_adapters_are_those_of_the_dequantized_base(base, instructions, tmp_path, name):
    encoding = ENCODINGS[name]
    options = QuantizeOptions(encoding.format, block_size=encoding.block_size or None, zero_points=encoding.zero_points)
    quantize(base, tmp_path / "q", options)
    dequantize(tmp_path / "q", tmp_path / "plain")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        found, expected = (
            load_model(tmp_path / kind, torch.bfloat16, CPU).network(input_ids=ids).logits for kind in ("q", "plain")
        )
    assert torch.equal(found, expected)
    if name not in ("w4a16", "fp8 in blocks", "nvfp4"):
        return
    dequantize(tmp_path / "q", tmp_path / "plain", DequantizeOptions("float32"), force=True)
    shared = {"data": (str(instructions),), "steps": 2, "batch_size": 2, "rank": 2, "device": "cpu"}
    reports = [
        train(TrainConfig(base=str(tmp_path / kind), **shared), tmp_path / f"{kind}-a") for kind in ("q", "plain")
    ]
    one, two = (load_file(tmp_path / f"{kind}-a" / "adapter_model.safetensors") for kind in ("q", "plain"))
    assert [report.decoded_by for report in reports] == ["plain torch", ""]
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


def test_full_training_of_packed_weights_is_refused(base, instructions, tmp_path):
    quantize(base, tmp_path / "q", QuantizeOptions("nvfp4"))
    config = TrainConfig(base=str(tmp_path / "q"), data=(str(instructions),), steps=1, method="full", device="cpu")
    with pytest.raises(UsageError, match="is quantized; method full needs a 16-bit checkpoint"):
        train(config, tmp_path / "out")


def test_a_broken_scale_is_named_before_the_first_step(base, instructions, tmp_path):
    quantize(base, tmp_path / "q", QuantizeOptions("w4a16"))
    (tmp_path / "q" / "adaptkit-manifest.json").unlink()
    (file,) = Path(tmp_path / "q").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name][3, 1] = torch.nan
    save_file(tensors, file)
    config = TrainConfig(base=str(tmp_path / "q"), data=(str(instructions),), steps=1, device="cpu")
    with pytest.raises(CheckpointError, match=rf"{name}: a scale is nan"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_of_scales_are_16_bits_where_these_are_exact(tmp_path):
    written(tmp_path, ENCODINGS["nvfp4"])
    files = Checkpoint(tmp_path)
    (weight,) = stored_weights(files, "compressed-tensors")
    assert PackedGroups(weight, files).scales.dtype == DTYPES["BF16"]
