"""What ``pip install`` in a checkout puts into an environment."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_a_wheel_holds_the_files_of_the_package_and_none_of_an_earlier_build(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "adaptkit", checkout / "adaptkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    files = {path.relative_to(checkout).as_posix() for path in (checkout / "adaptkit").rglob("*") if path.is_file()}
    removed = checkout / "build" / "lib" / "adaptkit" / "cli" / "commands" / "removed.py"
    removed.parent.mkdir(parents=True)
    removed.write_text("a command that the checkout no longer has")
    made = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if name.startswith("adaptkit/")} == files


def test_no_message_tells_to_install_adaptkit_by_name_which_is_another_projects_in_the_index():
    texts = [*(ROOT / "adaptkit").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    found = [path.name for path in texts if re.search(r"pip install ['\"]?adaptkit\b", path.read_text())]
    assert not found
