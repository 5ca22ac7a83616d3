"""Operations refuse an input whose config.json is not the one in its manifest, which their result would name."""

import json
import shutil

import pytest

from adaptkit import adopt, dequantize, extract, merge, quantize
from adaptkit.errors import IntegrityError
from adaptkit.operations.extract import ExtractOptions
from adaptkit.operations.merge import MergeOptions


@pytest.fixture(scope="module")
def changed(tmp_path_factory, llama):
    """An adopted checkpoint, its quantization, and a copy of each with another config.json."""
    folder = tmp_path_factory.mktemp("changed")
    adopt(llama, folder / "model")
    quantize(folder / "model", folder / "nf4")
    for name in ("model", "nf4"):
        shutil.copytree(folder / name, folder / f"changed-{name}")
        path = folder / f"changed-{name}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    return folder


CALLS = {
    "adopt, base": lambda changed, adapter, out: adopt(adapter, out, base=changed / "changed-model"),
    "quantize": lambda changed, adapter, out: quantize(changed / "changed-model", out),
    "quantize, dry run": lambda changed, adapter, out: quantize(changed / "changed-model", out, dry_run=True),
    "dequantize": lambda changed, adapter, out: dequantize(changed / "changed-nf4", out),
    "extract, tuned": lambda changed, adapter, out: extract(
        changed / "changed-model", changed / "model", out, ExtractOptions(rank=2)
    ),
    "extract, base": lambda changed, adapter, out: extract(
        changed / "model", changed / "changed-model", out, ExtractOptions(rank=2)
    ),
    "merge": lambda changed, adapter, out: merge(changed / "changed-model", adapter, out),
    "merge without undo": lambda changed, adapter, out: merge(
        changed / "changed-model", adapter, out, MergeOptions(undo=False), dry_run=True
    ),
    "merge, quantized base": lambda changed, adapter, out: merge(changed / "changed-nf4", adapter, out),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_configuration_is_refused_before_anything_is_written(call, changed, adapter, tmp_path):
    with pytest.raises(IntegrityError, match=r"changed-(model|nf4): config\.json (has|changed)") as caught:
        CALLS[call](changed, adapter, tmp_path / "out")
    assert "adaptkit verify" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_original_of_a_quantized_base_with_another_configuration_is_refused(changed, adapter, tmp_path):
    for name in ("nf4", "changed-model"):
        shutil.copytree(changed / name, tmp_path / name)
    with pytest.raises(IntegrityError, match=r"changed-model: config\.json"):
        merge(tmp_path / "nf4", adapter, tmp_path / "out", MergeOptions(undo=False))


def test_a_quantization_config_that_is_not_in_the_manifest_is_a_changed_configuration(changed, tmp_path):
    shutil.copytree(changed / "model", tmp_path / "model")
    config = json.loads((changed / "nf4" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=r"config\.json has"):
        quantize(tmp_path / "model", tmp_path / "out")
