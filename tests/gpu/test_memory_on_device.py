"""On a GPU, paging, offloading and retries change no bit, and memory use is as predicted."""

from dataclasses import replace

import pytest
import tiny
import torch

from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.dry_run import plan_run
from adaptkit.training.loop import train
from adaptkit.training.memory import paging
from adaptkit.training.memory.adamw import BLOCK, AdamW, decode, encode
from adaptkit.training.memory.moments import PagedState
from adaptkit.training.memory.offload import OffloadedTensors
from adaptkit.training.memory.optimizer import PagedAdamW
from adaptkit.training.memory.paging import Pages
from adaptkit.training.memory.parameters import Group
from adaptkit.training.memory.pressure import Pressure

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GPU = torch.device("cuda")
PAGE = 1 << 13  # elements; copying a page takes less time than ``slowed`` adds
RATES = [1e-3, 2e-3, 5e-4, 1e-3, 3e-3]


def updates(count, budgets, bits):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(GPU)
    gradients, state = torch.zeros(count, device=GPU), PagedState(count, PAGE, budgets[0], GPU, bits=bits)
    optimizer = PagedAdamW(values, gradients, [Group(slice(0, count))], state, 0.01)
    for step, (rate, budget) in enumerate(zip(RATES, budgets, strict=True)):
        state.pages.set_budget(budget)
        gradients.copy_(torch.randn(count, generator=torch.Generator().manual_seed(step + 2)))
        optimizer.step(rate)
    return {"parameters": values.cpu()} | {n: v.whole() for n, v in state.vectors().items()}, state


def slowed(function):
    """Delay a function's work on its stream by a millisecond, so that a missing wait shows."""

    def call(*arguments):
        torch.cuda._sleep(2_000_000)
        return function(*arguments)

    return call


@pytest.fixture(scope="module", params=[32, 8])
def without_budget(request):
    """The bits of the moments, the number of parameters, the results of updates of all pages, and a page's size."""
    count = 20 * PAGE - 1000
    expected, whole = updates(count, [None] * len(RATES), request.param)
    return request.param, count, expected, whole.pages.page_bytes


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 12])
def test_updates_are_bit_identical_with_any_budget(without_budget, slots, monkeypatch):
    """Also if fetches, updates or write-backs are slow."""
    bits, count, expected, page = without_budget
    for holder, name in ((paging._Host, "get"), (paging._Host, "put"), (AdamW, "update")):
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, slowed(getattr(holder, name)))
            for budgets in ([slots * page] * len(RATES), [None, slots * page, page, None, 5 * page]):
                found, _ = updates(count, budgets, bits)
                assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_all_slots_are_filled_before_the_next_sweep(slots, monkeypatch):
    """Pages are fetched while gradients are computed; during the sweep the GPU would wait for each."""
    pages, fetched = Pages(20, 4096, slots * 4096, GPU), []
    get = paging._Host.get
    monkeypatch.setattr(paging._Host, "get", lambda host, page, slot: fetched.append(page) or get(host, page, slot))
    for _ in pages.sweep():
        pass
    between = fetched[20 - pages.resident :]
    assert between == list(range(pages.resident, slots))
    for _ in pages.sweep():
        pass
    assert fetched[20 - pages.resident : -len(between)] == list(range(pages.resident, 20))


def test_pages_may_be_freed_before_the_next_sweep_is_prefetched(monkeypatch):
    """Otherwise the copies, which are slow here, would overwrite what uses the memory next."""
    pages = Pages(20, 4096, 3 * 4096, GPU)
    for page in range(20):
        pages.write(page, torch.ones(4096, dtype=torch.uint8))
    monkeypatch.setattr(paging._Host, "get", slowed(paging._Host.get))
    for _ in pages.sweep():
        pass
    del pages
    after = [torch.zeros(4096, dtype=torch.uint8, device=GPU) for _ in range(8)]
    torch.cuda.synchronize()
    assert not any(int(page.count_nonzero()) for page in after)


def test_updates_equal_those_of_torch():
    count = 3 * PAGE
    found, _ = updates(count, [None] * len(RATES), 32)
    parameter = torch.nn.Parameter(torch.randn(count, generator=torch.Generator().manual_seed(1)).to(GPU))
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.01, fused=True)
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.randn(count, generator=torch.Generator().manual_seed(step + 2)).to(GPU)
        optimizer.step()
    assert torch.equal(found["parameters"], parameter.detach().cpu())


def active_bytes(kind):
    """Return the bytes that the allocator holds for tensors, and for freed ones that a stream may still use."""
    return torch.cuda.memory_stats()[f"active_bytes.all.{kind}"]


def test_offloading_frees_gpu_memory_and_keeps_values_however_far_the_gpu_is_behind():
    """The GPU sleeps, so that the host is always ahead, and the host waits for it only at the end."""
    offloaded, size = OffloadedTensors(GPU), 1 << 22
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, sums = active_bytes("current"), []
        torch.cuda._sleep(1_000_000_000)
        takes = [offloaded.put(torch.full((size,), float(number), device=GPU)) for number in range(8)]
        torch.cuda._sleep(1_000_000_000)
        while takes:
            tensor = takes.pop()()
            sums.append(tensor.sum(dtype=torch.float64))
            del tensor
            torch.cuda._sleep(10_000_000)
        assert active_bytes("peak") - before <= 3 * 4 * size + (1 << 20)
        assert [float(found) for found in sums] == [float(number * size) for number in reversed(range(8))]


def test_offloaded_tensors_may_be_freed_while_one_is_fetched():
    """As after a backward pass that fails. Otherwise the copy would overwrite what uses the memory next."""
    offloaded, size = OffloadedTensors(GPU), 1 << 22
    takes = [offloaded.put(torch.ones(size, device=GPU)) for _ in range(5)]
    torch.cuda._sleep(10_000_000)
    for _ in range(3):
        takes.pop()()
    del offloaded, takes
    after = [torch.zeros(size, device=GPU) for _ in range(5)]
    torch.cuda.synchronize()
    assert not any(int(tensor.count_nonzero()) for tensor in after)


@pytest.fixture
def config(made, llama, instructions):
    if not (made / "gpu-nf4").exists():
        quantize(llama, made / "gpu-nf4")
    return TrainConfig(
        base=str(made / "gpu-nf4"), data=(str(instructions),), rank=4, steps=6, batch_size=4, micro_batch_size=2,
        dropout=0.1, save_every=0, page_kib=4, device="cuda", deterministic=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain_roots():
    """Digests of adapters by configuration; the options under test must not change them."""
    return {}


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer_pages_mib": 0.02},
        {"checkpointing": "sqrt", "offload_checkpoints": True},
        {"checkpointing": "none"},
        {"checkpointing": "budget:8"},
    ],
    ids=["paged", "offloaded", "none", "budget"],
)
def test_memory_options_change_no_byte_of_an_adapter(config, change, tmp_path, plain_roots):
    if config not in plain_roots:
        plain_roots[config] = train(config, tmp_path / "plain").tensors_root
    assert train(replace(config, **change), tmp_path / "changed").tensors_root == plain_roots[config]


def test_as_few_layers_are_checkpointed_as_memory_allows(made, config, tmp_path):
    """The device is filled except for some memory and the tenth that stays free; no byte depends on it."""
    hidden = 1024 if torch.version.cuda else 64  # a real device gives out memory in steps of 20 MiB
    quantize(tiny.write_llama(made / "gpu-deep", layers=6, hidden=hidden), made / "gpu-deep-nf4")
    config = replace(config, base=str(made / "gpu-deep-nf4"), steps=2, pack=True, max_length=256)
    ends = {}
    for policy in ("layer", "none"):
        ends[policy] = train(replace(config, checkpointing=policy), tmp_path / policy)
    least, most = (ends[policy].memory["activations"] for policy in ("layer", "none"))
    beside = ends["none"].memory["predicted"] - most + ends["none"].memory["trainable"]
    found = []
    for wanted in (2 * most, (least + most) // 2, 0):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        ballast = torch.empty(free - total // 10 - beside - wanted, dtype=torch.uint8, device=GPU)
        report = train(config, tmp_path / str(wanted))
        del ballast
        assert report.tensors_root == ends["none"].tensors_root
        assert report.memory["activations"] <= max(wanted, least)
        found.append(report.checkpointing)
    assert found[0] == "0 of 6 layers checkpointed"
    assert found[1] in {f"the first {6 - whole} of 6 layers checkpointed" for whole in (2, 3, 4, 5)}
    assert found[2].startswith("6 of 6 layers checkpointed in segments of ")


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_moments_equal_those_of_a_cpu(signed):
    count = 100 * BLOCK + 17
    moment = torch.randn(count, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 0, count)
    moment = moment if signed else moment.square()
    found = []
    for device in ("cpu", "cuda"):
        values = moment.to(device)
        codes = torch.empty(count, dtype=torch.uint8, device=device)
        absmax, back = torch.empty(-(-count // BLOCK), device=device), torch.empty(count, device=device)
        encode(values, codes, absmax, signed=signed)
        decode(codes, absmax, back, signed=signed)
        found.append([codes.cpu(), absmax.cpu(), back.cpu()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_batch_that_runs_out_of_memory_finishes_after_evictions():
    """The device is filled except for 64 MiB, so that torch's own allocator runs out of memory."""
    count = 16 << 20
    state = PagedState(count, 1 << 18, None, GPU)  # 128 MiB
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - (64 << 20), dtype=torch.uint8, device=GPU)
    notes = []
    pressure = Pressure(state.pages, notes.append)
    result = pressure.relieve(1, lambda: torch.ones(100 << 20, dtype=torch.uint8, device=GPU))
    assert (int(result[-1]), len(notes), state.pages.counters.retries) == (1, 1, 1)
    del ballast


def test_planning_a_sharded_base_does_not_load_it_onto_one_gpu(config, tmp_path):
    """One GPU need not have room for it."""

    def planned(changed):
        before = active_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        plan = plan_run(changed, tmp_path / "adapter")
        return plan.trainable_parameters, active_bytes("peak") - before

    divided = replace(config, shard_base=True, checkpointing="layer", offload_checkpoints=True)
    (one, used), (other, of_whole) = planned(divided), planned(config)
    assert (one, used) == (other, 0)
    assert of_whole > 0


def test_peak_memory_is_within_half_of_the_prediction(config, tmp_path):
    """Without deterministic attention: in a backward pass it takes memory for every multiprocessor of the GPU."""
    report = train(replace(config, deterministic=False), tmp_path / "adapter")
    assert report.memory["measured"] == pytest.approx(report.memory["predicted"], rel=0.5)
