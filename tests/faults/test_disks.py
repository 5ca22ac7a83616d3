"""Full, failing or read-only disks end commands in an error; a power cut loses nothing that was reported as done."""

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


def test_real_disks_that_are_too_small_or_read_only_lose_nothing(tmp_path):
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting in a user namespace is not allowed")
    here = Path(__file__).parent
    variables = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here.parents[1] / 'fixtures'}:{here}"}
    command = [*own, sys.executable, here / "small_disks.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: [3, []] for name in found}
    assert len(found) == 10


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


@pytest.mark.parametrize(("bytes_allowed", "hint"), [(4096, "ulimit -f"), (100, "ulimit -f")])
def test_exceeding_the_file_size_limit_gets_a_hint_that_names_the_limit(llama, tmp_path, run_cli, bytes_allowed, hint):
    """Here, the error comes from the system itself, unlike the simulated ones above."""
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
