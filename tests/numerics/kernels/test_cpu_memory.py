"""Where compiled kernels are kept, and when they are compiled again; each in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import pytest

import adaptkit
from adaptkit.numerics.kernels._cpu_memory import wide

DECODE = """
import numpy as np
from adaptkit.numerics.kernels import _cpu_blocks
out = np.zeros(4, np.uint32)
_cpu_blocks._decode_8bit(np.array([127, -127, 0, 127], np.int8), np.ones(1, np.float32), 4, out)
print(out.view(np.float32).tolist(), *_cpu_blocks._decode_8bit.stats.cache_hits.values())
"""


def decode(root, code=DECODE, **environment):
    """What a process prints that decodes four weights with the package that lies in ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.fixture
def package(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(adaptkit.__file__).parent, tmp_path / "adaptkit", ignore=ignored)
    return tmp_path


def test_a_kernel_is_kept_until_something_that_it_calls_changes(package):
    """Which is what happens when a new version is installed over an old one."""
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0]"
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0] 1"
    called = package / "adaptkit" / "numerics" / "kernels" / "_cpu_float.py"
    text = called.read_text()
    as_it_is = "lambda array, number: np.float32(number).view(np.uint32)"
    assert as_it_is in text
    called.write_text(text.replace(as_it_is, as_it_is.replace("(number)", "(number * 2)")))
    assert decode(package) == "[2.0, -2.0, 0.0, 2.0]"


def test_what_only_compiling_needs_is_not_loaded_for_a_kernel_that_was_kept(package):
    """It takes numba longer to get ready to compile than to load everything that a command needs."""
    code = DECODE + "import sys; print('numba.np.linalg' in sys.modules)"
    assert decode(package, code).endswith("True")
    assert decode(package, code).endswith("1\nFalse")


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "left", [lambda whole: b"", lambda whole: b"half", lambda whole: whole[:-1], lambda whole: whole[:-9] + b"\0" * 9,
             lambda whole: whole[: len(whole) // 2] + bytes(16) + whole[len(whole) // 2 + 16 :]]
)  # fmt: skip
def test_what_a_power_cut_left_of_a_kernel_is_made_again(suffix, left, package):
    """Machine code with a page of zeros in it would be run, too."""
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0]"
    kept = sorted(package.rglob(f"*.{suffix}"))
    assert kept
    for path in kept:
        path.write_bytes(left(path.read_bytes()))
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0]"
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0] 1"


def test_a_disk_without_room_for_kernels_stops_nothing(package):
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
    assert decode(package, full + DECODE) == "[1.0, -1.0, 0.0, 1.0]"
    assert decode(package) == "[1.0, -1.0, 0.0, 1.0]"


def test_kernels_that_must_not_be_compiled_are_refused(package):
    code = DECODE.replace("from adaptkit", "from adaptkit.errors import UsageError\ntry:\n    from adaptkit", 1)
    code = code.replace("_cpu_blocks\n", "_cpu_blocks\nexcept UsageError as error:\n    sys.exit(error.hint)\n", 1)
    command = [sys.executable, "-c", f"import sys{code}"]
    environment = {**os.environ, "PYTHONPATH": str(package), "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "unset it\n")


def test_a_machine_with_nowhere_to_keep_kernels_compiles_them_every_time(package):
    for _ in range(2):
        assert decode(package, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator") == "[1.0, -1.0, 0.0, 1.0]"


def test_a_processor_whose_vectors_numba_is_told_not_to_use_has_none(package):
    code = "import numpy as np; from adaptkit.numerics.formats import nf4; print(nf4.quantize(np.ones(64)).codes[0])"
    environment = {**os.environ, "PYTHONPATH": str(package), "NUMBA_ENABLE_AVX": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True)
    assert run.stdout == "255\n", run.stderr


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512f"), reason="no such vectors here")
def test_wide_vectors_are_used_where_they_are_asked_for():
    """Registers of 64 bytes have names of their own."""

    def add(x, y):
        wide()
        for i in range(x.size):
            x[i] += y[i]

    kernel = numba.njit(add)
    kernel(np.zeros(64, np.float32), np.zeros(64, np.float32))
    (text,) = kernel.inspect_asm().values()
    assert "zmm" in text
