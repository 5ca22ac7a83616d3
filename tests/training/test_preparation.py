"""Building the model of a run."""

import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.distributed import World
from adaptkit.training.inputs import read_inputs
from adaptkit.training.preparation import build


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", [{}, {"pack": True}, {"dora": True}])
def test_the_probes_of_a_model_leave_no_pages_of_its_base_resident(instructions, tmp_path, options):
    """Each probe runs the whole network; at 7 billion parameters, their pages were 4.4 GB that no step needs.

    DoRA starts from the norms of every weight.
    """
    quantize(tiny.write_llama(tmp_path / "16-bit", hidden=768, layers=8), tmp_path / "base")
    config = TrainConfig(
        base=str(tmp_path / "base"), data=(str(instructions),), rank=4, device="cpu", checkpointing="none",
        compute_dtype="bfloat16", **options,
    )  # fmt: skip
    inputs = read_inputs(config, tmp_path / "adapter", False)
    model, _ = build(inputs, World(torch.device("cpu")), (1, 32))
    codes = sum(layer.base.codes.nbytes for layer in model.linears.values())
    assert resident(tmp_path / "base/model.safetensors") < 0.3 * codes
    model.network(input_ids=torch.arange(8)[None], use_cache=False)
    assert resident(tmp_path / "base/model.safetensors") > 0.9 * codes  # without checkpointing, a step keeps them


def resident(file):
    """Bytes of a mapped file in this process's memory."""
    found = re.findall(rf"^\S+ .* {file}\n(?:\w+:.*\n)*?Rss: *(\d+) kB", Path("/proc/self/smaps").read_text(), re.M)
    return 1024 * sum(map(int, found))
