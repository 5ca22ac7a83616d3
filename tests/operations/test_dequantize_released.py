"""Models released in FP8 or MXFP4 become the 16-bit checkpoints that transformers computes from them."""

import json
import re

import pytest
import released
import tiny
import torch
import xxhash
from folders import edit_json, edited_tensors, flip, rewritten, tree
from safetensors.torch import load_file

from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.manifest import TensorRecord, require_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError, NonFiniteError
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.verify import VerifyOptions, verify

GATE = "model.layers.1.mlp.gate_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return released.write_fp8(tmp_path_factory.mktemp("fp8") / "llama-fp8")


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    return released.write_mxfp4(tmp_path_factory.mktemp("mxfp4") / "oss-mxfp4")


def loaded(folder, **options):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, **options).named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_gives_the_weights_of_transformers(mxfp4, tmp_path, dtype):
    from transformers import Mxfp4Config

    dequantize(mxfp4, tmp_path / "plain", DequantizeOptions(dtype=dtype))
    # transformers decodes into the type of the model's parameters
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": getattr(torch, dtype)}
    expected, found = loaded(mxfp4, **options), loaded(tmp_path / "plain", dtype=getattr(torch, dtype))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert stored[EXPERTS].dtype == getattr(torch, dtype)
    assert stored[EXPERTS].unique().numel() > 40
    assert not any(name.endswith(("_blocks", "_scales")) for name in stored)


@pytest.mark.parametrize("block", [(32, 32), (16, 64), None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_gives_the_weights_of_transformers(tmp_path, block, dtype):
    from transformers import FineGrainedFP8Config

    folder = released.write_fp8(tmp_path / "model", block=block)
    report = dequantize(folder, tmp_path / "plain", DequantizeOptions(dtype=dtype))
    assert (report.dequantized, report.input_scales) == (14, 0)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    expected = loaded(folder, quantization_config=config, dtype=getattr(torch, dtype))
    found = loaded(tmp_path / "plain", dtype=getattr(torch, dtype))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert load_file(tmp_path / "plain" / "model.safetensors")[GATE].dtype == getattr(torch, dtype)


def test_blocks_at_the_edges_may_be_smaller(tmp_path):
    """As DeepSeek-V3's: 576 rows in blocks of 128; a matrix of several pieces, which begin within blocks."""
    folder = tiny.write_llama(tmp_path / "model")
    rows, columns = 5000, 600
    codes = released.finite_codes((rows, columns))
    scales = torch.rand(40, 5) * 1e-3
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors.update({GATE: codes, f"{GATE}_scale_inv": scales})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    dequantize(folder, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    spread = scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    found = load_file(tmp_path / "plain" / "model.safetensors")[GATE]
    assert torch.equal(found, (codes.double() * spread).float())


def test_stacks_of_fp8_matrices_have_scales_of_their_own(tmp_path):
    folder = tiny.write_llama(tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    codes, scales = released.finite_codes((3, 64, 96)), torch.rand(3, 2, 3)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors.update({name: codes, f"{name}_scale_inv": scales})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    dequantize(folder, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    spread = scales.double().repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")[name], (codes.double() * spread).float())


def test_scales_of_inputs_are_left_out_and_counted(tmp_path, run_cli):
    folder = released.write_fp8(tmp_path / "model", block=None, input_scales=True)
    done = run_cli("dequantize", folder, "-o", tmp_path / "plain")
    assert done.code == 0, done.stderr
    assert re.search(r"left out +14 scales of 8-bit inputs", done.stdout)
    assert not any("scale" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_manifest_records_every_tensor_of_the_source(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    dequantize(source, tmp_path / "plain")
    manifest = require_manifest(tmp_path / "plain")
    (parent,) = manifest.parents
    checkpoint = Checkpoint(source)
    records = [
        TensorRecord.of(TensorSpec(name, located.spec.dtype, located.spec.shape), fingerprint_of(checkpoint, name))
        for name, located in checkpoint.tensors.items()
    ]
    assert parent.tensors_root == tensors_root(records)
    assert manifest.operation["options"]["method"] == kind
    config = Checkpoint(tmp_path / "plain").config
    assert config == {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_operation_can_be_repeated(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    dequantize(source, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    (made,) = verify(tmp_path / "plain", VerifyOptions(parents=(source,), recompute=True)).recomputed
    assert made[1] == "same bytes"


def fingerprint_of(checkpoint, name):
    raw = checkpoint.read(name).contiguous().view(torch.uint8).numpy().tobytes()
    return xxhash.xxh3_128_hexdigest(raw)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_threads_and_shards_do_not_change_the_tensors(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    dequantize(source, tmp_path / "one", DequantizeOptions(threads=1))
    dequantize(source, tmp_path / "two", DequantizeOptions(threads=3))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    report = dequantize(source, tmp_path / "three", DequantizeOptions(max_shard_bytes=50_000))
    assert len(Checkpoint(tmp_path / "three").headers) > 2
    assert report.tensors_root == require_manifest(tmp_path / "one").tensors_root


def test_an_adapter_merges_into_the_result_without_a_flag(tmp_path):
    """Everybody trains on these values, for want of others; what quantize made of a 16-bit checkpoint is refused."""
    dequantize(released.write_fp8(tmp_path / "model"), tmp_path / "plain")
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert merge(tmp_path / "plain", adapter, tmp_path / "merged").merged == 14
    quantize(tmp_path / "plain", tmp_path / "nf4")
    dequantize(tmp_path / "nf4", tmp_path / "again")
    with pytest.raises(BaseMismatchError, match="was quantized and dequantized"):
        merge(tmp_path / "again", adapter, tmp_path / "other")


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("command", ["quantize", "train", "merge"])
def test_commands_that_need_a_16_bit_checkpoint_say_how_to_get_it(request, kind, command, adapter, tmp_path, run_cli):
    source = request.getfixturevalue(kind)
    data = tiny.write_instructions(tmp_path / "rows.jsonl")
    arguments = {
        "quantize": ["quantize", source],
        "train": ["train", "--base", source, "--data", data, "--steps", "1"],
        "merge": ["merge", source, adapter],
    }
    done = run_cli(*arguments[command], "-o", tmp_path / "out")
    assert done.code in (2, 5), done.stderr
    assert f"quantized with {kind}" in done.stderr
    assert f"run: adaptkit dequantize {source} -o PLAIN; then " in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpt_oss_is_quantized_and_trained_from_its_release(mxfp4, tmp_path, run_cli):
    dequantize(mxfp4, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "nf4", QuantizeOptions(moe="quantize"))
    data = tiny.write_instructions(tmp_path / "rows.jsonl")
    options = ["--steps", "1", "--max-length", "64"]
    done = run_cli("train", "--base", tmp_path / "nf4", "--data", data, "-o", tmp_path / "adapter", *options)
    assert done.code == 0, done.stderr
    done = run_cli("merge", tmp_path / "plain", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("holder", ["", "text_config"])
def test_the_quantization_is_removed_wherever_the_configuration_states_it(fp8, copy_of, tmp_path, holder):
    """transformers also reads it from the language model's configuration, and would load the result as FP8."""
    folder = copy_of(fp8)
    config = Checkpoint(folder).config
    stated = config.pop("quantization_config")
    changed = config | {"text_config": {"quantization_config": stated, "x": 1}} if holder else config
    (folder / "config.json").write_text(json.dumps(changed if holder else changed | {"quantization_config": stated}))
    dequantize(folder, tmp_path / "plain")
    expected = config | ({"text_config": {"x": 1}} if holder else {})
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == expected
    dequantize(fp8, tmp_path / "same")
    made, same = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "same"))
    assert all(torch.equal(made[name], weight) for name, weight in same.items())


@pytest.mark.parametrize("stated", ["32,32", [32], [32.0, 32.0], [True, True], [0, 32], [64, 64], [10**30, 32]])
def test_a_stated_block_size_that_does_not_fit_is_refused(fp8, copy_of, tmp_path, stated):
    """Blocks of equal size are assumed only if nothing is stated: they can fit by chance."""
    folder = copy_of(fp8)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": stated})
    with pytest.raises(CheckpointError, match=r"(weight_block_size is|do not fit)"):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_block_size_beyond_the_matrix_is_the_matrix(copy_of, tmp_path):
    one = released.write_fp8(tmp_path / "one", block=(128, 128))
    two = copy_of(one, "two")
    edit_json(two / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [10**30] * 2})
    for folder in (one, two):
        dequantize(folder, folder.with_name(f"{folder.name}-plain"))
    made = [load_file(tmp_path / f"{name}-plain" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(made[0][name], weight) for name, weight in made[1].items())


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight_scale_inv",
        "lm_head.weight_scale_inv",
        "lm_head.activation_scale",
        "model.layers.0.mlp.experts.down_proj_activation_scale",
        "x_scale_inv",
    ],
)
def test_a_scale_without_a_weight_is_refused(fp8, copy_of, tmp_path, name):
    """Otherwise the result would hold it, and be taken for quantized."""
    dtype = torch.float8_e4m3fn if name == "x_scale_inv" else torch.float32
    folder = rewritten(copy_of(fp8), lambda tensors: tensors.update({name: torch.ones(1).to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name}"):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def change_scale(tensors, shape=None, dtype=None):
    old = tensors[f"{GATE}_scale_inv"]
    tensors[f"{GATE}_scale_inv"] = torch.ones(shape or old.shape, dtype=dtype or old.dtype)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop(f"{GATE}_scale_inv"), r"gate_proj\.weight_scale_inv is missing"),
        (lambda tensors: tensors.update({GATE: tensors[GATE].float().to(torch.float8_e5m2)}), "F8_E5M2 instead of"),
        (lambda tensors: change_scale(tensors, (3, 5)), r"scales F32 \[3, 5\] of blocks of \[32, 32\] do not fit"),
        (lambda tensors: change_scale(tensors, (2, 4, 2)), "do not fit"),
        (lambda tensors: change_scale(tensors, dtype=torch.int32), "scales I32"),
    ],
)
def test_malformed_fp8_is_refused(fp8, copy_of, tmp_path, change, problem):
    folder = rewritten(copy_of(fp8), change)
    with pytest.raises(CheckpointError, match=problem):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("kind", "part"), [("fp8", "code"), ("fp8", "scale"), ("fp8", "infinite scale"), ("mxfp4", "scale")]
)
def test_nan_is_refused(request, kind, part, copy_of, tmp_path, run_cli):
    folder = copy_of(request.getfixturevalue(kind))
    with edited_tensors(folder / "model.safetensors") as tensors:
        if kind == "mxfp4":
            tensors[f"{EXPERTS}_scales"][1, 3, 0] = 255
        elif part == "code":
            tensors[GATE].view(torch.uint8)[7, 5] = 255
        else:
            tensors[f"{GATE}_scale_inv"][1, 1] = torch.inf if part.startswith("infinite") else torch.nan
    done = run_cli("dequantize", folder, "-o", tmp_path / "out")
    assert done.code == 5
    assert f"{GATE if kind == 'fp8' else EXPERTS}: a code or constant is NaN or infinite" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_weight_that_is_too_large_for_the_dtype_is_named(fp8, copy_of, tmp_path):
    folder = copy_of(fp8)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors[f"{GATE}_scale_inv"] *= 1e7
    with pytest.raises(NonFiniteError, match=f"{GATE}: a weight is too large for F16") as caught:
        dequantize(folder, tmp_path / "out", DequantizeOptions(dtype="float16"))
    assert "--dtype bfloat16 or float32" in caught.value.hint
    dequantize(folder, tmp_path / "out")


def test_mxfp4_of_another_kind_of_model_is_refused(mxfp4, copy_of, tmp_path):
    """Only of gpt-oss is it known that its 16-bit weights are transposed."""
    folder = copy_of(mxfp4)
    edit_json(folder / "config.json", model_type="qwen3_moe")
    with pytest.raises(CheckpointError, match="MXFP4 in a model of type 'qwen3_moe'"):
        dequantize(folder, tmp_path / "out")


def test_experts_that_are_there_twice_are_refused(mxfp4, copy_of, tmp_path):
    folder = rewritten(copy_of(mxfp4), lambda tensors: tensors.update({EXPERTS: torch.zeros(4, 64, 128)}))
    with pytest.raises(CheckpointError, match=f"{EXPERTS} is there both plain and quantized"):
        dequantize(folder, tmp_path / "out")


def test_scales_of_another_shape_than_the_codes_are_refused(mxfp4, copy_of, tmp_path):
    name = f"{EXPERTS}_scales"
    folder = rewritten(copy_of(mxfp4), lambda tensors: tensors.update({name: tensors[name][:, :5]}))
    with pytest.raises(CheckpointError, match="not experts in MXFP4"):
        dequantize(folder, tmp_path / "out")


@pytest.mark.parametrize("shape", [(0, 128, 2), (4, 0, 2), (4, 128, 0)])
def test_experts_without_weights_are_refused(mxfp4, copy_of, tmp_path, shape):
    parts = {f"{EXPERTS}_blocks": torch.zeros(*shape, 16), f"{EXPERTS}_scales": torch.zeros(shape)}
    folder = rewritten(copy_of(mxfp4), lambda tensors: tensors.update({n: t.byte() for n, t in parts.items()}))
    with pytest.raises(CheckpointError, match="not experts in MXFP4"):
        dequantize(folder, tmp_path / "out")


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_half_of_experts_is_refused(mxfp4, copy_of, tmp_path, part):
    folder = rewritten(copy_of(mxfp4), lambda tensors: tensors.pop(f"{EXPERTS}_{part}"))
    problem = "scales belongs to no quantized weight" if part == "blocks" else "scales is missing"
    with pytest.raises(CheckpointError, match=f"{EXPERTS}_{problem}"):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_value_that_is_too_large_even_for_bfloat16_is_named_without_a_warning(mxfp4, copy_of, tmp_path, run_cli):
    folder = copy_of(mxfp4)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors[f"{EXPERTS}_scales"][1, 3, 0] = 254
        tensors[f"{EXPERTS}_blocks"][1, 3, 0] = 0x77
    done = run_cli("dequantize", folder, "-o", tmp_path / "out")
    assert done.code == 5
    assert done.stderr.startswith(f"error: {EXPERTS}: a weight is too large for BF16\nhint: use --dtype float32")


def test_a_product_beyond_float32_is_named_without_a_warning(fp8, copy_of, tmp_path, run_cli):
    folder = rewritten(copy_of(fp8), lambda tensors: tensors[f"{GATE}_scale_inv"].fill_(3e38))
    done = run_cli("dequantize", folder, "-o", tmp_path / "out", "--dtype", "float32")
    assert done.code == 5
    assert done.stderr.startswith(f"error: {GATE}: a weight is too large for F32\nhint: ")


def test_a_changed_code_changes_the_result(mxfp4, copy_of, tmp_path):
    folder = copy_of(mxfp4)
    dequantize(mxfp4, tmp_path / "one")
    flip(folder / "model.safetensors", Checkpoint(folder).tensors[f"{EXPERTS}_blocks"].position)
    dequantize(folder, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    assert differ == [EXPERTS]
    assert (one[EXPERTS] != two[EXPERTS]).nonzero().tolist() == [[0, 0, 0]]
