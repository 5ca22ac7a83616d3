"""Dequantized weights are those that other readers of the quantized folder compute."""

import json

import bitsandbytes as bnb
import pytest
import released
import tiny
import torch
from folders import edit_json, edited_tensors, tree
from safetensors.torch import load_file

from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import verify


def test_without_double_quantization_weights_equal_those_of_bitsandbytes(llama, llama_nf4, tmp_path):
    """With it, constants change by about one percent. All else is the original's."""
    quantize(llama, tmp_path / "q", QuantizeOptions(double_quant=False))
    dequantize(tmp_path / "q", tmp_path / "exact")
    report = dequantize(llama_nf4, tmp_path / "out")
    source, exact, plain = (load_file(f / "model.safetensors") for f in (llama, tmp_path / "exact", tmp_path / "out"))
    assert set(source) == set(plain) == set(exact)
    names = quantized_names(Checkpoint(tmp_path / "q"))
    assert report.dequantized == len(names) == 14
    for name, weight in source.items():
        if name in names:
            packed = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            expected = bnb.functional.dequantize_4bit(*packed)
            assert torch.equal(exact[name], expected)
            assert (plain[name].float() - expected.float()).norm() < 0.01 * expected.float().norm()
            assert not torch.equal(plain[name], weight)
        else:
            assert torch.equal(plain[name], weight)
        assert plain[name].dtype == weight.dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    (parent,) = require_manifest(tmp_path / "out").parents
    assert (parent.kind, parent.manifest_sha256) == ("quantized", require_manifest(llama_nf4).sha256)
    verify(tmp_path / "out")


@pytest.fixture(scope="module")
def releases(tmp_path_factory, llama_nf4):
    folder = tmp_path_factory.mktemp("releases")
    return {"nf4": llama_nf4, "fp8": released.write_fp8(folder / "fp8"), "mxfp4": released.write_mxfp4(folder / "mx")}


@pytest.mark.parametrize("kind", ["nf4", "fp8", "mxfp4"])
def test_threads_and_shards_do_not_change_the_tensors(releases, tmp_path, kind):
    dequantize(releases[kind], tmp_path / "one", DequantizeOptions(threads=1))
    dequantize(releases[kind], tmp_path / "three", DequantizeOptions(threads=3))
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    report = dequantize(releases[kind], tmp_path / "shards", DequantizeOptions(max_shard_bytes=50_000))
    assert len(Checkpoint(tmp_path / "shards").headers) > 2
    assert report.tensors_root == require_manifest(tmp_path / "one").tensors_root


def test_checkpoints_that_are_not_quantized_or_by_another_tool_are_refused(llama, copy_of, tmp_path):
    with pytest.raises(CheckpointError, match="no quantized weights"):
        dequantize(llama, tmp_path / "out")
    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config={"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match="quantized with hqq, which is not supported"):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_quantizing_again_gives_the_same_codes(llama_nf4, tmp_path):
    """Every level is its own nearest level, and a block's largest weight is its constant again."""
    dequantize(llama_nf4, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "again", QuantizeOptions(double_quant=False))
    first, second = Checkpoint(llama_nf4), Checkpoint(tmp_path / "again")
    for name in quantized_names(first):
        assert torch.equal(as_tensor(first.read(name)), as_tensor(second.read(name))), name


@pytest.mark.parametrize(("had", "comes"), [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")])
def test_the_dtype_is_the_original_one_or_bfloat16_for_float32(tmp_path, had, comes):
    quantize(tiny.write_llama(tmp_path / "model", dtype=had), tmp_path / "q")
    dequantize(tmp_path / "q", tmp_path / "out")
    kept, made = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    names = quantized_names(Checkpoint(tmp_path / "q"))
    assert {made[name].dtype for name in names} == {getattr(torch, comes)}
    assert all(made[name].dtype == weight.dtype for name, weight in kept.items() if name not in names)


@pytest.mark.parametrize(
    ("dtype", "format", "double"),
    [("bfloat16", "nf4", True), ("float16", "nf4", False), ("float32", "fp4", False), ("bfloat16", "fp4", False)],
)
def test_models_that_transformers_quantized_are_dequantized_to_any_dtype(llama, tmp_path, dtype, format, double):
    """bitsandbytes' own decoder gives the same bits; with nested constants, only in the dtype of the model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "theirs")
    dequantize(tmp_path / "theirs", tmp_path / "out", DequantizeOptions(dtype=None if double else dtype))
    plain = load_file(tmp_path / "out" / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        state = layer.weight.quant_state
        state.dtype = getattr(torch, dtype)
        assert torch.equal(plain[f"{name}.weight"], bnb.functional.dequantize_4bit(layer.weight.data, state)), name
    assert plain["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("format", "name"), [("nf4", "q_proj"), ("fp8", "q_proj"), ("fp4", "lm_head")])
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
    error, hint = done.refusal(5)
    assert f"{key}: a weight" in error
    assert "is too large for F16" in error
    assert "use --dtype bfloat16 or float32" in hint
    assert not list(tmp_path.glob("out*"))
    dequantize(tmp_path / "q", tmp_path / "out", DequantizeOptions("float32"))
