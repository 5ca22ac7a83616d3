"""Kernels run where nothing can be cached."""

import os
import subprocess
import sys
from pathlib import Path

import adaptkit

PACKAGE = Path(adaptkit.__file__).parents[1]


def test_kernels_run_where_no_folder_for_their_cache_is_writable(tmp_path):
    """The folders are files, which not even root can write in."""
    for path in (PACKAGE / "adaptkit").rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "adaptkit/numerics/kernels/__pycache__").touch()
    (tmp_path / "home").touch()
    code = (
        "import numpy as np; from adaptkit.numerics.kernels import _cpu_constants as k\n"
        "absmax = np.empty(3, np.float32)\n"
        "levels = np.arange(256, dtype=np.float32)\n"
        "k.decode_groups(np.arange(3, dtype=np.uint8), np.ones(1, np.float32), np.float32(1), levels, 0, 3, absmax)\n"
        "print(absmax.tolist(), k.__file__)"
    )
    nowhere = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | nowhere
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    *found, used = done.stdout.split()
    assert found == ["[1.0,", "2.0,", "3.0]"]
    assert Path(used).is_relative_to(tmp_path)
