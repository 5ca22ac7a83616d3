"""A batch that runs out of memory is retried without resident optimizer pages, and gives the same bits."""

import pytest
import torch

from adaptkit.errors import UsageError
from adaptkit.training import observations
from adaptkit.training import run as run_module
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.memory import activations
from adaptkit.training.memory.moments import PagedState
from adaptkit.training.memory.pressure import Pressure

CPU = torch.device("cpu")
MORE_THAN_THERE_IS = 1 << 60


def state(tmp_path, budget=None):
    made = PagedState(1000, 100, budget, CPU, tmp_path / "pages.bin")
    for span, first, second in made.sweep():
        first.copy_(torch.arange(span.start, span.stop))
        second.fill_(2)
    return made


def test_pages_are_evicted_once_and_keep_their_contents(tmp_path):
    notes, resident = [], []

    def compute(size):
        resident.append(pages.resident)
        if size >= 50 and pages.resident:
            torch.empty(MORE_THAN_THERE_IS)  # a real allocation, which fails
        return size

    held = state(tmp_path)
    pages = held.pages
    pressure = Pressure(pages, notes.append)
    for size in (10, 60, 70, 10):
        assert pressure.relieve(size, lambda size=size: compute(size)) == size
    assert resident == [10, 10, 0, 0, 0]
    assert pages.counters.retries == 1
    assert notes == ["warning: out of memory in a micro-batch of 60 tokens; paged out optimizer state, trying again"]
    assert held.vectors()["first_moment"].whole().tolist() == list(range(1000))


def test_a_task_other_than_a_batch_evicts_pages_but_checkpoints_no_layers(tmp_path):
    pages, asked, notes = state(tmp_path).pages, [], []
    pressure = Pressure(pages, notes.append, keep_less=lambda: asked.append(True) or True)
    short = lambda: torch.empty(MORE_THAN_THERE_IS) if pages.resident else "measured"  # noqa: E731
    assert pressure.make_room("as it was measured", "a hint", short) == "measured"
    assert not asked
    assert notes == ["warning: out of memory as it was measured; paged out optimizer state, trying again"]
    with pytest.raises(UsageError, match="out of memory as it was measured") as caught:
        pressure.make_room("as it was measured", "a hint", lambda: torch.empty(MORE_THAN_THERE_IS))
    assert caught.value.hint == "a hint"


@pytest.mark.parametrize("needed", [1, 2])
def test_layers_are_checkpointed_before_pages_are_evicted(tmp_path, needed):
    pages, done, notes = state(tmp_path).pages, [], []

    def keep_less():
        done.append(True)
        return len(done) == 1

    def compute():
        return torch.empty(MORE_THAN_THERE_IS) if len(done) + (pages.resident == 0) < needed else "done"

    pressure = Pressure(pages, notes.append, keep_less=keep_less)
    assert pressure.relieve(60, compute) == "done"
    assert [note.partition("; ")[2] for note in notes] == [
        "checkpointed all layers, trying again", "paged out optimizer state, trying again",
    ][:needed]  # fmt: skip
    assert (pages.resident, pages.counters.retries) == (10 if needed == 1 else 0, needed)


def test_running_out_of_memory_after_all_evictions_is_an_error_with_a_hint(tmp_path):
    pressure = Pressure(state(tmp_path).pages, lambda line: None)
    with pytest.raises(UsageError, match="micro-batch of 60 tokens") as caught:
        pressure.relieve(60, lambda: torch.empty(MORE_THAN_THERE_IS))
    assert "--micro-batch-size" in caught.value.hint
    assert pressure._pages.counters.retries == 1
    with pytest.raises(UsageError, match="out of memory"):  # nothing is left to evict: no second attempt
        pressure.relieve(60, lambda: torch.empty(MORE_THAN_THERE_IS))
    assert pressure._pages.counters.retries == 1


def test_running_out_of_host_memory_for_evicted_pages_is_an_error(tmp_path, monkeypatch):
    """For example, where little memory can be pinned."""
    held = state(tmp_path)
    pressure = Pressure(held.pages, lambda line: None)

    def without_room():
        raise torch.OutOfMemoryError("CUDA error: out of memory\nthis and that")

    monkeypatch.setattr(held.pages, "_hosted", without_room)
    with pytest.raises(UsageError, match=r"(?m)60 tokens \(CUDA error: out of memory\)$") as caught:
        pressure.relieve(60, lambda: torch.empty(MORE_THAN_THERE_IS))
    assert "--micro-batch-size" in caught.value.hint


def test_a_process_with_a_sharded_base_does_not_retry_alone(tmp_path):
    """The other processes would be waiting for its part of a different layer."""
    pressure, calls = Pressure(state(tmp_path).pages, lambda line: None, can_retry=False), []
    with pytest.raises(UsageError, match="micro-batch of 60 tokens"):
        pressure.relieve(60, lambda: [calls.append(1), torch.empty(MORE_THAN_THERE_IS)])
    assert (len(calls), pressure._pages.counters.retries) == (1, 0)


def test_other_errors_are_not_mistaken_for_out_of_memory(tmp_path):
    pressure = Pressure(state(tmp_path).pages, lambda line: None)
    with pytest.raises(RuntimeError, match="size of tensor"):
        pressure.relieve(1, lambda: torch.ones(2) + torch.ones(3))
    assert pressure._pages.counters.retries == 0


@pytest.mark.parametrize("room", [None, 1 << 40])
def test_a_run_that_ran_out_of_memory_ends_with_the_same_bytes(llama_nf4, instructions, tmp_path, monkeypatch, room):
    config = TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=4, steps=4, batch_size=4, micro_batch_size=2,
        compute_dtype="float32", dropout=0.1, save_every=0, held_out=0.0, page_kib=4, device="cpu",
    )  # fmt: skip
    plain = train(config, tmp_path / "plain")
    collect, calls = run_module.Gradients._add, []

    def short(self, *arguments):
        """Fail in the second micro-batch of the third step, after the first one's gradients were added."""
        calls.append(arguments)
        value = collect(self, *arguments)
        if len(calls) == 6:
            torch.empty(MORE_THAN_THERE_IS)
        return value

    monkeypatch.setattr(run_module.Gradients, "_add", short)
    monkeypatch.setattr(activations, "_room", lambda *_: room)  # a GPU's; with it no layer is checkpointed at first
    notes = []
    report = train(config, tmp_path / "short", note=notes.append)
    assert (len(calls), report.paging["retries"]) == (4 * 2 + 2, 1)
    (told,) = [note for note in notes if "out of memory" in note]
    assert ("checkpointed all layers" if room else "paged out optimizer state") in told
    assert report.checkpointing == "2 of 2 layers checkpointed"
    assert report.tensors_root == plain.tensors_root


@pytest.mark.parametrize(
    ("name", "doing"),
    [("mean_losses", "held-out samples were evaluated"), ("generate", "prompts were answered")],
)
def test_evaluation_and_generation_that_run_out_of_memory_retry_and_change_no_byte(
    llama_nf4, instructions, tmp_path, monkeypatch, name, doing
):
    config = TrainConfig(
        base=str(llama_nf4), data=(str(instructions),), rank=4, steps=4, batch_size=4, eval_every=2, page_kib=4,
        compute_dtype="float32", save_every=0, held_out=0.2, sample_prompts=("hello",), sample_every=2, device="cpu",
    )  # fmt: skip
    plain = train(config, tmp_path / "plain", note=lambda line: None)

    def short_once(compute):
        """Run out of memory in the second call."""
        calls = []

        def call(*arguments, **named):
            calls.append(arguments)
            return torch.empty(MORE_THAN_THERE_IS) if len(calls) == 2 else compute(*arguments, **named)

        return call

    monkeypatch.setattr(observations, name, short_once(getattr(observations, name)))
    notes = []
    report = train(config, tmp_path / "short", note=notes.append)
    told = [note.partition(";")[0] for note in notes if "out of memory" in note]
    assert told == [f"warning: out of memory while {doing}"]
    assert (report.paging["retries"], report.paging["resident"]) == (1, 0)
    assert report.tensors_root == plain.tensors_root
    assert (report.held_out_before, report.held_out_after) == (plain.held_out_before, plain.held_out_after)
