"""What every operation promises of its output: a dry run writes none, an existing one is replaced only with force."""

import pytest
from folders import tree

from adaptkit import adopt, dequantize, extract, merge, quantize, resize, stack, unmerge
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.errors import OutputExistsError, UsageError
from adaptkit.operations.dequantize import DequantizeOptions
from adaptkit.operations.extract import ExtractOptions
from adaptkit.operations.merge import MergeOptions
from adaptkit.operations.quantize import QuantizeOptions
from adaptkit.operations.resize import ResizeOptions
from adaptkit.operations.stack import StackOptions

OPERATIONS = {
    "adopt": ("adapter", lambda of, out, again, **how: adopt(of["second" if again else "adapter"], out, **how)),
    "dequantize": ("nf4", lambda of, out, again, **how: dequantize(
        of["nf4"], out, DequantizeOptions(dtype="float32" if again else None), **how)),
    "extract": ("llama", lambda of, out, again, **how: extract(
        of["merged"], of["llama"], out, ExtractOptions(rank=2 + again), **how)),
    "merge": ("llama", lambda of, out, again, **how: merge(
        of["llama"], of["adapter"], out, MergeOptions(weights=(1.0 + again,)), **how)),
    "quantize": ("llama", lambda of, out, again, **how: quantize(
        of["llama"], out, QuantizeOptions(double_quant=not again), **how)),
    "resize": ("adapter", lambda of, out, again, **how: resize(
        of["adapter"], out, ResizeOptions(rank=1 + again), **how)),
    "stack": ("adapter", lambda of, out, again, **how: stack(
        [of["adapter"], of["second"]], out, StackOptions(weights=(1.0, 1.0 + again)), **how)),
    "unmerge": ("merged", lambda of, out, again, **how: unmerge(
        of["again" if again else "merged"], of["adapter"], out, **how)),
}  # fmt: skip
"""One of an operation's inputs, and the operation, of which ``again`` gives another result."""


@pytest.fixture(scope="module")
def of(tmp_path_factory, llama, llama_nf4, adapter, second_adapter):
    """Inputs by name."""
    folder = tmp_path_factory.mktemp("outputs")
    merge(llama, adapter, folder / "merged")
    merge(llama, adapter, folder / "again", MergeOptions(weights=(2.0,)))
    made = {name: folder / name for name in ("merged", "again")}
    return made | {"llama": llama, "nf4": llama_nf4, "adapter": adapter, "second": second_adapter}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_existing_output_is_replaced_only_with_force_and_no_input_is_changed(name, of, tmp_path):
    source, run = OPERATIONS[name]
    report = run(of, tmp_path / "out", False)
    before = tree(tmp_path)
    assert report.manifest_sha256 == require_manifest(tmp_path / "out").sha256
    with pytest.raises(OutputExistsError):
        run(of, tmp_path / "out", True)
    assert tree(tmp_path) == before
    run(of, tmp_path / "out", True, force=True)
    assert tree(tmp_path / "out") != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match=r"its own input|inside the artifact"):
        run(of, of[source] / "out", False)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"unmerge"}))
def test_a_dry_run_writes_nothing_and_finds_an_existing_output(name, of, tmp_path):
    run = OPERATIONS[name][1]
    assert run(of, tmp_path / "out", False, dry_run=True).manifest_sha256 is None
    assert list(tmp_path.iterdir()) == []
    run(of, tmp_path / "out", False)
    with pytest.raises(OutputExistsError):
        run(of, tmp_path / "out", True, dry_run=True)
