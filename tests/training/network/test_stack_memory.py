"""The memory of the largest stack, or of every size, is kept and used again, and never by two tensors at once."""

import tracemalloc

import torch

from adaptkit.training.network.stack_memory import StackMemory

CPU = torch.device("cpu")


def empty(memory, *shape, dtype=torch.bfloat16):
    return memory.empty(shape, dtype, CPU)


def test_freed_memory_is_used_again_for_the_same_size():
    memory = StackMemory()
    first = empty(memory, 3, 40, 50)
    place = first.data_ptr()
    assert place % 64 == 0
    assert first.is_contiguous()
    assert first.shape == (3, 40, 50)
    part = first[1]  # has the same storage
    del first
    other = empty(memory, 3, 40, 50)
    assert other.untyped_storage().data_ptr() != place
    del part, other
    again = empty(memory, 3, 20, 50, dtype=torch.float32)
    assert (again.data_ptr(), again.dtype) == (place, torch.float32)


def test_tensors_that_are_alive_never_share_memory():
    memory, held = StackMemory(), []
    for count in (1, 4, 4, 2, 8, 4, 8, 8):
        held.append(empty(memory, count, 10, 10).fill_(len(held)))
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(held))
    del held[::2]
    held += [empty(memory, count, 10, 10).fill_(-1) for count in (4, 8, 16)]
    assert [tensor.unique().tolist() for tensor in held] == [[1], [3], [5], [7], [-1], [-1], [-1]]


def test_a_larger_tensor_gets_memory_to_keep_even_if_a_smaller_one_comes_first():
    memory, tensors = StackMemory(), []
    for _ in range(2):
        tensors.clear()
        tensors += [empty(memory, count, 10, 10) for count in (2, 4)]
    ((size, kept),) = memory._kept.items()
    assert size == 2 * 4 * 10 * 10
    assert tensors[1].data_ptr() == kept.ctypes.data


def test_only_the_memory_of_the_largest_is_kept():
    memory = StackMemory()
    for count, kept in ((2, 2), (4, 4), (1, 4), (4, 4)):
        empty(memory, count, 10, 10)
        assert list(memory._kept) == [2 * kept * 10 * 10]


def test_the_memory_of_every_size_is_kept_if_asked_for():
    memory, places = StackMemory(), []
    for _ in range(3):
        tensors = [memory.empty((count, 10, 10), torch.bfloat16, CPU, keeps_every_size=True) for count in (4, 2, 8, 4)]
        assert len({tensor.data_ptr() for tensor in tensors}) == 4  # the second one of a size has memory of its own
        places.append([tensor.data_ptr() for tensor in tensors[:3]])
        del tensors
    assert places[0] == places[1] == places[2]
    assert sorted(memory._kept) == [2 * count * 10 * 10 for count in (2, 4, 8)]


def test_the_memory_of_a_smaller_tensor_is_freed_before_that_of_a_larger_one_is_allocated():
    memory = StackMemory()
    tracemalloc.start()  # numpy reports its memory to it
    try:
        for count in (6, 8):
            empty(memory, count << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 16 << 20 <= peak < 17 << 20


def test_a_tensor_on_another_device_is_of_that_device():
    memory = StackMemory()
    assert memory.empty((2, 3), torch.float32, torch.device("meta")).is_meta
    assert len(memory._kept) == 0
