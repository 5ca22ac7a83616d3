"""Weights in few bits are decoded in runs of any multiple of their unit, so that memory does not grow with a matrix."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import released
import torch
from folders import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adaptkit.checkpoint.decoded import open_plain
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.formats._find import stored_weights
from adaptkit.numerics.dtypes import BFLOAT16


def write_alone(folder, tensors, model_type="llama", block=None):
    """Write a checkpoint that holds these tensors only."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    method = "mxfp4" if model_type == "gpt_oss" else "fp8"
    (folder / "config.json").write_text("{}")
    quantization = {"quant_method": method, "weight_block_size": block}
    edit_json(folder / "config.json", model_type=model_type, quantization_config=quantization)
    return folder


@pytest.mark.parametrize(
    "write",
    [partial(released.write_fp8, block=(16, 64)), released.write_mxfp4, released.write_deepseek_v4],
    ids=["fp8", "mxfp4", "deepseek_v4"],
)
def test_a_run_is_a_part_of_the_whole(write, tmp_path):
    files = Checkpoint(write(tmp_path / "release"))
    weights = stored_weights(files, quantization_found(files))

    @settings(max_examples=40)
    @given(st.sampled_from(weights), st.data())
    def check(weight, data):
        count = int(np.prod(weight.shape))
        units = count // weight.unit
        first = data.draw(st.integers(0, units - 1))
        some = data.draw(st.integers(1, units - first))
        whole = weight.decode(files, 0, count, np.dtype(np.float32))
        run = weight.decode(files, first * weight.unit, some * weight.unit, np.dtype(np.float32))
        start, stop = first * weight.unit, (first + some) * weight.unit
        assert run.tobytes() == whole[start:stop].tobytes()

    check()


SIZES = st.sampled_from([1, 3, 32, 100, 128, 200, 300])


@settings(max_examples=60)
@given(shape=st.tuples(st.integers(1, 3), SIZES, SIZES), block=st.tuples(SIZES, SIZES), data=st.data())
def test_rows_of_fp8_are_codes_times_scales_for_any_block(tmp_path_factory, shape, block, data):
    stack, rows, columns = shape
    grid = stack, -(-rows // min(block[0], rows)), -(-columns // min(block[1], columns))
    torch.manual_seed(0)
    codes, scales = released.finite_codes(shape), torch.rand(grid) * 1e-3 - 5e-4
    tensors = {"x.weight": codes, "x.weight_scale_inv": scales}
    files = Checkpoint(write_alone(tmp_path_factory.mktemp("fp8"), tensors, block=list(block)))
    (weight,) = stored_weights(files, quantization_found(files))
    wide = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :rows, :columns]
    expected = (codes.float() * wide).bfloat16().reshape(-1, columns)
    first = data.draw(st.integers(0, stack * rows - 1))
    count = data.draw(st.integers(1, stack * rows - first))
    found = weight.decode(files, first * columns, count * columns, BFLOAT16)
    assert found.tobytes() == expected[first : first + count].view(torch.uint8).numpy().tobytes()


def peak_of_one_row(folder):
    """Return the memory that reading the first row of the first weight takes, and the size of that weight, in bytes."""
    view = open_plain(folder)
    spec = view.spec(next(iter(view.weights)))
    view.read_flat(spec.name, 0, 64)  # fills the tables
    tracemalloc.start()
    view.read_flat(spec.name, 0, spec.shape[-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, spec.nbytes


def test_a_row_of_an_expert_takes_little_memory(tmp_path):
    grid = 2, 2048, 2048 // 32
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{name}_blocks": torch.zeros(*grid, 16, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(grid, dtype=torch.uint8),
    }
    peak, size = peak_of_one_row(write_alone(tmp_path / "model", tensors, "gpt_oss"))
    assert peak < size / 2 / 8


def test_a_row_takes_little_memory_if_there_are_many_scales(tmp_path):
    codes, scales = torch.zeros(4096, 1024, dtype=torch.uint8), torch.ones(4096, 1024 // 32)
    tensors = {"x.weight": codes.view(torch.float8_e4m3fn), "x.weight_scale_inv": scales}
    peak, _ = peak_of_one_row(write_alone(tmp_path / "model", tensors, block=[1, 32]))
    assert peak < scales.nbytes / 4
