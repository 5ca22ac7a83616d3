"""A quantized folder equals what bitsandbytes makes, loads in its readers, and is the same every time."""

import json
import os
import re
import subprocess
import sys

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny
import torch
from folders import edited_tensors, tensors_of, tree
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.side_files import side_files
from adaptkit.errors import CheckpointError, NonFiniteError, OutputExistsError, UsageError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_array, as_tensor
from adaptkit.operations._quantize.plan import TensorPlan
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import verify
from adaptkit.training.network.packed import read_quantized


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def test_packed_bytes_match_bitsandbytes(llama, llama_nf4):
    source, made = load_file(llama / "model.safetensors"), tensors_of(llama_nf4)
    names = quantized_names(Checkpoint(llama_nf4))
    assert len(names) == 14
    for name in names:
        assert source[name].shape[1] % 64 == 0
        codes, state = bnb.functional.quantize_4bit(
            source[name], blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(made[name], codes), name
        assert torch.allclose(made[f"{name}.nested_absmax"], state.state2.absmax, rtol=1e-6)
        assert float((made[f"{name}.absmax"] != state.absmax).float().mean()) < 0.01  # the offset may be one ulp off


def test_transformers_loads_it_and_dequantizes_to_the_same_weights(llama_nf4):
    model, checkpoint = load(llama_nf4), Checkpoint(llama_nf4)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {f"{name}.weight" for name in layers} == set(quantized_names(checkpoint))
    for name, layer in layers.items():
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        ours = read_quantized(checkpoint, f"{name}.weight").dequantize()
        assert torch.equal(theirs, ours), name


def test_logits_match_those_of_the_dequantized_model(llama_nf4, tmp_path):
    """The logits differ slightly, since bitsandbytes' kernel sums in a different order, in bfloat16."""
    dequantize(llama_nf4, tmp_path / "plain")
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        plain, packed = load(tmp_path / "plain")(tokens).logits.float(), load(llama_nf4)(tokens).logits.float()
    assert (plain - packed).abs().max() <= 0.02 * plain.abs().max()
    assert (plain - packed).norm() <= 0.01 * plain.norm()


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
    tokens = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        packed, unpacked = load(tmp_path / "out")(tokens).logits.float(), load(tmp_path / "plain")(tokens).logits
    assert (packed - unpacked.float()).norm() <= 0.02 * unpacked.float().norm()


def test_shards_of_the_source_do_not_change_the_tensors(llama, llama_sharded, llama_nf4, tmp_path):
    report = quantize(llama_sharded, tmp_path / "out")
    whole, parts = tensors_of(llama_nf4), tensors_of(tmp_path / "out")
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert report.tensors_root == require_manifest(llama_nf4).tensors_root


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


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_the_result(llama, llama_nf4, tmp_path, threads):
    quantize(llama, tmp_path / "out", QuantizeOptions(threads=threads))
    assert tree(tmp_path / "out") == tree(llama_nf4)


def test_processes_and_hash_seeds_do_not_change_the_result(llama, llama_nf4, tmp_path):
    code = (
        "import sys; from pathlib import Path; from adaptkit.operations.quantize import quantize;"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, llama, tmp_path / seed], env=environment, check=True)
        assert tree(tmp_path / seed) == tree(llama_nf4)


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


def test_a_pattern_that_matches_nothing_is_refused_with_a_matching_example(llama, tmp_path):
    with pytest.raises(UsageError, match=r"--skip '\*\.z_proj' matches no module") as caught:
        quantize(llama, tmp_path / "out", QuantizeOptions(skip=("*.z_proj",)))
    named = re.fullmatch(r"patterns match whole module paths, such as '(.+_proj)'", caught.value.hint)
    assert named is not None  # the example is a layer that would be quantized
    assert quantize(llama, tmp_path / "out", QuantizeOptions(skip=(named[1],))).quantized == 13


def test_the_end_of_a_path_is_refused_with_the_pattern_that_matches_it(llama, tmp_path):
    with pytest.raises(UsageError, match=r"--skip 'q_proj' matches no module") as caught:
        quantize(llama, tmp_path / "out", QuantizeOptions(skip=("q_proj",)))
    named = re.fullmatch(r"patterns match whole module paths; write '(.+)'", caught.value.hint)
    assert named is not None
    assert quantize(llama, tmp_path / "out", QuantizeOptions(skip=(named[1],))).quantized == 12


def test_an_untied_head_stays_unquantized_also_in_readers(tmp_path):
    source = tiny.write_llama(tmp_path / "source", tied=False, dtype="float16")
    quantize(source, tmp_path / "out")
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], head)
    model = load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, head)
    assert isinstance(model.model.layers[1].mlp.up_proj, bnb.nn.Linear4bit)


@pytest.mark.parametrize("options", [{"double_quant": False}, {"block_size": 128}, {"block_size": 32}])
def test_transformers_loads_other_block_sizes_and_unnested_constants(llama, tmp_path, options):
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    checkpoint, model = Checkpoint(tmp_path / "out"), load(tmp_path / "out")
    layer = model.model.layers[0].mlp.down_proj
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(theirs, read_quantized(checkpoint, "model.layers.0.mlp.down_proj.weight").dequantize())


def refusal(kind, source, out, **options):
    with pytest.raises(kind) as caught:
        quantize(source, out, QuantizeOptions(**options))
    assert not out.exists()
    return caught.value


def test_if_every_weight_is_skipped_one_is_named_with_the_reason(llama, tmp_path):
    """Regression: the error said that no weight may be quantized."""
    error = refusal(CheckpointError, llama, tmp_path / "out", skip=("*",))
    assert re.search(r"such as \S+_proj\.weight \(skipped by --skip\)$", error.message)
    assert "--skip" in error.hint


def test_an_already_quantized_checkpoint_is_refused(llama_nf4, tmp_path):
    assert "bitsandbytes" in refusal(CheckpointError, llama_nf4, tmp_path / "out").message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_weight_is_refused_with_its_tensor_and_index(llama, copy_of, tmp_path, value):
    source = copy_of(llama)
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][100, 7] = value
    error = refusal(NonFiniteError, source, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in error.message
    assert "[100, 7]" in error.message


def test_the_index_in_a_transposed_weight_is_that_in_the_file(gpt2, copy_of, tmp_path):
    source = copy_of(gpt2)
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors["transformer.h.0.attn.c_attn.weight"][5, 150] = float("nan")
    assert "[5, 150]" in refusal(NonFiniteError, source, tmp_path / "out").message


def test_a_repaired_source_is_quantized_anew_and_nothing_stale_remains(llama, llama_nf4, copy_of, tmp_path):
    source = copy_of(llama)
    good = (source / "model.safetensors").read_bytes()
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    refusal(NonFiniteError, source, tmp_path / "out", max_shard_bytes=30_000)
    (source / "model.safetensors").write_bytes(good)
    quantize(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(llama_nf4)
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_tensor_is_refused_and_named(llama, copy_of, tmp_path):
    source = copy_of(llama)
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors["model.layers.0.self_attn.bonus.weight"] = torch.empty(0, 64)
    assert "model.layers.0.self_attn.bonus.weight" in refusal(CheckpointError, source, tmp_path / "out").message


def test_a_folder_of_pickles_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(CheckpointError, source, tmp_path / "out").message


def test_a_checkpoint_without_layers_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"embed_tokens.weight": torch.ones(64, 64)}, source / "model.safetensors")
    assert "nothing to quantize" in refusal(CheckpointError, source, tmp_path / "out").message


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_tensors_of_an_unsupported_dtype_are_named(llama, copy_of, tmp_path, dtype):
    source = copy_of(llama)
    with edited_tensors(source / "model.safetensors") as tensors:
        tensors |= {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    error = refusal(CheckpointError, source, tmp_path / "out")
    told = {"float64": "F64", "int32": "I32"}[dtype]
    assert f"model.layers.0.mlp.down_proj.weight has dtype {told}, expected F32, F16, BF16" in error.message
    assert ("torch.bfloat16" in error.hint) == (dtype == "float64")


def test_a_checkpoint_without_a_configuration_is_refused(llama, copy_of, tmp_path):
    source = copy_of(llama)
    (source / "config.json").unlink()
    assert "config.json" in refusal(CheckpointError, source, tmp_path / "out").message


@pytest.mark.parametrize("options", [{"block_size": 48}, {"block_size": 16}, {"max_shard_bytes": 0}, {"moe": "int3"}])
def test_invalid_options_are_refused(options):
    with pytest.raises(UsageError):
        QuantizeOptions(**options)


def test_an_existing_output_is_replaced_only_with_force(llama, llama_nf4, copy_of):
    out = copy_of(llama_nf4)
    before = tree(out)
    for dry_run in (False, True):
        with pytest.raises(OutputExistsError):
            quantize(llama, out, dry_run=dry_run)
    assert tree(out) == before
    quantize(llama, out, QuantizeOptions(double_quant=False), force=True)
    assert tree(out) != before


def test_experts_and_routers_stay_unquantized(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "mixtral"}')
    kept = ["mlp.gate", "mlp.experts.3.w1", "mlp.shared_expert_gate", "self_attn.q_norm"]
    names = [f"model.layers.0.{name}.weight" for name in ["self_attn.q_proj", *kept]]
    save_file(
        {name: torch.ones(64, 64) for name in names} | {"lm_head.weight": torch.ones(64, 64)},
        source / "model.safetensors",
    )
    report = quantize(source, tmp_path / "out")
    assert report.quantized == 1
    assert sum(report.kept.values()) == 5
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.experts", "lm_head"} <= set(skip)


def test_an_integer_matrix_is_copied_unchanged(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down")]
    tensors = {names[0]: torch.ones(64, 64), names[1]: torch.ones(64, 64, dtype=torch.int8)}
    save_file(tensors, source / "model.safetensors")
    assert quantize(source, tmp_path / "out").kept == {"dtype I8": 1}
    assert torch.equal(tensors_of(tmp_path / "out")[names[1]], tensors[names[1]])


def test_fp4_matches_bitsandbytes_and_loads_in_its_readers(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeOptions(format="fp4"))
    source, checkpoint, model = (
        load_file(llama / "model.safetensors"),
        Checkpoint(tmp_path / "out"),
        load(tmp_path / "out"),
    )
    for name in quantized_names(checkpoint):
        codes, _ = bnb.functional.quantize_4bit(source[name], blocksize=64, quant_type="fp4")
        assert torch.equal(as_tensor(checkpoint.read(name)), codes), name
        layer = model.get_submodule(name.removesuffix(".weight"))
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert layer.weight.quant_type == "fp4"
        assert torch.equal(theirs, read_quantized(checkpoint, name).dequantize()), name


def test_int8_is_accurate_marked_as_adaptkits_and_refused_by_transformers(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeOptions(format="int8"))
    assert 8 < report.bits_per_parameter < 10.5
    assert report.relative_error < 0.01
    quantize(llama, tmp_path / "single", QuantizeOptions(format="int8", double_quant=False))
    dequantize(tmp_path / "single", tmp_path / "plain")
    source, plain = load_file(llama / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    for name in quantized_names(Checkpoint(tmp_path / "out")):
        step = source[name].float().abs().view(-1, 64).amax(dim=1, keepdim=True) / 127
        error = (plain[name].float() - source[name].float()).view(-1, 64).abs()
        half_ulp = 2**-8 * source[name].float().abs().view(-1, 64)
        assert (error <= 0.5 * step + half_ulp).all(), name
    assert Checkpoint(tmp_path / "out").quantization_method == "adaptkit"
    with pytest.raises(RuntimeError):  # says that shapes differ
        load(tmp_path / "out")


def test_the_index_of_a_nonfinite_weight_in_a_later_piece_is_that_in_the_tensor():
    plan = TensorPlan(TensorSpec("x", "F32", (4, 5)), None)
    values = np.zeros(8, np.float32)
    plan.check(values, 10)
    values[2] = np.inf
    with pytest.raises(NonFiniteError, match=r"x: the weight at \[2, 2\] is inf"):
        plan.check(values, 10)


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


def test_kinds_of_tensors_that_stay_are_counted_as_nouns_and_phrases_left_alone(llama, tmp_path, run_cli):
    skip = [*("--skip", "*.mlp.*"), "--dry-run"]
    told = run_cli("quantize", llama, "-o", tmp_path / "out", *skip).stdout
    assert "1 embedding, 5 norms, 6 skipped by --skip\n" in told
