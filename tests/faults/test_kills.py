"""Commands killed at any moment leave no incomplete output, and end in the same bytes when run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.checkpoint.layout import JOURNAL_NAME

KILLS = 48


@pytest.fixture(scope="module")
def tallies():
    """Results of a small run of ``scripts/kills``."""
    command = [sys.executable, Path(__file__).with_name("kills.py"), "--count", str(KILLS), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_command_that_writes_is_killed_by_every_signal(tallies):
    commands = "quantize dequantize merge unmerge stack extract resize adopt train publish pull run"
    assert {*commands.split(), "merge --force"} == set(tallies)
    assert all(tally["kills"] >= KILLS // len(tallies) for tally in tallies.values())
    assert sum(tally["kills"] for tally in tallies.values()) >= KILLS
    assert 4 * sum(tally["chosen"] for tally in tallies.values()) > KILLS
    for name, tally in tallies.items():
        assert set(tally["signals"]) == {"SIGKILL", "SIGINT", "SIGTERM"}, name
        assert max(tally["signals"].values()) - min(tally["signals"].values()) <= 1, name
        assert sum(tally["signals"].values()) == tally["kills"], name


def test_killed_commands_leave_nothing_incomplete_and_resume_to_the_same_bytes(tallies):
    for name, tally in tallies.items():
        assert tally["problems"] == [], name
        assert 0 < tally["trials"] == tally["identical"], name


def test_finished_shards_are_not_written_again(llama_sharded, tmp_path):
    """Files that the first run finished keep their time stamps."""
    from adaptkit.operations.quantize import QuantizeOptions, quantize

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    def stop(done, total):
        if done > total * 0.9:
            raise Stop

    options = QuantizeOptions(max_shard_bytes=20_000)
    with pytest.raises(Stop):
        quantize(llama_sharded, tmp_path / "out", options, progress=stop)
    journal = (tmp_path / "out.partial" / JOURNAL_NAME).read_text().splitlines()
    finished = [json.loads(line)["file"]["path"] for line in journal[1:]]
    assert len(finished) > 1
    before = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in finished}
    quantize(llama_sharded, tmp_path / "out", options)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == before
