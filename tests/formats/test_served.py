"""What is written for servers is decoded as compressed-tensors does, and transformers loads the same weights."""

import json

import numpy as np
import pytest
import tiny
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import encode
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adaptkit import dequantize, quantize
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._find import stored_weights
from adaptkit.formats._format import Encoding, encoding_of
from adaptkit.numerics.dtypes import ARRAY_DTYPES, dtype_name
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations.options import DequantizeOptions, QuantizeOptions

ENCODINGS = {
    "w4a16 in groups of 128": encoding_of("w4a16"),
    "w4a16 in groups of 32": encoding_of("w4a16", 32),
    "w4a16 with zero points": encoding_of("w4a16", 64, zero_points=True),
    "int8": encoding_of("int8"),
    "fp8 by row": encoding_of("fp8"),
    "fp8 in blocks": encoding_of("fp8", 128),
    "mxfp4": encoding_of("mxfp4"),
    "nvfp4": encoding_of("nvfp4"),
}
STEP = {"w4a16": 1 / 14, "int8": 1 / 253, "fp8": 1 / 16, "mxfp4": 1 / 5, "nvfp4": 1 / 5}
"""The largest error of a weight, as a share of its group's largest magnitude: half of the widest step, and clipping."""


def weights(shape, dtype, kind, seed):
    """Random weights of very different sizes, or with what is special: zeros, ties, small numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "sizes":
        values *= 10 ** (torch.rand(shape[0], 1, generator=generator) * 6 - 4)
    if kind == "special":
        chosen = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 7.5, -7.5, 2.5, 1e-6])
        values = chosen[torch.randint(len(chosen), shape, generator=generator)]
        values[::3] = 0
    return values.to(dtype)


def written(folder, values, encoding):
    """Encode a weight, write a checkpoint of it and return it with its tensors."""
    spec = TensorSpec("m.weight", dtype_name(values.dtype), tuple(values.shape))
    tensors = encode(spec, values, encoding)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    block = encoding.codec.config_block(["lm_head"], encoding)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": block}))
    return Checkpoint(folder), {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


def decoded(files, dtype):
    (weight,) = stored_weights(files, quantization_found(files))
    assert weight.name == "m.weight"
    rows, columns = weight.shape
    runs = [(first, min(3, rows - first)) for first in range(0, rows, 3)]
    unit = weight.unit // columns or 1
    assert unit == 1
    values = [weight.decode(files, first * columns, count * columns, ARRAY_DTYPES[dtype]) for first, count in runs]
    return as_tensor(np.concatenate(values).reshape(weight.shape))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([(9, 128), (136, 384), (24, 256)]),
    st.sampled_from(["plain", "sizes", "special"]),
    st.integers(0, 2**31),
)
def test_compressed_tensors_decodes_the_same_weights(tmp_path_factory, name, dtype, shape, kind, seed):
    encoding, values = ENCODINGS[name], weights(shape, dtype, kind, seed)
    files, state = written(tmp_path_factory.mktemp("w"), values, encoding)
    config = QuantizationConfig.model_validate(files.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    expected = compressor.decompress({key: part.clone() for key, part in state.items()}, scheme)["weight"]
    found = decoded(files, dtype_name(expected.dtype))
    assert torch.equal(found, expected)
    size = encoding.block_size or shape[1]
    if name == "fp8 in blocks":
        return
    wide = values.double().view(shape[0], -1, min(size, 16 if encoding.format == "nvfp4" else size))
    top = wide.abs().amax(-1, keepdim=True)
    if encoding.zero_points:
        top = wide.amax(-1, keepdim=True).clamp(min=0) - wide.amin(-1, keepdim=True).clamp(max=0)
    lost = (found.double().view(wide.shape) - wide).abs()
    least = float(values.abs().max()) * 2e-6 + 6e-8 * 8  # below the smallest scale that the file can hold
    assert bool((lost <= (STEP[encoding.format] + 2**-7) * top + least).all())


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_files_have_the_types_and_shapes_that_compressed_tensors_writes(tmp_path, name):
    """But for the type of a scale's value: it makes the same of the decoded weights."""
    encoding = ENCODINGS[name]
    files, state = written(tmp_path, weights((256, 384), torch.bfloat16, "plain", 0), encoding)
    config = QuantizationConfig.model_validate(files.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    plain = compressor.decompress({key: part.clone() for key, part in state.items()}, scheme)
    again = compressor.compress({key: part.clone() for key, part in plain.items()}, scheme)
    assert {key: (part.dtype, part.shape) for key, part in again.items()} == {
        key: (part.dtype, part.shape) for key, part in state.items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama whose matrices have multiples of 128 columns."""
    return tiny.write_llama(tmp_path_factory.mktemp("base"), tied=False, hidden=128)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize("name", ENCODINGS)
def test_transformers_loads_the_weights_that_dequantize_writes(base, tmp_path, name):
    """With their logits, where the format says nothing of inputs."""
    encoding = ENCODINGS[name]
    options = QuantizeOptions(encoding.format, block_size=encoding.block_size or None, zero_points=encoding.zero_points)
    report = quantize(base, tmp_path / "q", options)
    assert report.quantized == 14
    dequantize(tmp_path / "q", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    extra = {}
    if encoding.zero_points:  # transformers 5.24 expects zero points of another shape unless it dequantizes
        from transformers import CompressedTensorsConfig

        extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16, **extra)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected, found = plain(ids).logits, loaded(ids).logits
    for key, weight in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    if encoding.format not in ("int8", "fp8"):
        assert torch.equal(found, expected)


def test_weights_that_servers_fuse_have_one_global_scale(base, tmp_path):
    quantize(base, tmp_path / "q", QuantizeOptions("nvfp4"))
    files, source = Checkpoint(tmp_path / "q"), Checkpoint(base)
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        paths = [f"model.layers.1.{name}.weight" for name in names]
        found = {float(files.read(f"{path}_global_scale")[0]) for path in paths}
        largest = max(float(np.abs(source.read(path).astype(np.float32)).max()) for path in paths)
        assert found == {2.0 ** np.floor(np.log2(448 * 6 / largest))}
    down = float(files.read("model.layers.1.mlp.down_proj.weight_global_scale")[0])
    alone = float(np.abs(source.read("model.layers.1.mlp.down_proj.weight").astype(np.float32)).max())
    assert down == 2.0 ** np.floor(np.log2(448 * 6 / alone))


def test_a_row_that_groups_do_not_divide_is_refused_with_what_helps(tmp_path):
    tiny.write_llama(tmp_path / "odd", hidden=96)
    with pytest.raises(UsageError, match=r"_proj\.weight: (96|192) columns are not a multiple of 128") as caught:
        quantize(tmp_path / "odd", tmp_path / "out", QuantizeOptions("w4a16"))
    assert "--block-size" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert quantize(tmp_path / "odd", tmp_path / "out", QuantizeOptions("w4a16", block_size=32)).quantized == 14


@pytest.mark.parametrize("wrong", [{"format": "fp8", "block_size": 64}, {"format": "nvfp4", "zero_points": True}])
def test_what_a_format_lacks_is_refused(wrong):
    with pytest.raises(UsageError, match=r"block_size|zero_points"):
        QuantizeOptions(**wrong)


def nvfp4_of_modelopt(folder, seed=0):
    """Write random bytes as ModelOpt names them, and return what they stand for, by arithmetic in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (24, 64), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(24, 8, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor(3.1e-4)
    parts = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    folder.mkdir(exist_ok=True)
    save_file({f"m.{name}": part for name, part in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    both = torch.stack((codes & 15, codes >> 4), -1).view(24, 128).long()
    levels = magnitude[both & 7] * (1 - 2 * (both >> 3))
    return Checkpoint(folder), levels * (scales.float() * whole).double().repeat_interleave(16, 1)


def test_modelopts_nvfp4_is_decoded_by_its_formula(tmp_path):
    files, expected = nvfp4_of_modelopt(tmp_path / "w")
    assert torch.equal(decoded(files, "F32"), expected.float())
    (weight,) = stored_weights(files, "modelopt")
    assert weight.input_scales == ("m.input_scale",)


@pytest.mark.parametrize("shape", [(), (256,), (2, 1, 3, 1)])
def test_modelopts_fp8_is_decoded_by_its_formula(tmp_path, shape):
    """One number, one for each row, and blocks of 128 x 128."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=generator) + 0.5
    parts = {"m.weight": codes, "m.weight_scale": scales, "m.input_scale": torch.tensor(0.5)}
    save_file(parts, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    if len(shape) == 4:
        by_weight = scales.view(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        by_weight = scales.view(-1, 1)
    assert torch.equal(decoded(Checkpoint(tmp_path), "F32"), (codes.double() * by_weight.double()).float())


def test_blocks_of_128_are_taken_before_blocks_of_equal_size(tmp_path):
    """192 columns with two scales are 128 and 64, as in DeepSeek's files, although 96 and 96 would fit, too."""
    codes = torch.ones(128, 192).to(torch.float8_e4m3fn)
    save_file({"m.weight": codes, "m.weight_scale_inv": torch.tensor([[2.0, 3.0]])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    found = decoded(Checkpoint(tmp_path), "F32")
    assert found[0].tolist() == [2.0] * 128 + [3.0] * 64


BROKEN = {
    "no global scale": ("nvfp4", lambda parts: parts.pop("m.weight_global_scale"), "weight_packed|weight_scale"),
    "a global scale of 0": ("nvfp4", lambda parts: parts["m.weight_global_scale"].zero_(), "a scale is 0"),
    "a global scale of infinity": ("nvfp4", lambda parts: parts["m.weight_global_scale"].fill_(torch.inf), "is inf"),
    "a scale of NaN": ("nvfp4", lambda parts: parts["m.weight_scale"].view(torch.uint8).fill_(0x7F), "is nan"),
    "no scale": ("int8", lambda parts: parts.pop("m.weight_scale"), "m.weight"),
    "an int8 scale of NaN": ("int8", lambda parts: parts["m.weight_scale"].fill_(torch.nan), "a scale is nan"),
    "a scale of another shape": (
        "int8", lambda parts: parts.update({"m.weight_scale": torch.ones(3, 1)}), r"\[3, 1\]; expected"),
    "scales of other groups": (
        "mxfp4", lambda parts: parts.update({"m.weight_scale": torch.ones(8, 3, dtype=torch.uint8)}), r"\[8, 3\]"),
    "a scale of 0": ("w4a16", lambda parts: parts["m.weight_scale"].zero_(), "a scale is 0"),
    "a scale of float16's infinity": ("w4a16", lambda parts: parts["m.weight_scale"].fill_(torch.inf), "is inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, name):
    form, change, message = BROKEN[name]
    spec = TensorSpec("m.weight", "BF16", (8, 128))
    encoding = encoding_of(form)
    parts = encode(spec, weights((8, 128), torch.bfloat16, "plain", 0), encoding)
    change(parts)
    (tmp_path / "in").mkdir()
    save_file(parts, tmp_path / "in" / "model.safetensors")
    block = encoding.codec.config_block([], encoding)
    (tmp_path / "in" / "config.json").write_text(json.dumps({"quantization_config": block}))
    with pytest.raises(CheckpointError, match=message):
        dequantize(tmp_path / "in", tmp_path / "out", DequantizeOptions("float32"))
    assert not (tmp_path / "out").exists()


def test_experts_that_stay_are_ignored_by_a_pattern():
    encoding = Encoding("mxfp4", 32, False)
    block = encoding.codec.config_block(["lm_head", "model.layers.0.mlp.experts"], encoding)
    assert block["ignore"] == ["lm_head", "model.layers.0.mlp.experts", r"re:model\.layers\.0\.mlp\.experts\..*"]
