"""Where outputs may appear: found out before the work, also in a dry run."""

import ctypes
import os
import stat
import subprocess
import sys

import pytest
from folders import rewritten, tree


def run_as_others(*arguments):
    """Run ``adaptkit`` without root's right to read and write everything, which other users do not have."""

    def drop():
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    command = [sys.executable, "-m", "adaptkit", *map(str, arguments)]
    return subprocess.run(command, preexec_fn=drop, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux can root give up its right to write everything")
@pytest.mark.parametrize("command", ["train", "quantize", "work folder", "lock"])
def test_a_folder_that_cannot_be_written_is_found_in_a_dry_run(tmp_path, llama, llama_nf4, instructions, command):
    closed = tmp_path / "closed"
    closed.mkdir()
    recipe = (closed if command == "lock" else tmp_path) / "recipe.yaml"
    recipe.write_text(
        f"{{name: x, sources: {{base: {{path: {os.path.relpath(llama, recipe.parent)}}}}}, "
        "steps: {small: {quantize: base}}}"
    )
    closed.chmod(0o555)
    done = run_as_others(
        *{
            "train": ["train", "--base", llama_nf4, "--data", instructions, "-o", closed / "deeper" / "out"],
            "quantize": ["quantize", llama, "-o", closed / "out"],
            "work folder": ["run", recipe, "--work", closed / "work"],
            "lock": ["run", recipe, "--work", tmp_path / "work"],
        }[command],
        "--dry-run",
    )
    closed.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert f"cannot be written: {closed} is not a folder that you may write to" in done.stderr


def test_a_folder_that_a_script_made_becomes_the_output(run_cli, tmp_path, llama, adapter):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    plain = run_cli("merge", llama, adapter, "-o", tmp_path / "plain")
    for more in (["--dry-run"], []):
        done = run_cli("merge", llama, adapter, "-o", out, *more)
        assert (done.code, plain.code) == (0, 0), done.stderr
    assert tree(out) == tree(tmp_path / "plain")
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    again = run_cli("merge", llama, adapter, "-o", out)
    assert (again.code, "already exists" in again.stderr) == (8, True)


def test_a_failed_command_leaves_the_folder_that_a_script_made(run_cli, tmp_path, llama, copy_of):
    out = tmp_path / "out"
    out.mkdir()
    before = (out.stat().st_ino, out.stat().st_mode)
    damaged = copy_of(llama, "damaged")
    rewritten(damaged, lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    done = run_cli("quantize", damaged, "-o", out)
    assert done.code == 5, done
    assert ((out.stat().st_ino, out.stat().st_mode), list(out.iterdir())) == (before, [])
