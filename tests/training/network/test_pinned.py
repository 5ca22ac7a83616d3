"""If no more host memory can be pinned, pageable memory is used instead, and the run warns once."""

import pytest
import torch

from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory import paging
from adaptkit.training.memory.moments import PagedState
from adaptkit.training.memory.offload import OffloadedTensors
from adaptkit.training.network.pinned import HostMemory, pinned, sent

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def nothing_is_pinned(monkeypatch):
    """Make torch fail to pin memory, with its own error message."""
    for name in ("zeros", "empty_like"):
        plain = getattr(torch, name)

        def refuse(*arguments, plain=plain, pin_memory=False, **named):
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return plain(*arguments, **named)

        monkeypatch.setattr(torch, name, refuse)


def test_host_memory_is_pinned_for_a_gpu_and_not_for_a_cpu():
    asked = []

    def make(size, **named):
        asked.append(named)
        return torch.zeros(size)

    assert pinned(make, 3).shape == (3,)
    for device in (GPU, CPU):
        memory = HostMemory(device)
        assert memory.make(make, 3).shape == (3,)
        assert not memory.is_short
    assert asked == [{"pin_memory": True}, {"pin_memory": True}, {}]


@pytest.mark.usefixtures("nothing_is_pinned")
def test_paging_and_offloading_work_without_pinned_memory():
    assert pinned(torch.zeros, 3) is None
    state = PagedState(1000, 100, None, CPU)
    state.pages.memory._pins = True
    for span, first, _ in state.sweep():
        first.copy_(torch.arange(span.start, span.stop))
    state.pages.set_budget(0)
    assert state.pages.memory.is_short
    state.pages.set_budget(None)
    assert state.vectors()["first_moment"].whole().tolist() == list(range(1000))
    offloaded = OffloadedTensors(CPU)
    offloaded.memory._pins = True
    assert torch.equal(offloaded.put(torch.arange(5))(), torch.arange(5))
    assert offloaded.memory.is_short


def test_a_run_warns_once_if_host_memory_cannot_be_pinned(llama_nf4, instructions, tmp_path, monkeypatch):
    class Short(HostMemory):
        def __init__(self, device):
            super().__init__(device)
            self.is_short = True

    monkeypatch.setattr(paging, "HostMemory", Short)
    config = TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=2, steps=3, batch_size=1, device="cpu",
        compute_dtype="float32", held_out=0.0,
    )  # fmt: skip
    notes = []
    train(config, tmp_path / "adapter", note=notes.append)
    assert sum("no more host memory can be pinned" in note for note in notes) == 1


def test_what_is_sent_to_a_gpu_is_pinned_first(monkeypatch):
    """The host would wait for the GPU otherwise, if it is more than 64 KiB."""
    asked, empty_like = [], torch.empty_like

    def recorded(tensor, pin_memory=False):
        asked.append(pin_memory)
        return empty_like(tensor)

    monkeypatch.setattr(torch, "empty_like", recorded)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: (tensor, str(device), non_blocking))
    values = torch.arange(5)
    for device in (GPU, CPU):
        found, *how = sent(values, device)
        assert torch.equal(found, values)
        assert how == [str(device), True]
        assert (found is values) == (device == CPU)
    assert asked == [True]


@pytest.mark.usefixtures("nothing_is_pinned")
def test_what_cannot_be_pinned_is_sent_all_the_same(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    assert torch.equal(sent(torch.arange(5), GPU), torch.arange(5))
