"""Dequantized weights are those that other readers of the quantized folder compute."""

import json

import bitsandbytes as bnb
import pytest
import tiny
import torch
from folders import edit_json, edited_tensors, tree
from safetensors.torch import load_file

from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, OutputExistsError, UsageError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import verify


def test_weights_are_within_one_percent_of_those_of_bitsandbytes(llama, llama_nf4, tmp_path):
    report = dequantize(llama_nf4, tmp_path / "out")
    source, plain = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(source) == set(plain)
    names = quantized_names(Checkpoint(llama_nf4))
    assert report.dequantized == len(names) == 14
    for name, weight in source.items():
        expected = weight
        if name in names:
            packed = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            expected = bnb.functional.dequantize_4bit(*packed)
            # without double quantization, which changes a constant by about one percent
            assert (plain[name].float() - expected.float()).norm() < 0.01 * expected.float().norm()
            assert not torch.equal(plain[name], weight)
        else:
            assert torch.equal(plain[name], expected)
        assert plain[name].dtype == weight.dtype


def test_without_double_quantization_weights_equal_those_of_bitsandbytes(llama, tmp_path):
    quantize(llama, tmp_path / "q", QuantizeOptions(double_quant=False))
    dequantize(tmp_path / "q", tmp_path / "out")
    source, plain = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in quantized_names(Checkpoint(tmp_path / "q")):
        packed = bnb.functional.quantize_4bit(source[name], blocksize=64, quant_type="nf4")
        assert torch.equal(plain[name], bnb.functional.dequantize_4bit(*packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_that_transformers_quantized_are_dequantized_exactly(llama, tmp_path, dtype):
    """transformers quantizes and saves; adaptkit decodes the same weights as bitsandbytes, in the same dtype."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu", dtype=dtype)
    expected = {
        f"{name}.weight": bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    model.save_pretrained(tmp_path / "theirs")
    dequantize(tmp_path / "theirs", tmp_path / "out")
    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert len(expected) == 14
    assert {plain[name].dtype for name in expected} == {dtype}
    assert all(torch.equal(plain[name], weight) for name, weight in expected.items())


def test_configuration_and_tokenizer_are_those_of_the_original(llama, llama_nf4, tmp_path):
    dequantize(llama_nf4, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_shards_do_not_change_the_tensors(llama_nf4, tmp_path, threads):
    dequantize(llama_nf4, tmp_path / "one", DequantizeOptions(threads=threads))
    dequantize(llama_nf4, tmp_path / "two", DequantizeOptions())
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    report = dequantize(llama_nf4, tmp_path / "three", DequantizeOptions(threads=threads, max_shard_bytes=50_000))
    assert len(Checkpoint(tmp_path / "three").headers) > 2
    assert report.tensors_root == require_manifest(tmp_path / "one").tensors_root


def test_quantizing_again_gives_the_same_codes(llama_nf4, tmp_path):
    """Every level is its own nearest level, and a block's largest weight is its constant again."""
    dequantize(llama_nf4, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "again", QuantizeOptions(double_quant=False))
    first, second = Checkpoint(llama_nf4), Checkpoint(tmp_path / "again")
    for name in quantized_names(first):
        assert torch.equal(as_tensor(first.read(name)), as_tensor(second.read(name))), name


def test_the_manifest_names_its_parent(llama_nf4, tmp_path):
    dequantize(llama_nf4, tmp_path / "out")
    (parent,) = require_manifest(tmp_path / "out").parents
    assert (parent.kind, parent.manifest_sha256) == ("quantized", require_manifest(llama_nf4).sha256)
    verify(tmp_path / "out")


def test_an_unquantized_checkpoint_is_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match="no quantized weights"):
        dequantize(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_quantization_method_is_named(llama, copy_of, tmp_path):
    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quantized with gptq, which is not supported"):
        dequantize(folder, tmp_path / "out")


def test_an_existing_output_is_refused(llama_nf4, copy_of):
    out = copy_of(llama_nf4)
    before = tree(out)
    with pytest.raises(OutputExistsError):
        dequantize(llama_nf4, out)
    assert tree(out) == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(("had", "comes"), [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")])
def test_the_dtype_is_the_original_one_or_bfloat16_for_float32(tmp_path, had, comes):
    quantize(tiny.write_llama(tmp_path / "model", dtype=had), tmp_path / "q")
    dequantize(tmp_path / "q", tmp_path / "out")
    kept, made = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    names = quantized_names(Checkpoint(tmp_path / "q"))
    assert {made[name].dtype for name in names} == {getattr(torch, comes)}
    assert all(made[name].dtype == weight.dtype for name, weight in kept.items() if name not in names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_models_that_transformers_quantized_are_dequantized_to_any_dtype(llama, tmp_path, dtype, format):
    """Without double quantization, bitsandbytes' own decoder gives the same bits in that dtype."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=False)
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "theirs")
    dequantize(tmp_path / "theirs", tmp_path / "out", DequantizeOptions(dtype=dtype))
    plain = load_file(tmp_path / "out" / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        state = layer.weight.quant_state
        state.dtype = getattr(torch, dtype)
        assert torch.equal(plain[f"{name}.weight"], bnb.functional.dequantize_4bit(layer.weight.data, state)), name
    assert plain["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"max_shard_bytes": 0}, {"threads": 0}])
def test_invalid_options_are_refused(options):
    with pytest.raises(UsageError):
        DequantizeOptions(**options)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["q_proj", "lm_head"])
def test_a_quantized_weight_that_is_too_large_for_the_dtype_is_named(tmp_path, format, name, run_cli):
    """Tensors that are not quantized are copied as they are, since --dtype does not apply to them."""
    base = tiny.write_llama(tmp_path / "base", tied=False)
    with edited_tensors(base / "model.safetensors") as tensors:
        key = next(key for key in tensors if name in key)
        tensors[key][3, 5] = -1e6
    quantize(base, tmp_path / "q", QuantizeOptions(format))
    done = run_cli("dequantize", tmp_path / "q", "-o", tmp_path / "out", "--dtype", "float16")
    if name == "lm_head":
        assert done.code == 0, done.stderr
        assert load_file(tmp_path / "out" / "model.safetensors")[key][3, 5] < -9e5
        return
    assert done.code == 5
    assert f"{key}: a weight of up to" in done.stderr
    assert "use --dtype bfloat16 or float32" in done.stderr
    assert not list(tmp_path.glob("out*"))
    dequantize(tmp_path / "q", tmp_path / "out", DequantizeOptions("float32"))
