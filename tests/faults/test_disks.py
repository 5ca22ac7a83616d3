"""Full, failing or read-only disks end commands in an error; a power cut loses nothing that was reported as done."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.errors import DISK_HINTS


@pytest.fixture(scope="module")
def tallies():
    """Results of a small run of ``scripts/kills --disks``."""
    command = [sys.executable, Path(__file__).with_name("disks.py"), "--cuts", "1", "--faults", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_disk_faults_and_power_cuts_lose_nothing_with_any_command(tallies):
    for name, tally in tallies.items():
        assert tally["problems"] == [], name
        assert tally["faults"] >= 3, name
        assert tally["changes"] == (0 if name in ("pull", "run") else 1), name
        assert tally["cuts"] == (0 if name == "publish" else 6), name
        assert tally["identical"] == tally["cuts"] + tally["faults"] + tally["harmless"], name


@pytest.mark.parametrize(
    ("mount", "name", "hint"),
    [
        ("-t tmpfs tmpfs", "out", "new folder inside it, such as -o out/out"),
        ("--bind ..", "out.partial", "unmount"),
        ("--bind ..", "out.replaced", "unmount"),
    ],
)
def test_a_mount_point_that_would_have_to_be_renamed_is_refused_before_anything_is_written(
    llama, tmp_path, mount, name, hint
):
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    disk = tmp_path / "a \\\t\nü" / name  # characters that the system's list of mounts escapes
    disk.mkdir(parents=True)
    if shutil.which("unshare") is None or subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", disk]).returncode:
        pytest.skip("mounting in a user namespace is not allowed")
    command = f"mount {mount} {name} && {sys.executable} -m adaptkit quantize {llama} -o out --force; echo $?; ls"
    done = subprocess.run([*own, "sh", "-c", command], cwd=disk.parent, capture_output=True, text=True)
    assert f"error: {name}: is a mount point" in done.stderr
    assert hint in done.stderr.splitlines()[-1]
    assert done.stdout.split() == ["2", name]


def test_every_disk_error_has_a_hint():
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EDQUOT):
        assert DISK_HINTS[code]


def test_exceeding_the_file_size_limit_gets_a_hint_that_names_the_limit(llama, tmp_path, run_cli):
    """Here, the error comes from the system itself, unlike the simulated ones above."""
    code = (
        "import resource, sys; from adaptkit.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        f"sys.argv = ['adaptkit', 'quantize', {str(llama)!r}, '-o', {str(tmp_path / 'out')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "ulimit -f" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert run_cli("quantize", llama, "-o", tmp_path / "out").code == 0
