"""Implements ``torch.cuda`` with ``device.cpp``; use it as a plugin of pytest, or import it before torch.

STAND_IN_LIBRARY names the compiled library. Triton is disabled, since no device can run its kernels, unless
TRITON_INTERPRET=1 makes it run them in its interpreter, on copies in host memory.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import warnings
from types import SimpleNamespace

LIBRARY = os.environ["STAND_IN_LIBRARY"]
if "torch" in sys.modules:
    raise ImportError("torch asks once, when it is imported, whether there is a device")
ctypes.CDLL(LIBRARY, ctypes.RTLD_GLOBAL)

sys.modules["matplotlib"] = None  # a plot per run would take a tenth of the time

import pytest  # noqa: E402
import torch  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("_device", LIBRARY)
device = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(device)


class Stream:
    """As ``torch.cuda.Stream``."""

    def __init__(self, device_=None, priority=0, number=None):
        self.number = device.new_stream() if number is None else number

    def wait_stream(self, other):
        other.record_event().wait(self)

    def wait_event(self, event):
        event.wait(self)

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def synchronize(self):
        device.wait_for(self.number)

    def __eq__(self, other):
        return isinstance(other, Stream) and other.number == self.number

    __hash__ = None


class Event:
    """As ``torch.cuda.Event``; waiting for one that was never recorded returns at once."""

    def __init__(self, **options):
        self._event = device.Event()

    def record(self, stream=None):
        self._event.record((stream or current_stream()).number)

    def wait(self, stream=None):
        self._event.block((stream or current_stream()).number)

    def synchronize(self):
        self._event.wait()


def current_stream(device_=None):
    return Stream(number=device.current_stream())


@contextlib.contextmanager
def on_stream(stream):
    before = device.set_stream(stream.number)
    try:
        yield
    finally:
        device.set_stream(before)


def _set_sync_debug_mode(mode):
    warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)  # as torch does
    device.tell_waits({"default": False, "warn": True}[mode])


def _install():
    numbers = device.generator()
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=device.total(), multi_processor_count=1
    )
    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
        "get_device_name": "stand-in", "get_device_capability": (9, 0), "get_device_properties": properties,
        "is_current_stream_capturing": False,
        **dict.fromkeys(("_lazy_init", "_sleep", "empty_cache", "init", "set_device"), None),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    def allocated(_=None):
        return device.allocated()

    def peak(_=None):
        return device.peak()

    functions = {
        "Stream": Stream, "Event": Event, "current_stream": current_stream, "stream": on_stream,
        "default_stream": lambda _=None: Stream(number=0), "device": contextlib.nullcontext,
        "synchronize": lambda _=None: device.wait_for_all(),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "memory_allocated": allocated, "memory_reserved": allocated,
        "max_memory_allocated": peak, "max_memory_reserved": peak,
        "memory_stats": lambda _=None: {"active_bytes.all.current": allocated(), "active_bytes.all.peak": peak()},
        "reset_peak_memory_stats": lambda _=None: device.reset_peak(),
        "mem_get_info": lambda _=None: (device.left(), device.total()),
        "set_per_process_memory_fraction": lambda share, _=None: device.limit(int(share * device.total())),
        "get_rng_state": lambda _=None: numbers.get_state(), "manual_seed": numbers.manual_seed,
        "set_rng_state": lambda state, _=None: numbers.set_state(state), "manual_seed_all": numbers.manual_seed,
    }  # fmt: skip
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.cuda.default_generators = (numbers,)
    torch.Tensor.record_stream = lambda tensor, stream: device.record_stream(tensor, stream.number)
    torch.Tensor.cuda = lambda tensor, *_, **options: tensor.to("cuda", **options)


_install()

from adaptkit.training import triton_needs  # noqa: E402

triton_needs.what_triton_lacks = lambda: "" if os.environ.get("TRITON_INTERPRET") == "1" else "a device"


@pytest.fixture(autouse=True)
def nothing_is_used_without_waiting():
    yield
    gc.collect()  # freeing memory that is still in use is misuse, too
    device.wait_for_all()
    assert sorted(set(device.misuse())) == []
