"""Bad inputs end in an error line and its exit code, write nothing, and change no other file."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from bad_inputs import ROWS

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "schema-1-undo-2"
MOST_ADDED_BYTES = 1 << 29
"""Limit of the growth of data memory, and of the increase of peak memory over a run that only imports."""
SECONDS = 300
SOUND_AGAIN = ["NaN in a base, quantized", "merge: wrong base of the same shapes", "base: truncated"]
FRESH = ["base: truncated", "manifest: parent folder", "verify: bit flip", "alpha NaN", "YAML that makes objects"]


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "work"
    for name in ("base", "adapter", "quantized", "merged"):
        shutil.copytree(GOLDEN / name, folder / name)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "secret.safetensors").write_bytes(b"nobody's business")
    return folder


def snapshot(folder):
    """All files, links and pipes, with their content; of large files, only time and size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            status = path.stat()
            sparse = status.st_size > 1 << 26
            found[name] = (status.st_mtime_ns, status.st_size, sparse or hashlib.sha256(path.read_bytes()).digest())
        else:
            found[name] = path.stat().st_mode
    return found


def check(row, inputs, run_cli, **how):
    row.make(inputs)
    before = snapshot(inputs)
    done = run_cli(*row.command.split(), cwd=inputs, timeout=SECONDS, **how)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.code == row.code, done
    if not row.harmless:
        lines = done.stderr.splitlines()
        assert lines[0].startswith("error: ")
        assert row.phrase in lines[0]
        assert all(line.startswith("hint: ") for line in lines[1:])
        assert done.stdout == ""
    else:
        assert row.phrase in done.stdout
    after = snapshot(inputs)
    new = {name: name.split("/")[0] for name in after if name not in before}
    written = [name for name, place in new.items() if place == "out"]
    left = [name for name, place in new.items() if place == "out.partial"]
    assert {name: found for name, found in after.items() if name not in {*written, *left}} == before
    assert bool(written) == (row.harmless and " -o out" in row.command)
    assert not left
    for name in written:
        path = inputs / name
        assert not path.is_symlink()
        assert not row.absent or path.is_dir() or row.absent not in path.read_bytes()
    return done


def test_names_of_rows_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.fixture(scope="module")
def usual_peak(run_cli):
    return run_cli("--version").peak_bytes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_bad_inputs_are_refused_and_harmless_ones_accepted_in_bounded_memory(row, inputs, run_cli, usual_peak):
    done = check(row, inputs, run_cli, limits={"DATA": MOST_ADDED_BYTES})
    assert done.peak_bytes < usual_peak + MOST_ADDED_BYTES


@pytest.mark.parametrize("name", FRESH)
def test_bad_inputs_are_refused_in_a_fresh_process_too(name, inputs, run_cli):
    (row,) = [row for row in ROWS if row.name == name]
    check(row, inputs, run_cli, fresh=True)


@pytest.mark.parametrize("name", SOUND_AGAIN)
def test_a_refused_command_succeeds_after_its_input_is_repaired(name, inputs, run_cli):
    """A refused command leaves nothing that could get in the way."""
    (row,) = [row for row in ROWS if row.name == name]
    check(row, inputs, run_cli)
    for part in ("base", "adapter"):
        shutil.rmtree(inputs / part)
        shutil.copytree(GOLDEN / part, inputs / part)
    assert run_cli(*row.command.split(), cwd=inputs).code == 0
    assert not (inputs / "out.partial").exists()
