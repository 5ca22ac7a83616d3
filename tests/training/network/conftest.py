"""A quantized tiny model, for tests of layers for a GPU."""

import pytest
from adapted import packed_in


@pytest.fixture(scope="session")
def packed(made):
    return packed_in(made, "llama")
