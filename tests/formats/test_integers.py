"""Integers of few bits are decoded as compressed-tensors does; GPTQ's, by a loop over bits written out here."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from folders import edit_json
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError
from adaptkit.formats._find import stored_weights
from adaptkit.numerics.dtypes import BFLOAT16

ROWS, COLUMNS = 24, 192
FLOAT32 = np.dtype(np.float32)


def write(folder, tensors, **quantization):
    """Write a checkpoint of these tensors, whose names begin with ``m.``, and return it."""
    folder.mkdir(exist_ok=True)
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return Checkpoint(folder)


def weight_of(files):
    (found,) = stored_weights(files, quantization_found(files))
    return found


def decoded(files, dtype=FLOAT32):
    """Decode the only weight, in runs of five rows, which are no whole words."""
    weight = weight_of(files)
    rows, columns = weight.shape
    runs = [(first, min(5, rows - first)) for first in range(0, rows, 5)]
    values = [weight.decode(files, first * columns, count * columns, dtype) for first, count in runs]
    return np.concatenate(values).reshape(weight.shape)


def packed(bits, group, symmetric, dtype=torch.bfloat16, rows=ROWS):
    """Return what compressed-tensors stores for a random matrix, and what it makes of that again."""
    torch.manual_seed(bits)
    by = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **by)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = 1 if group is None else COLUMNS // group
    half = 1 << (bits - 1)
    state = {
        "weight": torch.randn(rows, COLUMNS, dtype=dtype) * half,
        "weight_scale": (torch.rand(rows, groups) + 0.5).to(dtype) * torch.tensor([1e-3, -1.0, 1e4])[:, None]
        .repeat(rows // 3, 1).to(dtype),
        "weight_zero_point": torch.randint(-half, half, (rows, groups), dtype=torch.int8),
    }  # fmt: skip
    if symmetric:
        del state["weight_zero_point"]
    stored = PackedQuantizationCompressor.compress(state, scheme)
    return stored, PackedQuantizationCompressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"),
    [
        (4, 64, True, torch.bfloat16),
        (4, 32, False, torch.bfloat16),
        (4, None, True, torch.float16),
        (8, 96, False, torch.float32),
        (3, 32, False, torch.bfloat16),
        (5, None, False, torch.bfloat16),
        (1, 64, True, torch.bfloat16),
        (6, 192, True, torch.bfloat16),
    ],
)
def test_packed_integers_are_decoded_as_compressed_tensors_does(tmp_path, bits, group, symmetric, dtype):
    stored, expected = packed(bits, group, symmetric, dtype)
    files = write(tmp_path / "a", stored, quant_method="compressed-tensors")
    kind = {torch.bfloat16: BFLOAT16, torch.float16: np.dtype(np.float16), torch.float32: FLOAT32}[dtype]
    found = torch.from_numpy(decoded(files, kind).view(f"i{kind.itemsize}")).view(dtype)
    assert weight_of(files).name == "m.weight"
    assert torch.equal(found, expected)


def test_columns_may_name_their_groups(tmp_path):
    """What they name is what the same column has if the constants of the two groups are exchanged."""
    stored, _ = packed(4, 96, False)
    named = stored | {"weight_g_idx": 1 - torch.arange(COLUMNS, dtype=torch.int32) // 96}
    exchanged = stored | {name: stored[name].flip(1) for name in ("weight_scale", "weight_zero_point")}
    found, expected = (
        decoded(write(tmp_path / str(len(parts)), parts, quant_method="compressed-tensors"))
        for parts in (named, exchanged)
    )
    assert np.array_equal(found, expected)
    assert not np.array_equal(stored["weight_scale"][:, 0], stored["weight_scale"][:, 1])


@pytest.mark.parametrize("group", [32, 192])
def test_awq_is_decoded_as_its_converter_to_compressed_tensors_does(tmp_path, group):
    torch.manual_seed(0)
    any_word = -(2**31), 2**31
    stored = {
        "qweight": torch.randint(*any_word, (COLUMNS, ROWS // 8), dtype=torch.int32),
        "qzeros": torch.randint(*any_word, (COLUMNS // group, ROWS // 8), dtype=torch.int32),
        "scales": (torch.rand(COLUMNS // group, ROWS) + 0.1).half(),
    }
    files = write(tmp_path / "a", stored, quant_method="awq", bits=4, group_size=group, version="gemm")
    converted = AutoAWQConverter(group_size=group).process({f"m.{name}": part for name, part in stored.items()})
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {name.removeprefix("m."): part for name, part in converted.items()}
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert np.array_equal(decoded(files, np.dtype(np.float16)), expected.half().numpy())


def bits_of(words, bits, count):
    """Return the first codes of a stream of bits in words, lowest first."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [stream >> (bits * place) & ((1 << bits) - 1) for place in range(count)]


@pytest.mark.parametrize(("bits", "form"), [(2, "gptq"), (3, "gptq"), (4, "gptq"), (4, "gptq_v2"), (8, "gptq_v2")])
@pytest.mark.parametrize("order", ["in order", "desc_act"])
def test_gptq_is_decoded_by_its_definition(tmp_path, bits, form, order):
    torch.manual_seed(bits)
    rows, group, any_word = 32, 64, (-(2**31), 2**31)
    groups = COLUMNS // group
    stored = {
        "qweight": torch.randint(*any_word, (COLUMNS * bits // 32, rows), dtype=torch.int32),
        "qzeros": torch.randint(*any_word, (groups, rows * bits // 32), dtype=torch.int32),
        "scales": (torch.rand(groups, rows) + 0.1).half(),
        "g_idx": torch.arange(COLUMNS, dtype=torch.int32) // group,
    }
    if order == "desc_act":
        stored["g_idx"] = stored["g_idx"][torch.randperm(COLUMNS)]
    files = write(tmp_path / "a", stored, quant_method="gptq", bits=bits, checkpoint_format=form, desc_act=True)
    found = decoded(files)
    zeros = np.array([bits_of(row, bits, rows) for row in stored["qzeros"]])
    zeros = (zeros + (form == "gptq")) % (1 << bits)
    scales = stored["scales"].float().numpy()
    for row in range(0, rows, 7):
        codes = bits_of(stored["qweight"][:, row], bits, COLUMNS)
        expected = [
            np.float32(code - int(zeros[of, row])) * scales[of, row]
            for code, of in zip(codes, stored["g_idx"].tolist(), strict=True)
        ]
        assert np.array_equal(found[row], np.array(expected, np.float32))


def test_a_llama_of_packed_integers_is_dequantized_to_what_transformers_loads(tmp_path, llama, run_cli):
    """Embeddings and norms stay; transformers decodes with compressed-tensors."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "packed"
    folder.mkdir()
    tensors = load_file(llama / "model.safetensors")
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, begin = tensors.pop(name), name.removesuffix("weight")
        top = weight.unflatten(1, (-1, 32)).abs().amax(2)
        state = {"weight": weight, "weight_scale": (top / 7.5).to(weight.dtype)}
        tensors |= {begin + k: v.contiguous() for k, v in PackedQuantizationCompressor.compress(state, scheme).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    block = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": block, "input_activations": None}}
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": groups, "kv_cache_scheme": None,
        },
    )  # fmt: skip
    done = run_cli("dequantize", folder, "-o", tmp_path / "plain", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["dequantized"] == 7 * 2
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu").eval()(ids).logits
            for path in (tmp_path / "plain", folder)
        )
    assert torch.equal(ours, theirs)


def broken(stored, **changed):
    return {name: part for name, part in (stored | changed).items() if part is not None}


BAD = {
    "no scales": ({"weight_scale": None}, "m.weight_scale is missing"),
    "no shape": ({"weight_shape": None}, "m.weight_shape is missing"),
    "scales of another shape": ({"weight_scale": torch.ones(ROWS, 7).bfloat16()}, r"expected I32 \[3, 7\]"),
    "scales for other rows": ({"weight_scale": torch.ones(ROWS + 1, 6).bfloat16()}, "expected F32 or F16 or BF16"),
    "zero points of other rows": ({"weight_zero_point": torch.ones(2, 6).int()}, "m.weight_zero_point: is I32"),
    "another shape": ({"weight_shape": torch.tensor([ROWS, 50])}, "do not hold"),
    "no shape of a matrix": ({"weight_shape": torch.tensor([-1, 50])}, "is not the shape of a matrix"),
    "a scale of 0": ({"weight_scale": torch.zeros(ROWS, 6).bfloat16()}, "m.weight_scale: a scale is 0"),
    "a scale of NaN": ({"weight_scale": torch.full((ROWS, 6), torch.nan).bfloat16()}, "a scale is nan"),
    "a group that is not there": ({"weight_g_idx": torch.full((COLUMNS,), 6).int()}, "names group 6 of 6"),
    "a part of another layout": ({"other.weight_global_scale": torch.ones(1)}, "belongs to no quantized weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, case):
    changed, message = BAD[case]
    stored, _ = packed(4, 32, False)
    with pytest.raises(CheckpointError, match=message):
        decoded(write(tmp_path / "a", broken(stored, **changed), quant_method="compressed-tensors"))


def test_gptq_with_an_order_but_no_groups_of_columns_is_refused(tmp_path):
    stored = {
        "qweight": torch.zeros(COLUMNS // 8, 32, dtype=torch.int32),
        "qzeros": torch.zeros(3, 4, dtype=torch.int32),
        "scales": torch.ones(3, 32).half(),
    }
    plain = {"quant_method": "gptq", "bits": 4}
    assert decoded(write(tmp_path / "a", stored, **plain)).shape == (32, COLUMNS)
    for more, message in (
        ({"desc_act": True}, "m.g_idx is missing"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            weight_of(write(tmp_path / "b", stored, **plain, **more))
    with pytest.raises(CheckpointError, match="AWQ of version 'gemv'"):
        weight_of(write(tmp_path / "c", stored, quant_method="awq", version="gemv"))
