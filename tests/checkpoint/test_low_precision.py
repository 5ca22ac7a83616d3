"""Weights in few bits are decoded in runs of any multiple of their unit, so that memory does not grow with a matrix."""

import numpy as np
import pytest
import released
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.checkpoint.low_precision import low_precision_weights
from adaptkit.checkpoint.reader import Checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return {
        "fp8": released.write_fp8(folder / "fp8", block=(16, 64)),
        "mxfp4": released.write_mxfp4(folder / "mxfp4"),
        "deepseek_v4": released.write_deepseek_v4(folder / "deepseek_v4"),
    }


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "deepseek_v4"])
def test_a_run_is_a_part_of_the_whole_and_of_its_codes(folders, kind):
    files = Checkpoint(folders[kind])
    weights = low_precision_weights(files)

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
        assert run.values.tobytes() == whole.values[start:stop].tobytes()
        share = len(whole.raw) / count
        assert run.raw.tobytes() == whole.raw[int(start * share) : int(stop * share)].tobytes()

    check()
