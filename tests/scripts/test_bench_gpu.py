"""scripts/bench_gpu.py runs here at a size that a CPU can handle; its table says which targets were met."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_gpu  # noqa: E402

from adaptkit.operations.quantize import quantize  # noqa: E402

(TINY,) = bench_gpu.TINY
CPU = bench_gpu.Device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench_gpu.make_base(folder / "plain", TINY, "cpu")
    quantize(folder / "plain", folder / "nf4")
    return folder


def test_both_sides_train_the_same_model_on_the_same_tokens(bases):
    """Their losses before any update are equal up to the rounding of bfloat16."""
    ours = bench_gpu.bench_training.AdaptkitStep(bases / "nf4", TINY.length, 1.0, "layer", vocabulary=TINY.vocabulary)
    theirs = bench_gpu.bench_training.peft_step(
        bases / "plain", TINY.length, 1.0, True, True, vocabulary=TINY.vocabulary
    )
    assert ours() == pytest.approx(theirs(), rel=2e-3)


def test_pages_are_timed_with_a_quarter_of_them_resident(bases):
    first, found = bench_gpu.measure_ours(bases, TINY, CPU, 3)
    pages = found["pages"]
    assert pages["slots"] == pages["pages"] // 4 > 0
    assert pages["faults"] > 0
    assert min(first["seconds"], first["peak"], found["resident"], found["paged"]) > 0


def test_a_sequence_that_fits_is_reported_as_fitting(bases):
    """A CPU's memory is not limited, so nothing runs out; the rest of the scenario is the same."""
    (found,) = bench_gpu.measure_long(bases, TINY, CPU, 3)
    assert (found["failed"], found["finished"], found["same"], found["retries"]) == (False, True, True, 0)
    assert bench_gpu.lines(TINY, {"ours": {"error": "x"}, "peer": {"error": "x"}, "long": found})[-1].endswith("| no |")


def test_the_table_says_which_targets_were_met():
    ours = {"seconds": 0.1, "peak": 3 << 20, "resident": 0.1, "paged": 0.104, "pages": {"slots": 3, "pages": 19}}
    peer = {"seconds": 0.16, "peak": 4 << 20}
    long = {"limit": 1 << 30, "failed": True, "finished": True, "same": True}
    met = bench_gpu.lines(TINY, {"ours": ours, "peer": peer, "long": long})
    assert [row.split("|")[-2].strip() for row in met] == ["", "", "yes", "yes", "yes", "yes"]
    assert "| 1.60 | at least 1.5 |" in met[2]
    assert "| 0.75 | at most 0.8 |" in met[3]
    assert "3 of 19 pages on the device | +4.0% of a step" in met[4]
    missed = bench_gpu.lines(TINY, {"ours": ours | {"paged": 0.12}, "peer": {"seconds": 0.12, "peak": 3 << 20}})
    assert [row.split("|")[-2].strip() for row in missed] == ["", "", "no", "no", "no"]


def test_measurements_that_failed_are_named_in_the_table(tmp_path):
    clock = bench_gpu.Clock(100)
    *_, found = bench_gpu.run("ours", tmp_path / "nothing", TINY, "cpu", 1, clock)
    assert "nothing/nf4: does not exist" in found["error"]
    (late,) = bench_gpu.run("peer", tmp_path, TINY, "cpu", 1, bench_gpu.Clock(0))
    assert late == {"error": "the time limit was reached"}
    rows = bench_gpu.lines(TINY, {"ours": found, "peer": late})
    assert len(rows) == 2
    assert rows[1] == "| tiny | transformers + peft + bitsandbytes | not measured: the time limit was reached | | |"


ENDINGS = {
    "fails": ("sys.exit('no more')", "no more"),
    "waits": ("time.sleep(60)", "the time limit was reached"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_figures_measured_before_a_failure_or_timeout_are_in_the_table(tmp_path, monkeypatch, ending):
    code, said = ENDINGS[ending]
    script, go_on = tmp_path / "half.py", tmp_path / "go-on"
    script.write_text(
        "import os, sys, time\n"
        "print('a library says hello')\n"
        'print(\'measured: {"seconds": 0.5, "peak": 1048576}\', flush=True)\n'
        f"while not os.path.exists({str(go_on)!r}):\n    time.sleep(0.01)\n"
        f"{code}\n"
    )
    monkeypatch.setattr(bench_gpu, "__file__", str(script))
    monkeypatch.setattr(bench_gpu, "LONGEST", 3.0 if ending == "waits" else 60.0)
    monkeypatch.setattr(bench_gpu, "LEAST", 0.0)
    results = bench_gpu.run("ours", tmp_path, TINY, "cpu", 1, bench_gpu.Clock(100))
    known = {"seconds": 0.5, "peak": 1 << 20}
    assert next(results) == known  # the process is still running
    go_on.touch()
    (failed,) = results
    assert failed == known | {"error": said}
    rows = bench_gpu.lines(TINY, {"ours": failed, "peer": {"seconds": 1.0, "peak": 2 << 20}})
    assert [row.split("|")[-2].strip() for row in rows] == ["", "", "", "yes", "yes"]
    assert f"incomplete: {said}" in rows[0]


def test_after_sigterm_neither_the_bases_nor_the_measurement_remain(tmp_path):
    """The bases may be in memory, and the measurement would keep the GPU busy."""
    script, table, number = (tmp_path / name for name in ("waits.py", "table.md", "process"))
    script.write_text(
        f"import os, pathlib, sys, time\nsys.path.insert(0, {str(ROOT / 'scripts')!r})\nimport bench_gpu\n"
        f"if '--work' in sys.argv:\n    pathlib.Path({str(number)!r}).write_text(str(os.getpid()))\n"
        "    print('measured: {}', flush=True)\n    time.sleep(60)\n"
        f"bench_gpu.place_of_bases = lambda: {str(tmp_path)!r}\n"
        "bench_gpu.make_bases = lambda *_: ''\nbench_gpu.__file__ = __file__\nbench_gpu.main()\n"
    )
    with subprocess.Popen([sys.executable, script, "--tiny", "--device", "cpu", "--out", table]) as process:
        while process.poll() is None and not table.exists():
            time.sleep(0.01)
        assert len(list(tmp_path.glob("adaptkit-bench-*"))) == 1
        process.terminate()
    assert process.returncode == 143
    assert not list(tmp_path.glob("adaptkit-bench-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_peer_that_fails_is_measured_without_paging_instead(tmp_path, monkeypatch):
    ours, unpaged = {"seconds": 0.1, "peak": 3 << 20}, {"seconds": 0.16, "peak": 4 << 20}
    results = {"ours": ours, "peer": {"error": "no managed memory"}, "unpaged": unpaged, "long": {"error": "x"}}
    monkeypatch.setattr(bench_gpu, "make_bases", lambda *_: "")
    monkeypatch.setattr(bench_gpu, "run", lambda what, *_: [results[what]])
    *_, found = bench_gpu.compare(TINY, "cpu", 1, tmp_path, bench_gpu.Clock(9))
    rows = bench_gpu.lines(TINY, found)
    assert "not measured: no managed memory" in rows[1]
    assert "its state not paged | 400 tokens/s" in rows[2]
    assert ["| 1.60 |" in rows[3], "| 0.75 |" in rows[4]] == [True, True]


def test_without_a_gpu_the_script_says_so_and_measures_nothing():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "scripts" / "bench_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench_gpu: torch finds no CUDA device, so nothing was measured\n"
