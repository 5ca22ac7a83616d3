"""Models released in FP8 or MXFP4 become the 16-bit checkpoints that transformers computes from them."""

import json
import re

import pytest
import released
import tiny
import torch
from folders import edit_json, edited_tensors, rewritten
from safetensors.torch import load_file

from adaptkit.checkpoint.manifest import TensorRecord, require_manifest, tensors_root
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize
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


@pytest.mark.parametrize(
    ("block", "dtype"), [((32, 32), "bfloat16"), ((16, 64), "float32"), (None, "bfloat16"), ((32, 32), "float32")]
)
def test_fp8_gives_the_weights_of_transformers(tmp_path, block, dtype):
    from transformers import FineGrainedFP8Config

    folder = released.write_fp8(tmp_path / "model", block=block)
    report = dequantize(folder, tmp_path / "plain", DequantizeOptions(dtype=dtype))
    assert (report.dequantized, report.input_scales) == (14, 0)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    expected = loaded(folder, quantization_config=config, dtype=torch.float32)  # earlier versions round scales, too
    found = loaded(tmp_path / "plain", dtype=getattr(torch, dtype))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight.to(found[name].dtype)) for name, weight in expected.items())
    assert load_file(tmp_path / "plain" / "model.safetensors")[GATE].dtype == getattr(torch, dtype)


def test_deepseek_v4_gives_the_weights_of_transformers(tmp_path):
    """Experts in MXFP4 beside FP8, scales that are exponents, and names of their own."""
    from transformers import FineGrainedFP8Config

    folder = released.write_deepseek_v4(tmp_path / "model")
    report = dequantize(folder, tmp_path / "plain")
    assert report.dequantized == 2 * (2 + 3 + 4 * 3)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32), scale_fmt="ue8m0", expert_dtype="fp4")
    expected = loaded(folder, quantization_config=config, dtype=torch.bfloat16)
    found = loaded(tmp_path / "plain", dtype=torch.bfloat16)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert found["model.layers.0.mlp.experts.down_proj"].unique().numel() > 40


EXPONENTS = torch.tensor([0, 1, 100, 127, 130, 200], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("codes", "name", "as_bytes"),
    [
        ("fp8", f"{GATE}_scale_inv", True),
        ("fp8", GATE.replace("weight", "scale"), False),
        ("fp8", GATE.replace("w", "qscale_w"), True),
        ("mxfp4", f"{GATE}_scale_inv", False),
        ("mxfp4", GATE.replace("weight", "scale"), True),
    ],
)
def test_scales_may_be_exponents_under_several_names(tmp_path, as_bytes, name, codes):
    folder = tiny.write_llama(tmp_path / "model")
    rows, columns = 64, 96
    exponents = EXPONENTS[torch.randint(len(EXPONENTS), (rows, 3) if codes == "mxfp4" else (2, 3))]
    packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors[GATE] = packed if codes == "mxfp4" else released.finite_codes((rows, columns))
        tensors[name] = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
        values = tensors[GATE].double() if codes == "fp8" else levels_of(packed)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    dequantize(folder, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    spread = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    expected = values * (spread if codes == "mxfp4" else spread.repeat_interleave(32, 0))
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert name not in stored
    assert torch.equal(stored[GATE], expected.float())


def levels_of(packed):
    """E2M1: a sign, two bits of exponent with bias 1, one bit of fraction; the earlier weight in the low half."""
    codes = torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).reshape(len(packed), -1)
    exponent, fraction = (codes >> 1 & 3).double(), (codes & 1).double()
    size = torch.where(exponent == 0, fraction / 2, (1 + fraction / 2) * torch.exp2(exponent - 1))
    return torch.where(codes & 8 != 0, -size, size)


SCALE, PLAIN_SCALE = f"{GATE}_scale_inv", GATE.replace("weight", "scale")
E8M0 = torch.float8_e8m0fnu


def in_mxfp4(columns, **scale):
    """Put codes of MXFP4 in place of a weight in FP8."""
    return lambda t: (t.pop(SCALE), t.update({GATE: torch.zeros(64, columns, dtype=torch.int8)} | scale))


def adding(name, shape=(1,), dtype=torch.float32):
    return lambda t: t.update({name: torch.ones(shape).to(dtype)})


def experts_of(shape):
    parts = {f"{EXPERTS}_blocks": torch.zeros(*shape, 16), f"{EXPERTS}_scales": torch.zeros(shape)}
    return lambda t: t.update({name: tensor.byte() for name, tensor in parts.items()})


def block(size):
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}


NO_WEIGHT, NOT_EXPERTS, NO_FIT = "belongs to no quantized weight", "not experts in MXFP4", "do not fit"
MALFORMED = {
    "codes without scales": ("fp8", in_mxfp4(48), r"not a weight in MXFP4: .*weight_scale_inv is missing"),
    "float scales of MXFP4": ("fp8", in_mxfp4(48, **{SCALE: torch.ones(64, 3)}),
                              r"not a weight in MXFP4: codes I8 \[64, 48\], scales F32 \[64, 3\]"),
    "no whole blocks": ("fp8", in_mxfp4(40, **{SCALE: torch.ones(64, 2).to(E8M0)}), "not a weight in MXFP4"),
    "two names of scales": ("fp8", adding(PLAIN_SCALE, (2, 3)), r"weight_scale_inv and .*gate_proj\.scale are there"),
    "codes as bytes": ("fp8", lambda t: (t.pop(SCALE), t.update({GATE: torch.zeros(64, 48, dtype=torch.uint8)}),
                                         adding(PLAIN_SCALE, (64, 3), torch.uint8)(t)),
                       r"not a weight in FP8: U8 instead of F8_E4M3"),
    "no scales": ("fp8", lambda t: t.pop(SCALE), r"gate_proj\.weight_scale_inv is missing"),
    "E5M2": ("fp8", lambda t: t.update({GATE: t[GATE].float().to(torch.float8_e5m2)}), "F8_E5M2 instead of"),
    "scales of other blocks": ("fp8", adding(SCALE, (3, 5)), r"scales F32 \[3, 5\] of blocks of \[32, 32\] do not fit"),
    "integer scales": ("fp8", adding(SCALE, (4, 2), torch.int32), "scales I32"),
    # Otherwise the result would hold these, and be taken for quantized.
    **{
        f"a stray {name}": ("fp8", adding(name, dtype=dtype), name)
        for name, dtype in (
            ("model.norm.weight_scale_inv", torch.float32), ("lm_head.activation_scale", torch.float32),
            ("model.norm.qscale_weight", torch.float32),
            ("model.norm.scale", E8M0),
        )
    },
    # Blocks of equal size are assumed only if nothing is stated: they can fit by chance.
    **{f"blocks {size}": ("fp8", block(size), "weight_block_size is|do not fit")
       for size in ("32,32", [32], [True, True], [0, 32], [64, 64])},
    "another kind of model": ("mxfp4", {"model_type": "qwen3_moe"}, "MXFP4 in a model of type 'qwen3_moe'"),
    "experts twice": ("mxfp4", adding(EXPERTS, (4, 64, 128)), f"{EXPERTS} is there both plain and quantized"),
    "other scales": ("mxfp4", lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"][:, :5]}), NOT_EXPERTS),
    **{f"experts {shape}": ("mxfp4", experts_of(shape), NOT_EXPERTS)
       for shape in ((0, 128, 2), (4, 0, 2), (4, 128, 0))},
    "no blocks": ("mxfp4", lambda t: t.pop(f"{EXPERTS}_blocks"), f"{EXPERTS}_scales {NO_WEIGHT}"),
    "no scales of blocks": ("mxfp4", lambda t: t.pop(f"{EXPERTS}_scales"), f"{EXPERTS}_scales is missing"),
}  # fmt: skip
"""A release, a change of its tensors or configuration, and words of the error."""


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_release_is_refused(request, copy_of, tmp_path, name):
    kind, change, problem = MALFORMED[name]
    folder = copy_of(request.getfixturevalue(kind))
    if isinstance(change, dict):
        edit_json(folder / "config.json", **change)
    else:
        rewritten(folder, change)
    with pytest.raises(CheckpointError, match=problem):
        dequantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def in_experts(scale, code=None):
    def change(tensors):
        tensors[f"{EXPERTS}_scales"][1, 3, 0] = scale
        if code is not None:
            tensors[f"{EXPERTS}_blocks"][1, 3, 0] = code

    return change


NAN, TOO_LARGE = "{}: a code or constant is NaN or infinite", "{}: a weight is too large for {}"
NOT_FINITE = {
    "NaN code": ("fp8", lambda t: t[GATE].view(torch.uint8)[7].fill_(255), "bfloat16", NAN.format(GATE)),
    "NaN scale": ("fp8", lambda t: t[SCALE][1].fill_(torch.nan), "bfloat16", NAN.format(GATE)),
    "infinite scale": ("fp8", lambda t: t[SCALE][1].fill_(torch.inf), "bfloat16", NAN.format(GATE)),
    "NaN in MXFP4": ("mxfp4", in_experts(255), "bfloat16", NAN.format(EXPERTS)),
    "beyond float16": ("fp8", lambda t: t[SCALE].mul_(1e7), "float16", TOO_LARGE.format(GATE, "F16")),
    "beyond bfloat16": ("mxfp4", in_experts(254, 0x77), "bfloat16", TOO_LARGE.format(EXPERTS, "BF16")),
    "beyond float32": ("fp8", lambda t: t[SCALE].fill_(3e38), "float32", TOO_LARGE.format(GATE, "F32")),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_values_that_no_dtype_holds_are_named_without_a_warning(request, copy_of, tmp_path, run_cli, name):
    kind, change, dtype, error = NOT_FINITE[name]
    folder = rewritten(copy_of(request.getfixturevalue(kind)), change)
    found, hint = run_cli("dequantize", folder, "-o", tmp_path / "out", "--dtype", dtype).refusal(5)
    assert found == f"error: {error}"
    wider = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}.get(dtype, "")
    assert "NaN" in error or wider in hint
    assert not list(tmp_path.glob("out*"))


def test_a_plain_scale_and_signed_bytes_of_no_weight_stay(fp8, copy_of, tmp_path):
    """As norms' scales are named in some models; only scales of codes are parts."""
    others = {"model.norm.scale": torch.rand(3), "table": torch.arange(4, dtype=torch.int8)}
    folder = rewritten(copy_of(fp8), lambda tensors: tensors.update(others))
    dequantize(folder, tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in others.items())


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
    """Also under the name that Mistral gives them."""
    folder = released.write_fp8(tmp_path / "model", block=None, input_scales=True)
    rewritten(folder, adding(GATE.replace("weight", "qscale_act")))
    done = run_cli("dequantize", folder, "-o", tmp_path / "plain")
    assert done.code == 0, done.stderr
    assert re.search(r"left out +15 scales of 8-bit inputs", done.stdout)
    assert not any("scale" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_a_plain_checkpoint_that_says_it_is_released_is_told_what_to_remove(llama, copy_of, command, tmp_path, run_cli):
    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    error, hint = run_cli(command, folder, "-o", tmp_path / "out").refusal(5)
    assert "is quantized with fp8" in error
    assert "but no weight is" in error
    assert "remove quantization_config from its config.json" in hint


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_manifest_records_every_tensor_of_the_source_and_the_operation_can_be_repeated(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    dequantize(source, tmp_path / "plain", DequantizeOptions(dtype="float32"))
    manifest = require_manifest(tmp_path / "plain")
    (parent,) = manifest.parents
    checkpoint = Checkpoint(source)
    records = [
        TensorRecord.of(located.spec, released.fingerprint(checkpoint, name))
        for name, located in checkpoint.tensors.items()
    ]
    assert parent.tensors_root == tensors_root(records)
    assert manifest.operation["options"]["method"] == kind
    config = Checkpoint(tmp_path / "plain").config
    assert config == {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (made,) = verify(tmp_path / "plain", VerifyOptions(parents=(source,), recompute=True)).recomputed
    assert made[1] == "same bytes"


def test_an_adapter_merges_into_the_result_without_a_flag(tmp_path):
    """Everybody trains on these values, for want of others; what quantize made of a 16-bit checkpoint is refused."""
    dequantize(released.write_fp8(tmp_path / "model"), tmp_path / "plain")
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", tmp_path / "plain")
    assert merge(tmp_path / "plain", adapter, tmp_path / "merged").merged == 14
    quantize(tmp_path / "plain", tmp_path / "nf4")
    dequantize(tmp_path / "nf4", tmp_path / "again")
    with pytest.raises(BaseMismatchError, match="was quantized and dequantized"):
        merge(tmp_path / "again", adapter, tmp_path / "other")


def test_train_refuses_stacked_experts_and_says_what_to_run(mxfp4, tmp_path, run_cli):
    data = tiny.write_instructions(tmp_path / "rows.jsonl")
    done = run_cli("train", "--base", mxfp4, "--data", data, "--steps", "1", "-o", tmp_path / "out")
    error, hint = done.refusal(2)
    assert "is quantized with mxfp4, which cannot be trained" in error
    assert hint == f"hint: run: adaptkit quantize {mxfp4} -o NF4; then train on NF4"
    assert not (tmp_path / "out").exists()


def test_merging_into_stacked_experts_is_refused_but_beside_them_it_is_not(mxfp4, tmp_path):
    dequantize(mxfp4, tmp_path / "plain")
    attention = tiny.write_peft_adapter(tmp_path / "attention", tmp_path / "plain", target_modules=["q_proj"])
    merge(mxfp4, attention, tmp_path / "merged")
    before, after = Checkpoint(mxfp4), Checkpoint(tmp_path / "merged")
    assert {name for name in before.tensors if (before.read(name) != after.read(name)).any()} == {
        f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)
    }
    parameters = ["mlp.experts.down_proj"]
    experts = tiny.write_peft_adapter(
        tmp_path / "experts", tmp_path / "plain", target_modules=["q_proj"], target_parameters=parameters
    )
    with pytest.raises(CheckpointError, match="down_proj is in a layout in which a merge cannot change single weights"):
        merge(mxfp4, experts, tmp_path / "other")
    merge(mxfp4, experts, tmp_path / "sixteen", MergeOptions(format="plain"))
    merge(tmp_path / "plain", experts, tmp_path / "same")
    assert (tmp_path / "sixteen" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()


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
