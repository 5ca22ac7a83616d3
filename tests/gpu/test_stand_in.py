"""Tests that need a GPU run on a simulated device, with CUDA's rules for devices, streams and memory.

``stand_in/device.cpp`` says what that can show, and what only a real GPU can.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forks import Forks

HERE = Path(__file__).parent
STAND_IN, ROOT = HERE / "stand_in", HERE.parents[1]
SUITES = sorted(path.name for path in HERE.glob("test_*_on_device.py"))

INCLUDED = Path(sysconfig.get_paths()["include"])

IMPORTS = "import stand_in, pytest, torch, adaptkit.training.loop, transformers.models.llama.modeling_llama"

pytestmark = [
    pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="this torch is built for CUDA or ROCm"),
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("g++") or not (INCLUDED / "Python.h").exists(),
        reason="needs g++ and Python.h on Linux",
    ),
]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    library = shared / "_device.so"
    with open(shared / "_device.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles for all
        if not library.exists():
            compile_to(library)
    variables = {"STAND_IN_LIBRARY": str(library), "PYTHONPATH": f"{ROOT}:{STAND_IN}"}
    variables["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and again for each kernel
    with Forks(IMPORTS, environment=os.environ | variables) as run:
        yield run


def compile_to(library):
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include", INCLUDED]
    begun = library.with_suffix(".begun")
    command = [
        "g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-DAT_PER_OPERATOR_HEADERS", STAND_IN / "device.cpp",
        "-o", begun, *(f"-I{folder}" for folder in includes), f"-L{torch_folder / 'lib'}",
        f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    begun.rename(library)


@pytest.mark.parametrize("suite", SUITES)
def test_gpu_tests_pass_on_the_simulated_device(forks, suite, monkeypatch):
    """``stand_in.py`` also checks for misuse after each test."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    code = "import pytest, stand_in, sys; sys.exit(pytest.main(sys.argv[1:], plugins=[stand_in]))"
    done = forks(
        code, "-q", "-p", "no:cacheprovider", "-n", "0", "-W", "ignore::pytest.PytestAssertRewriteWarning", HERE / suite
    )
    needs_triton = suite == "test_tables_on_device.py"
    assert done.returncode == (5 if needs_triton else 0), done.stdout[-5000:] + done.stderr  # 5: no test ran
    counted = {what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert needs_triton or counted["passed"] > 4 * counted.get("skipped", 0)


INTERPRETED = [
    ("test_fast_on_device.py", "test_a_fast_network_computes_what_transformers_computes[llama-dtype2-0.0]"),
]


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_a_network_on_the_simulated_device_calls_the_kernels_of_triton(forks):
    """In Triton's interpreter, which is slow; the other tests on this device do without these kernels."""
    code = "import pytest, stand_in, sys; sys.exit(pytest.main(sys.argv[1:], plugins=[stand_in]))"
    tests = [f"{HERE / suite}::{name}" for suite, name in INTERPRETED]
    options = "-q", "-p", "no:cacheprovider", "-n", "0", "-W", "ignore::pytest.PytestAssertRewriteWarning"
    done = forks(code, *options, *tests, TRITON_INTERPRET="1", PYTEST_ADDOPTS="")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert f"{len(INTERPRETED)} passed" in done.stdout


MISUSE = {
    "a tensor of the host beside one of the device": ("torch.ones(3, device='cuda') + torch.ones(3)", "same device"),
    "reading what another stream wrote": ("copy(device, host); device.sum()", "reads what another stream wrote"),
    "writing what another stream reads": ("copy(host, device); device.zero_()", "writes what another stream reads"),
    "writing before the stream that allocated": ("copy(torch.empty(3, device='cuda'), host)", "another stream wrote"),
    "freeing what another stream reads": ("copy(host, device); del device", "memory is free"),
    "changing what a copy has still to read": ("copy(device, host); host.fill_(2)", "pinned memory changed"),
    "writing where a copy has still to arrive": ("copy(host, device); host.fill_(2)", "pinned memory was written"),
    "values of the host for elements of the device": ("device[device > 0] = host", "same device"),
}
WAITED = {
    "an event": "copy(device, host); torch.cuda.current_stream().wait_event(done); device.sum()",
    "a stream": "copy(host, device); torch.cuda.current_stream().wait_stream(side); device.zero_()",
    "the host": "copy(device, host); side.synchronize(); host.fill_(2); del device",
    "the allocator": "copy(host, device); device.record_stream(side); del device",
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


def run(forks, lines):
    ended = "\ntorch.cuda.synchronize()\nprint(*stand_in.device.misuse(), sep='\\n')"
    done = forks(PREPARED + lines + ended)
    return done.stdout.strip() + done.stderr


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_is_reported(forks, what):
    lines, told = MISUSE[what]
    assert told in run(forks, lines)


@pytest.mark.parametrize("what", WAITED)
def test_proper_synchronization_reports_no_misuse(forks, what):
    assert run(forks, WAITED[what]) == ""


def test_a_copy_to_pinned_memory_arrives_when_the_host_waits(forks):
    lines = "copy(host, device)\nprint(host.tolist())\ndone.synchronize()\nprint(host.tolist())"
    assert run(forks, lines).splitlines() == ["[nan, nan, nan]", "[1.0, 1.0, 1.0]"]


def test_memory_runs_out_at_its_limit_and_is_nan_at_first(forks):
    lines = """
print(torch.empty(2, device='cuda').tolist())
torch.cuda.set_per_process_memory_fraction(2**20 / torch.cuda.mem_get_info()[1])
try:
    torch.zeros(2**20, device='cuda')
except torch.OutOfMemoryError as error:
    print(str(error)[:18])
"""
    assert run(forks, lines).splitlines() == ["[nan, nan]", "CUDA out of memory"]


def test_the_device_has_its_own_random_state(forks):
    lines = """
state, drawn = torch.cuda.get_rng_state(), []
for draw in range(2):
    torch.cuda.set_rng_state(state)
    drawn.append(torch.nn.functional.dropout(torch.ones(50, device='cuda')))
    torch.rand(3)
before = torch.get_rng_state()
torch.rand(3, device='cuda', generator=torch.Generator('cuda').manual_seed(1))
print(torch.equal(*drawn), torch.equal(before, torch.get_rng_state()), 0 < int(drawn[0].count_nonzero()) < 50)
"""
    assert run(forks, lines) == "True True True"


def test_the_thread_of_backward_passes_warns_at_its_first_product(forks):
    """It has no context yet; a warning would be an error here, except where tests and runs expect it."""
    lines = """
import warnings
warnings.simplefilter("error")
for _ in range(2):
    square = torch.ones(2, 2, device="cuda", requires_grad=True)
    try:
        (square @ square).sum().backward()
        print("no warning")
    except UserWarning as warning:
        print(str(warning)[:61])
"""
    told = "Attempting to run cuBLAS, but there was no current CUDA context"
    assert run(forks, lines).splitlines() == [told[:61], "no warning"]


def test_a_run_begins_without_that_warning(forks, llama):
    lines = f"""
import warnings
from pathlib import Path
from adaptkit.training.preparation import begin_libraries
warnings.simplefilter("error")
begin_libraries(Path({str(llama)!r}), torch.device("cuda"), False)
"""
    assert run(forks, lines) == ""
