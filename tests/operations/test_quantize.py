"""A quantized folder equals what bitsandbytes makes, loads in its readers, and is the same every time."""

import json
import math
import os
import re
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from folders import edited_tensors, rewritten, tensors_of, tree
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import side_files
from adaptkit.errors import CheckpointError, NonFiniteError, UsageError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.tensors import as_array, as_tensor
from adaptkit.operations import _shards
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import verify
from adaptkit.training.network.packed import read_quantized


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def test_other_tensors_and_files_are_unchanged(llama, llama_nf4):
    source, made = load_file(llama / "model.safetensors"), tensors_of(llama_nf4)
    kept = set(source) - set(quantized_names(Checkpoint(llama_nf4)))
    assert kept == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")),
    }
    assert all(torch.equal(source[name], made[name]) and source[name].dtype == made[name].dtype for name in kept)
    assert {name: tree(llama_nf4)[name] for name in side_files(llama)} == {
        name: path.read_bytes() for name, path in side_files(llama).items()
    }
    config = json.loads((llama_nf4 / "config.json").read_text())
    assert config.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    assert config == json.loads((llama / "config.json").read_text())


def test_gpt2_weights_are_transposed_to_quantize_and_back_to_dequantize(gpt2, tmp_path):
    quantize(gpt2, tmp_path / "out")
    dequantize(tmp_path / "out", tmp_path / "plain")
    source, plain = load_file(gpt2 / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "out")
    names = quantized_names(checkpoint)
    assert len(names) == 8
    for name in names:
        turned = source[name].T.contiguous()
        codes, state = bnb.functional.quantize_4bit(turned, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(as_tensor(checkpoint.read(name)), codes)
        assert read_quantized(checkpoint, name).shape == tuple(turned.shape)
        expected = bnb.functional.dequantize_4bit(codes, state).T
        assert (plain[name].float() - expected.float()).abs().max() < 1e-3
        assert plain[name].shape == source[name].shape
    assert all(torch.equal(plain[name], source[name]) for name in set(source) - set(names))


def test_output_shards_respect_the_size_limit_and_do_not_split_a_weight(llama, llama_nf4, tmp_path):
    limit = 40_000
    report = quantize(llama, tmp_path / "out", QuantizeOptions(max_shard_bytes=limit))
    checkpoint = Checkpoint(tmp_path / "out")
    assert report.shards == len(checkpoint.headers) > 2
    for header in checkpoint.headers.values():
        assert sum(spec.nbytes for spec, _ in header.tensors) <= limit
    for name in quantized_names(checkpoint):
        assert len({checkpoint.tensors[part].file for part in checkpoint.tensors if part.startswith(name)}) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(located.spec.nbytes for located in checkpoint.tensors.values())
    whole = tensors_of(llama_nf4)
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors_of(tmp_path / "out").items())
    load(tmp_path / "out")


def test_threads_processes_hash_seeds_and_shards_do_not_change_the_result(llama, llama_sharded, llama_nf4, tmp_path):
    for threads in (1, 7):
        quantize(llama, tmp_path / str(threads), QuantizeOptions(threads=threads))
        assert tree(tmp_path / str(threads)) == tree(llama_nf4)
    code = "import sys; from adaptkit.operations.quantize import quantize; quantize(sys.argv[1], sys.argv[2])"
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-c", code, llama, tmp_path / "seed"], env=environment, check=True)
    assert tree(tmp_path / "seed") == tree(llama_nf4)
    report = quantize(llama_sharded, tmp_path / "sharded")
    whole, parts = tensors_of(llama_nf4), tensors_of(tmp_path / "sharded")
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert report.tensors_root == require_manifest(llama_nf4).tensors_root


def test_the_manifest_records_fingerprints_of_source_and_result(llama, llama_nf4):
    manifest, source = require_manifest(llama_nf4), load_file(llama / "model.safetensors")
    assert manifest.kind == "quantized"
    assert "threads" not in manifest.operation["options"]
    assert {f"{t.module}.weight": t.base_xxh3_128 for t in manifest.targets} == {
        name: fingerprint(as_array(source[name])) for name in quantized_names(Checkpoint(llama_nf4))
    }
    assert len({target.quantized_root for target in manifest.targets}) == 14
    assert str(llama) not in manifest.to_bytes().decode()
    verify(llama_nf4)


def test_the_report_matches_the_files(llama, llama_nf4, tmp_path):
    planned = quantize(llama, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    report = quantize(llama, tmp_path / "out")
    checkpoint, source = Checkpoint(tmp_path / "out"), load_file(llama / "model.safetensors")
    names = quantized_names(checkpoint)
    assert (report.quantized, report.shards) == (14, 1)
    assert report.quantized_parameters == sum(source[name].numel() for name in names)
    assert report.parameters == sum(tensor.numel() for tensor in source.values())
    assert report.bytes_before == sum(tensor.nbytes for tensor in source.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert report.kept == {"embedding": 1, "norm": 5}
    assert report.manifest_sha256 == require_manifest(tmp_path / "out").sha256
    assert (planned.tensors_root, planned.manifest_sha256) == (None, None)
    assert (planned.bytes_after, planned.bits_per_parameter) == (report.bytes_after, report.bits_per_parameter)


def test_skipped_modules_stay_unquantized_and_are_listed_for_readers(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeOptions(skip=("*.self_attn.o_proj", "model.layers.0.mlp.*")))
    source, made = load_file(llama / "model.safetensors"), tensors_of(tmp_path / "out")
    skipped = {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)}
    skipped |= {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == sorted(skipped | {"lm_head"})
    assert all(torch.equal(source[f"{module}.weight"], made[f"{module}.weight"]) for module in skipped)
    model = load(tmp_path / "out")
    assert {n for n, m in model.named_modules() if type(m) is torch.nn.Linear} == skipped | {"lm_head"}
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 13).view(1, 10)).logits).all()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.quick),
        *({"format": "fp4"}, {"double_quant": False}, {"block_size": 128}, {"block_size": 32}),
    ],
    ids=str,
)
def test_codes_match_bitsandbytes_and_its_readers_get_the_same_weights(llama, tmp_path, options):
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    source, checkpoint, model = (
        load_file(llama / "model.safetensors"),
        Checkpoint(tmp_path / "out"),
        load(tmp_path / "out"),
    )
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(layers) == set(quantized_names(checkpoint))
    assert len(layers) == 14
    kind, size = options.get("format", "nf4"), options.get("block_size", 64)
    for name, layer in layers.items():
        codes, state = bnb.functional.quantize_4bit(
            source[name], blocksize=size, quant_type=kind, compress_statistics=True
        )
        assert torch.equal(as_tensor(checkpoint.read(name)), codes), name
        if not options:
            made = {part: as_tensor(checkpoint.read(f"{name}.{part}")) for part in ("nested_absmax", "absmax")}
            assert torch.allclose(made["nested_absmax"], state.state2.absmax, rtol=1e-6)
            assert float((made["absmax"] != state.absmax).float().mean()) < 0.01  # the offset may be one ulp off
        assert layer.weight.quant_type == kind
        if source[name].shape[1] % size == 0:  # otherwise its decoder for CPUs is wrong
            theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(theirs, read_quantized(checkpoint, name).dequantize()), name


@pytest.mark.parametrize(
    ("pattern", "hint", "quantized"),
    [
        ("*.z_proj", r"patterns match whole module paths, such as '(.+_proj)'", 13),  # a layer that would be quantized
        ("q_proj", r"patterns match whole module paths; write '(.+)'", 12),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_one_that_does(llama, tmp_path, pattern, hint, quantized):
    with pytest.raises(UsageError, match=re.escape(f"--skip '{pattern}' matches no module")) as caught:
        quantize(llama, tmp_path / "out", QuantizeOptions(skip=(pattern,)))
    named = re.fullmatch(hint, caught.value.hint)
    assert named is not None
    assert quantize(llama, tmp_path / "out", QuantizeOptions(skip=(named[1],))).quantized == quantized


UP, BONUS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.bonus.weight"
C_ATTN = "transformer.h.0.attn.c_attn.weight"
DTYPES = "model.layers.0.mlp.down_proj.weight has dtype {}, expected F32, F16, BF16"


def with_value(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


def of_dtype(dtype):
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


REFUSED = {
    "NaN": ("llama", with_value(UP, (100, 7), math.nan), NonFiniteError, f"{UP}: the weight at [100, 7] is nan", ""),
    "infinity": ("llama", with_value(UP, (0, 0), -math.inf), NonFiniteError, f"{UP}: the weight at [0, 0] is -inf", ""),
    "NaN in a transposed weight": ("gpt2", with_value(C_ATTN, (5, 150), math.nan), NonFiniteError, "[5, 150]", ""),
    "an empty tensor": ("llama", lambda t: t.update({BONUS: torch.empty(0, 64)}), CheckpointError, BONUS, ""),
    "float64": ("llama", of_dtype(torch.float64), CheckpointError, DTYPES.format("F64"), "torch.bfloat16"),
    "integers": ("llama", of_dtype(torch.int32), CheckpointError, DTYPES.format("I32"), ""),
    "no layers": ("llama", lambda t: [t.pop(name) for name in list(t) if "layers" in name], CheckpointError,
                  "nothing to quantize", ""),
    "quantized": ("llama_nf4", None, CheckpointError, "bitsandbytes", ""),
}  # fmt: skip
"""A checkpoint, a change of its tensors, and the error with words of it and of its hint."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_cannot_be_quantized_is_refused(request, copy_of, tmp_path, monkeypatch, name):
    source, change, error, words, hint = REFUSED[name]
    folder = copy_of(request.getfixturevalue(source))
    if change is not None:
        rewritten(folder, change)
    monkeypatch.setattr(_shards, "PIECE_BYTES", 400)
    with pytest.raises(error, match=re.escape(words)) as caught:
        quantize(folder, tmp_path / "out")
    assert hint in caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_an_integer_matrix_is_copied_unchanged(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")]
    tensors = {names[0]: torch.ones(64, 64), names[1]: torch.ones(64, 64, dtype=torch.int8)}
    save_file(tensors, source / "model.safetensors")
    assert quantize(source, tmp_path / "out").kept == {"dtype I8": 1}
    assert torch.equal(tensors_of(tmp_path / "out")[names[1]], tensors[names[1]])


def test_int8_is_accurate_in_every_row(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeOptions(format="int8"))
    assert 8 < report.bits_per_parameter < 8.5
    assert report.relative_error < 0.01
    dequantize(tmp_path / "out", tmp_path / "plain")
    source, plain = load_file(llama / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    for tensor in report.tensors:
        before, after = source[tensor.name].float(), plain[tensor.name].float()
        step = before.abs().amax(dim=1, keepdim=True) / 127 if tensor.format else 0
        assert ((after - before).abs() <= 0.51 * step + 2**-8 * before.abs()).all(), tensor.name


def test_an_error_that_overflows_is_null_in_the_json_report(llama, copy_of, tmp_path, run_cli):
    """Squares of weights near the float32 limit overflow, and JSON has no NaN."""
    source = copy_of(llama)
    with edited_tensors(source / "model.safetensors") as tensors:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].sign() * 1e37
    done = run_cli("quantize", source, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(constant))
    errors = {tensor["name"]: tensor["relative_error"] for tensor in report["tensors"] if tensor["format"]}
    assert report["relative_error"] is None
    assert {other for other, error in errors.items() if error is None} == {name}
    assert "nan" not in run_cli("quantize", source, "-o", tmp_path / "shown").stdout
