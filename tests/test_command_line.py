"""The test helper that forks for every command behaves like a fresh process."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "schema-1-undo-2"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["quantize"],
        ["inspect", "adapter"],
        ["verify", "merged", "--json"],
        ["verify", "base"],
        ["diff", "base", "merged"],
        ["merge", "base", "absent", "-o", "out"],
        ["plan", "base", "--method", "full", "--max-length", "64", "--json"],
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_output_and_exit_code_are_those_of_a_fresh_process(run_cli, arguments):
    forked, fresh = run_cli(*arguments, cwd=GOLDEN), run_cli(*arguments, cwd=GOLDEN, fresh=True)
    assert (forked.code, forked.stdout) == (fresh.code, fresh.stdout)
    assert forked.stderr == fresh.stderr.replace("python -m adaptkit", "adaptkit")


def test_limits_apply_and_an_uncaught_error_gives_a_traceback(run_cli):
    done = run_cli("verify", "merged", cwd=GOLDEN, limits={"AS": 1 << 20})
    assert done.code == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n"), done.stderr
    assert run_cli("verify", "merged", cwd=GOLDEN, limits={"AS": 1 << 30}).code == 0


def test_a_command_that_exceeds_its_timeout_is_ended(run_cli, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_cli("quantize", GOLDEN / "base", "-o", tmp_path / "out", timeout=0.001)
    done = run_cli("quantize", GOLDEN / "base", "-o", tmp_path / "out")
    assert (done.code, done.stderr) == (0, ""), "nobody is writing it any more"


def test_concurrent_commands_have_separate_output_and_current_environment_variables(run_cli, monkeypatch):
    names = ["base", "adapter", "merged", "quantized"] * 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: run_cli("verify", name, cwd=GOLDEN), names))
    alone = {name: run_cli("verify", name, cwd=GOLDEN) for name in names}
    assert [(done.code, done.stdout, done.stderr) for done in found] == [
        (alone[name].code, alone[name].stdout, alone[name].stderr) for name in names
    ]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "3")
    assert run_cli("verify", "absent", cwd=GOLDEN).stderr.startswith("process 3: error: ")
