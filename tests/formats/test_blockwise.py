"""The parts of a quantized weight are those that bitsandbytes writes and reads."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import decode, encode

from adaptkit.errors import CheckpointError
from adaptkit.formats import nf4
from adaptkit.formats._format import Encoding
from adaptkit.numerics.dtypes import dtype_name
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import DTYPES

STATE_SUFFIX = nf4.FORMAT.state_suffix


def weight_of(shape, dtype=torch.bfloat16, seed=0):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
    return TensorSpec("x.weight", dtype_name(dtype), tuple(shape)), values


def parts_of(shape=(96, 64), dtype=torch.bfloat16, block_size=64, double_quant=True):
    spec, values = weight_of(shape, dtype)
    named = encode(spec, values, Encoding("nf4", block_size, double_quant))
    return {name.removeprefix("x.weight"): part for name, part in named.items()}


def state_of(parts):
    return json.loads(bytes(parts[STATE_SUFFIX].numpy()))


def with_state(parts, **changes):
    text = json.dumps(state_of(parts) | changes).encode()
    return parts | {STATE_SUFFIX: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bitsandbytes_reads_our_parts_and_gets_our_weights(double_quant, block_size):
    spec, values = weight_of((96, 256))
    named = encode(spec, values, Encoding("nf4", block_size, double_quant))
    codes = named.pop("x.weight")
    state = bnb.QuantState.from_dict({name.removeprefix("x.weight."): p for name, p in named.items()}, device="cpu")
    assert (state.blocksize, state.dtype, tuple(state.shape)) == (block_size, torch.bfloat16, (96, 256))
    theirs = bnb.dequantize_4bit(codes, state)
    ours = decode("x.weight", {k.removeprefix("x.weight"): p for k, p in named.items()} | {"": codes}).dequantize()
    assert torch.equal(theirs, ours)
    assert float((ours.float() - values.float()).norm() / values.float().norm()) < 0.12


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 12, 64), (4, 256, 128), (3, 384, 64)])  # 12, 512 and 384 blocks a matrix
def test_a_matrix_of_a_stack_dequantizes_to_its_part_of_the_stack(shape, name, double_quant):
    """Whether or not a group of 256 constants begins with the matrix."""
    spec, values = weight_of(shape)
    named = encode(spec, values, Encoding(name, 64, double_quant))
    stack = decode("x.weight", {key.removeprefix("x.weight"): part for key, part in named.items()})
    whole = stack.dequantize(torch.float32)
    for index, expected in enumerate(whole):
        matrix = stack.matrix(index)
        assert matrix.shape == shape[1:]
        assert torch.equal(matrix.dequantize(torch.float32), expected)
        assert matrix.codes.untyped_storage().data_ptr() == stack.codes.untyped_storage().data_ptr()


def test_our_parts_have_the_names_types_and_shapes_of_theirs():
    """Except for the padding of the JSON, since theirs is not aligned."""
    spec, values = weight_of((96, 256))
    codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = {f".{name}": part for name, part in state.as_dict(packed=True).items()} | {"": codes}
    ours = {name.removeprefix("x.weight"): part for name, part in encode(spec, values, Encoding()).items()}
    assert set(ours) == set(theirs)
    for name in set(ours) - {STATE_SUFFIX}:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name
    assert torch.equal(ours[""], theirs[""])
    assert torch.equal(ours[".quant_map"], theirs[".quant_map"])
    assert torch.equal(ours[".nested_quant_map"], theirs[".nested_quant_map"])
    found, expected = state_of(ours), json.loads(bytes(theirs[STATE_SUFFIX].numpy()))
    assert found.pop("nested_offset") == pytest.approx(expected.pop("nested_offset"), rel=2e-7)
    assert found == expected


def test_we_read_what_bitsandbytes_writes():
    _, values = weight_of((64, 128))
    for compress in (True, False):
        codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=compress)
        parts = {f".{name}": part for name, part in state.as_dict(packed=True).items()} | {"": codes}
        assert torch.equal(decode("x", parts).dequantize(), bnb.dequantize_4bit(codes, state))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 90)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from([1e-30, 1.0, 1e4]),
)
def test_part_specs_predict_the_encoded_parts_and_all_parts_are_aligned(shape, dtype, block_size, double_quant, size):
    spec, values = weight_of(shape, dtype)
    values = (values.double() * size).clamp(-6e4, 6e4).to(dtype)
    planned = nf4.FORMAT.specs(spec, Encoding("nf4", block_size, double_quant))
    made = encode(spec, values, Encoding("nf4", block_size, double_quant))
    assert list(made) == [part.name for part in planned]
    position = 0
    for part in planned:
        tensor = made[part.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[part.dtype], part.shape)
        assert position % DTYPES[part.dtype].itemsize == 0
        position += part.nbytes
    assert position % 8 == 0
    back = decode("x", {name.removeprefix("x.weight"): part for name, part in made.items()})
    assert (back.shape, back.block_size) == (shape, block_size)
    assert back.dequantize().shape == shape


def test_the_state_of_a_float32_weight_says_bfloat16_for_unsloth():
    assert state_of(parts_of(dtype=torch.float32))["dtype"] == "bfloat16"
    assert state_of(parts_of(dtype=torch.float16))["dtype"] == "float16"


def test_quantization_levels_stored_in_the_file_are_used():
    parts = parts_of()
    halved = parts | {".nested_quant_map": parts[".nested_quant_map"] / 2}
    assert not torch.equal(decode("x", parts).absmax, decode("x", halved).absmax)


@pytest.mark.parametrize("suffix", ["", ".absmax", STATE_SUFFIX, ".nested_absmax"])
def test_a_missing_part_is_refused(suffix):
    parts = parts_of()
    del parts[suffix]
    with pytest.raises(CheckpointError, match=r"^x\.weight: "):
        decode("x.weight", parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [96, 65]},
        {"shape": [96]},
        {"shape": [-96, -64]},
        {"shape": [0, 64]},
        {"shape": []},
        {"shape": None},
        {"shape": [1e999, 64]},
        {"shape": [2**62, 64]},
        {"blocksize": 0},
        {"blocksize": -64},
        {"blocksize": 32},
        {"blocksize": "many"},
        {"dtype": "int8"},
        {"nested_blocksize": 128},
        {"nested_offset": None},
        {"nested_offset": "x"},
    ],
)
def test_a_state_that_does_not_fit_its_parts_is_refused(changes):
    with pytest.raises(CheckpointError, match=r"^x\.weight: "):
        decode("x.weight", with_state(parts_of(), **changes))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b'"nf4"'])
def test_a_state_that_is_not_a_json_object_is_refused(text):
    blob = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"^x\.weight: "):
        decode("x.weight", parts_of() | {STATE_SUFFIX: blob})


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("", lambda t: t[:-1]),
        ("", lambda t: t.view(torch.int8)),
        (".absmax", lambda t: t[:-1]),
        (".absmax", lambda t: t.float()),
        (".nested_absmax", lambda t: torch.cat([t, t])),
        (".nested_quant_map", lambda t: t[:100]),
        (".nested_quant_map", lambda t: t.double()),
    ],
)
def test_a_part_of_wrong_size_or_dtype_is_refused(suffix, change):
    parts = parts_of()
    with pytest.raises(CheckpointError, match=r"^x\.weight: "):
        decode("x.weight", parts | {suffix: change(parts[suffix])})


def test_the_error_for_constants_that_do_not_fit_gives_all_sizes():
    parts = parts_of(double_quant=False)
    parts[".absmax"] = parts[".absmax"][:-1]
    said = r"3072 bytes of codes and constants of shape \[95\] do not make \[96, 64\]"
    with pytest.raises(CheckpointError, match=said):
        decode("weight", parts)


def test_the_configuration_is_the_one_that_transformers_would_write():
    from transformers import BitsAndBytesConfig

    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    ours = nf4.FORMAT.config_block(["lm_head"], Encoding())
    assert {key: theirs.get(key) for key in ours} == ours


@pytest.mark.parametrize(("dtype", "back"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "BF16")])
def test_a_weight_is_decoded_in_the_type_that_its_state_names(dtype, back):
    weight = decode("x.weight", parts_of(dtype=dtype))
    assert weight.dtype == weight.dequantize().dtype == DTYPES[back]
