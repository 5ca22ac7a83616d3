"""A quantized tiny model of a family, for what layers of a GPU do."""

import pytest
import tiny

from adaptkit.operations.quantize import quantize


@pytest.fixture(scope="session")
def packed(made):
    folder = made / "packed"
    quantize(tiny.write_family(made / "packed-plain", "llama"), folder)
    return folder
