"""Arrays and tensors that share memory."""

import numpy as np
import pytest
import torch

from adaptkit.numerics.dtypes import ARRAY_DTYPES, dtype_name, is_float
from adaptkit.numerics.tensors import DTYPES, as_array, as_tensor

ALL = pytest.mark.parametrize("name", sorted(ARRAY_DTYPES))


def random_tensor(name, shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    if name == "BOOL":
        return torch.rand(shape, generator=generator) < 0.5
    size = DTYPES[name].itemsize
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return raw.view(DTYPES[name])


@ALL
def test_conversion_to_an_array_and_back_shares_memory(name):
    tensor = random_tensor(name)
    array = as_array(tensor)
    assert (array.dtype, array.shape) == (ARRAY_DTYPES[name], (3, 5))
    assert array.ctypes.data == tensor.data_ptr()
    again = as_tensor(array)
    assert (again.dtype, again.shape, again.data_ptr()) == (tensor.dtype, tensor.shape, tensor.data_ptr())
    assert dtype_name(array.dtype) == dtype_name(tensor.dtype) == name
    assert is_float(array) == tensor.is_floating_point()


@ALL
def test_an_array_has_the_values_of_its_tensor(name):
    tensor = random_tensor(name)
    np.testing.assert_array_equal(as_array(tensor).astype(np.float64), tensor.double().numpy())


@ALL
def test_slices_and_transposed_and_empty_arrays_are_converted(name):
    array = as_array(random_tensor(name, (4, 6)))
    assert as_tensor(array.T).shape == (6, 4)
    assert as_array(as_tensor(array.T)).tobytes() == np.ascontiguousarray(array.T).tobytes()
    assert as_tensor(array[1:3]).data_ptr() == array[1:3].ctypes.data
    assert as_tensor(array[:0]).shape == (0, 6)
    assert as_array(torch.empty(0, 6, dtype=DTYPES[name])).shape == (0, 6)
