"""What scripts/demo.py does to the folder that it is given, before it runs anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402


@pytest.mark.parametrize("name", ["notes.txt", "merged"])
def test_a_folder_with_other_files_is_refused_unchanged_before_any_download(tmp_path, name):
    theirs, cache = tmp_path / "theirs", tmp_path / "cache"
    theirs.mkdir()
    (theirs / name).write_text("years of work")
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--folder", theirs]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    assert (done.returncode, done.stdout) == (2, "")
    told = f"demo: {theirs}: holds files that the demo did not make\n"
    assert done.stderr == told + "hint: give --folder a folder that is new or empty\n"
    assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [(name, "years of work")]
    assert not cache.exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        demo.prepare(file, is_own=False)
    assert file.read_text() == "kept"


def test_a_second_demo_removes_only_what_the_first_made(tmp_path):
    folder = tmp_path / "new" / "demo"
    demo.prepare(folder, is_own=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    for name in ("merged", "trivia.partial", "mine"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / "hub").symlink_to(elsewhere)
    demo.prepare(folder, is_own=False)
    assert sorted(path.name for path in folder.iterdir()) == [demo.MARKER, "mine"]
    assert (folder / "mine" / "file").exists()
    assert (elsewhere / "kept").exists()


def test_the_folder_in_the_cache_is_cleared_even_without_a_marker(tmp_path):
    (tmp_path / "base-nf4").mkdir()
    demo.prepare(tmp_path, is_own=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [demo.MARKER]


def test_an_empty_folder_is_accepted(tmp_path):
    demo.prepare(tmp_path, is_own=False)
    assert [path.name for path in tmp_path.iterdir()] == [demo.MARKER]
