"""A disk that is full, failing or read-only ends in one line; a power cut takes nothing that was said to be done."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.errors import DISK_HINTS


@pytest.fixture(scope="module")
def tallies():
    """What a small run of ``scripts/kills --disks`` finds."""
    command = [sys.executable, Path(__file__).with_name("disks.py"), "--cuts", "1", "--faults", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_command_is_met_by_every_fault_and_loses_nothing(tallies):
    for name, tally in tallies.items():
        assert tally["problems"] == [], name
        assert tally["faults"] >= 3, name
        assert tally["changes"] == (0 if name in ("pull", "run") else 1), name
        assert tally["cuts"] == (0 if name == "publish" else 6), name
        assert tally["identical"] == tally["cuts"] + tally["faults"] + tally["harmless"], name


def test_disks_that_are_really_too_small_or_read_only_lose_nothing(tmp_path):
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a disk of one's own is not allowed here")
    here = Path(__file__).parent
    variables = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here.parents[1] / 'fixtures'}:{here}"}
    command = [*own, sys.executable, here / "small_disks.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: [3, []] for name in found}
    assert len(found) == 9


def test_every_fault_of_a_disk_has_a_hint():
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EDQUOT):
        assert DISK_HINTS[code]


@pytest.mark.parametrize(("bytes_allowed", "hint"), [(4096, "ulimit -f"), (100, "ulimit -f")])
def test_a_limit_on_the_size_of_files_is_named(llama, tmp_path, run_cli, bytes_allowed, hint):
    """The system itself refuses here: what it says is what the tests above let the disk say."""
    code = (
        "import resource, sys; from adaptkit.cli.main import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed}, {bytes_allowed}));"
        f"sys.argv = ['adaptkit', 'quantize', {str(llama)!r}, '-o', {str(tmp_path / 'out')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert hint in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert run_cli("quantize", llama, "-o", tmp_path / "out").code == 0
