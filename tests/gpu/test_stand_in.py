"""What needs a GPU is run on a device that is none, with CUDA's rules of devices, streams and memory.

``stand_in/device.cpp`` says what that shows, and what only a GPU does.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
STAND_IN = HERE / "stand_in"
SUITES = sorted(path.name for path in HERE.glob("test_*_on_device.py"))

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a CUDA of its own"),
    pytest.mark.skipif(not shutil.which("g++") or sys.platform != "linux", reason="needs g++"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    library, torch_folder = tmp_path_factory.mktemp("stand-in") / "_device.so", Path(torch.__file__).parent
    includes = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    ]
    command = [
        "g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", STAND_IN / "device.cpp", "-o", library,
        *(f"-I{folder}" for folder in includes), f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}",
        *(f"-l{name}" for name in ("torch", "torch_cpu", "c10", "torch_python")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return os.environ | {"STAND_IN_LIBRARY": str(library), "PYTHONPATH": str(STAND_IN)}


@pytest.mark.parametrize("suite", SUITES)
def test_what_needs_a_gpu_passes(environment, suite):
    """Its tests, each with nothing used that was not waited for."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "stand_in",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        HERE / suite,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    needs_triton = suite == "test_tables_on_device.py"
    assert done.returncode == (5 if needs_triton else 0), done.stdout[-5000:]  # 5: none was run
    assert "needs Triton" in done.stdout if needs_triton else " passed" in done.stdout


MISUSE = {
    "a tensor of the host beside one of the device": ("torch.ones(3, device='cuda') + torch.ones(3)", "same device"),
    "reading what another stream wrote": ("copy(device, host); device.sum()", "reads what another stream wrote"),
    "writing what another stream reads": ("copy(host, device); device.zero_()", "writes what another stream reads"),
    "writing before the stream that allocated": ("copy(torch.empty(3, device='cuda'), host)", "another stream wrote"),
    "freeing what another stream reads": ("copy(host, device); del device", "memory is free"),
    "changing what a copy has still to read": ("copy(device, host); host.fill_(2)", "pinned memory changed"),
}
WAITED = {
    "an event": "copy(device, host); torch.cuda.current_stream().wait_event(done); device.sum()",
    "a stream": "copy(host, device); torch.cuda.current_stream().wait_stream(side); device.zero_()",
    "the host": "copy(device, host); side.synchronize(); host.fill_(2); del device",
    "the allocator": "copy(host, device); device.record_stream(torch.Stream(side.number, 0, 1)); del device",
}
PREPARED = """
import stand_in, torch
side, done = torch.cuda.Stream(), torch.cuda.Event()
host, device = torch.ones(3, pin_memory=True), torch.ones(3, device='cuda')
torch.cuda.synchronize()
side.wait_stream(torch.cuda.current_stream())
def copy(target, source):
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
        done.record(side)
"""


def run(environment, lines):
    ended = "\ntorch.cuda.synchronize()\nprint(*stand_in.device.misuse(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", PREPARED + lines + ended], capture_output=True, text=True, env=environment
    )
    return done.stdout.strip() + done.stderr


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_is_noticed(environment, what):
    lines, told = MISUSE[what]
    assert told in run(environment, lines)


@pytest.mark.parametrize("what", WAITED)
def test_whoever_waits_is_told_nothing(environment, what):
    assert run(environment, WAITED[what]) == ""


def test_a_copy_to_pinned_memory_arrives_when_the_host_waits(environment):
    lines = "copy(host, device)\nprint(host.tolist())\ndone.synchronize()\nprint(host.tolist())"
    assert run(environment, lines).splitlines() == ["[nan, nan, nan]", "[1.0, 1.0, 1.0]"]


def test_memory_runs_out_at_its_limit_and_is_no_number_at_first(environment):
    lines = """
print(torch.empty(2, device='cuda').tolist())
torch.cuda.set_per_process_memory_fraction(2**20 / torch.cuda.mem_get_info()[1])
try:
    torch.zeros(2**20, device='cuda')
except torch.OutOfMemoryError as error:
    print(str(error)[:18])
"""
    assert run(environment, lines).splitlines() == ["[nan, nan]", "CUDA out of memory"]
