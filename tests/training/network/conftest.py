"""A quantized tiny model, for tests of layers for a GPU."""

import pytest
import tiny

from adaptkit.operations.quantize import quantize


@pytest.fixture(scope="session")
def packed(made):
    folder = made / "packed"
    quantize(tiny.write_family(made / "packed-plain", "llama"), folder)
    return folder
