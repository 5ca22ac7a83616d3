"""transformers' check whether positions restart is skipped only where it is known that they do not."""

import threading

import pytest
import torch
from transformers import masking_utils

from adaptkit.training.network.positions import single_samples

RESTARTING = torch.tensor([[0, 1, 2, 0, 1]])


def samples_found():
    found = masking_utils.find_packed_sequence_indices(RESTARTING)
    return None if found is None else found.tolist()


def test_the_check_is_skipped_only_inside_the_block_and_in_its_thread():
    told = []
    with single_samples():
        other = threading.Thread(target=lambda: told.append(samples_found()))
        other.start()
        other.join()
        assert samples_found() is None
    assert told == [samples_found()] == [[[0, 0, 0, 1, 1]]]


def test_the_check_is_made_again_after_an_error():
    with pytest.raises(RuntimeError, match="out of memory"), single_samples():
        raise RuntimeError("out of memory")
    assert samples_found() == [[0, 0, 0, 1, 1]]
