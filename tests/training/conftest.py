"""Quantized tiny models for the trainer."""

import pytest
import tiny

from adaptkit.operations.quantize import quantize


@pytest.fixture(scope="session")
def deep_nf4(made):
    """Seven layers, so that segments differ in length."""
    quantize(tiny.write_llama(made / "deep", layers=7), made / "deep-nf4")
    return made / "deep-nf4"


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("the rivers in the north are quiet and the metals at night are not. There are nine whales. " * 12)
    return path
