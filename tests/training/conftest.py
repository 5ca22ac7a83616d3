"""Quantized tiny models for the trainer."""

import pytest
import tiny

from adaptkit.operations.quantize import quantize


@pytest.fixture(scope="session")
def llama_nf4(made, llama):
    folder = made / "llama-nf4"
    quantize(llama, folder)
    return folder


@pytest.fixture(scope="session")
def deep_nf4(made):
    """Seven layers, so that segments differ in length."""
    quantize(tiny.write_llama(made / "deep", layers=7), made / "deep-nf4")
    return made / "deep-nf4"
