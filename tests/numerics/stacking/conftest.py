"""Changes to stack, and the same changes as dense matrices."""

import numpy as np
import pytest
import torch
from low_rank import dense, term

from adaptkit.discovery import load
from adaptkit.numerics import stacking
from adaptkit.numerics.spectrum import Spectrum

CASES = {
    "wide": (7, 11, (2, 3)),
    "tall": (13, 5, (1, 2, 4)),
    "square": (6, 6, (2, 2, 2)),
    "rank beyond the shape": (4, 6, (9, 3)),
    "one adapter": (8, 5, (3,)),
    "one lacks the module": (9, 10, (2, 0, 3)),
    "a single row": (1, 12, (1, 2)),
    "a single column": (12, 1, (2, 1)),
}


@pytest.fixture(params=CASES)
def terms(request):
    out, into, ranks = CASES[request.param]
    scalings = (1.0, -0.5, 1 / 3)
    return [term(out, into, rank, scalings[number], 10 + number) for number, rank in enumerate(ranks)]


@pytest.fixture
def matrices(terms):
    return [dense(change).numpy() for change in terms]


@pytest.fixture
def make():
    return term


@pytest.fixture
def whole():
    return lambda change: dense(change).numpy()


@pytest.fixture
def combine():
    """Run a method; return its result, which may be factored, as a dense matrix."""

    def run(name, changes, module="model.layers.0.mlp.up_proj", **options):
        method = load(stacking, name, "METHOD")
        result = method.combine(changes, method.options(**options), module)
        if isinstance(result, Spectrum):
            return (result.u * result.sigma @ result.vt).numpy()
        return result.numpy() if isinstance(result, torch.Tensor) else dense(result).numpy()

    return run


@pytest.fixture
def close():
    def check(found, expected, tolerance=1e-11):
        size = max(np.abs(expected).max(), 1e-3)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * size

    return check
