"""Published artifacts stay readable, and the current code still makes the same bytes.

A failure here means that an artifact made by this version differs from one made before, with the same inputs. If
that is intended, bump the schema and run ``fixtures/make_golden.py``; the old folder stays and must stay readable.
"""

import json

import make_golden
import pytest
from make_golden import CURRENT, GOLDEN

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import IntegrityError
from adaptkit.formats._find import quantized_names
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.diff import diff
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.unmerge import unmerge
from adaptkit.operations.verify import verify
from adaptkit.training.network.packed import read_quantized

pytestmark = pytest.mark.quick

MANIFEST = "adaptkit-manifest.json"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir())


def assert_same(made, golden):
    """Compare all bytes, except for the version of adaptkit in a manifest, which is meant to change."""
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (made, golden)]
    assert names[0] == names[1]
    for path in (golden / name for name in names[1]):
        found, expected = (made / path.relative_to(golden)).read_bytes(), path.read_bytes()
        if path.name == MANIFEST:
            found, expected = json.loads(found), json.loads(expected)
            assert found["tool"].pop("version")
            assert expected["tool"].pop("version")
        assert found == expected, path.name


def test_the_current_version_has_golden_files_and_all_are_small():
    assert CURRENT.name in VERSIONS
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000


def test_the_inputs_are_reproduced(tmp_path):
    make_golden.write_base(tmp_path / "base")
    assert_same(tmp_path / "base", CURRENT / "base")
    make_golden.write_golden_adapter(tmp_path / "adapter", CURRENT / "base")
    assert_same(tmp_path / "adapter", CURRENT / "adapter")


@pytest.mark.parametrize("threads", [1, 2])
def test_quantizing_gives_the_same_bytes(tmp_path, threads):
    from dataclasses import replace

    quantize(CURRENT / "base", tmp_path / "out", replace(make_golden.QUANTIZE, threads=threads))
    assert_same(tmp_path / "out", CURRENT / "quantized")


@pytest.mark.parametrize("threads", [1, 2])
def test_merging_gives_the_same_bytes(tmp_path, threads):
    from dataclasses import replace

    options = replace(make_golden.MERGE, threads=threads)
    report = merge(CURRENT / "base", [CURRENT / "adapter"], tmp_path / "out", options)
    assert report.base_verified
    assert_same(tmp_path / "out", CURRENT / "merged")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["adapter", "quantized", "merged"])
def test_every_version_can_be_verified(version, name):
    assert verify(GOLDEN / version / name).kind == name


def test_the_current_version_is_unmerged_to_the_bytes_of_its_base_and_an_older_record_refused(tmp_path):
    unmerge(CURRENT / "merged", [CURRENT / "adapter"], tmp_path / "out")
    for path in (CURRENT / "base").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    for version in set(VERSIONS) - {CURRENT.name}:
        with pytest.raises(IntegrityError, match="version 1; expected 2") as caught:
            unmerge(GOLDEN / version / "merged", [GOLDEN / version / "adapter"], tmp_path / "older")
        assert "version of adaptkit that merged it" in caught.value.hint


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_can_be_read(tmp_path, version):
    folder = GOLDEN / version
    checkpoint, base = Checkpoint(folder / "quantized"), Checkpoint(folder / "base")
    names = quantized_names(checkpoint)
    assert len(names) == 9
    dequantize(folder / "quantized", tmp_path / "out")
    plain = Checkpoint(tmp_path / "out")
    for name in names:
        original, decoded = as_tensor(base.read(name)).float(), read_quantized(checkpoint, name).dequantize().float()
        assert (decoded - original).norm() < 0.15 * original.norm()
        assert (as_tensor(plain.read(name)).float() - decoded).abs().max() == 0
    assert len(read_adapter(folder / "adapter").modules) == 5
    assert diff(folder / "adapter", folder / "adapter").same
