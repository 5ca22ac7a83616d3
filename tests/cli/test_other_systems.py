"""POSIX systems without Linux's extras give the same results; other systems are refused with an error."""

import json
import os
from pathlib import Path

import pytest
from folders import tree

ROOT = Path(__file__).parents[2]
WITHOUT_LINUX = os.pathsep.join([str(ROOT / "fixtures" / "without_linux"), str(ROOT)])


@pytest.fixture
def chats(tmp_path):
    turns = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(6)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def test_results_without_linux_extras_have_the_same_bytes(run_cli, llama, chats, tmp_path):
    """From calibration to the unmerged model, including the chat template's process, paging, and all writers."""
    pages = ["--optimizer-pages-mib", "0.05", "--page-kib", "4", "--device", "cpu"]
    for where, environment in ("here", {}), ("elsewhere", {"PYTHONPATH": WITHOUT_LINUX}):
        (tmp_path / where).mkdir()
        for command in (
            ["quantize", llama, "-o", "base", "--calibrate", chats, "--format", "nf4"],
            ["train", "--base", "base", "--data", chats, "-o", "lora", "--steps", "2", *pages],
            ["merge", llama, "lora", "-o", "merged"],
            ["unmerge", "merged", "-o", "restored", "--adapter", "lora"],
        ):
            done = run_cli(*command, cwd=tmp_path / where, **environment)
            assert done.code == 0, done.stderr
            if command[0] == "train":  # otherwise, the simulated system would not differ
                assert ("not measured" in done.stdout) == (where == "elsewhere")
    here, elsewhere = tree(tmp_path / "here"), tree(tmp_path / "elsewhere")
    timed = {name for name in here if name.endswith("metrics.jsonl")}
    assert here.keys() == elsewhere.keys()
    assert [name for name in here if name not in timed and here[name] != elsewhere[name]] == []


def test_a_system_that_is_not_posix_is_refused(run_cli, llama, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_cli("quantize", llama, "-o", tmp_path / "out", PYTHONPATH=path)
    assert done.code == 2
    assert done.stderr.splitlines() == [
        "error: adaptkit runs on Linux and other POSIX systems, not on this one",
        "hint: on Windows, run it in WSL",
    ]
    assert run_cli("--version", PYTHONPATH=path).code == 0
