"""``verify --recompute`` repeats the operation that made an artifact; publishing may have added a model card."""

import json
import shutil
from types import SimpleNamespace

import pytest
from folders import add_listed

from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME
from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import IntegrityError
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.verify import VerifyOptions, verify


def test_an_added_model_card_is_accepted_and_any_other_added_file_is_rejected(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    quantize(base, tmp_path / "nf4")
    options = VerifyOptions(parents=(base,), recompute=True)
    add_listed(tmp_path / "nf4", "README.md", "# A model")
    (made,) = verify(tmp_path / "nf4", options).recomputed
    assert made[1] == "same bytes, except for the model card, which publish adds"
    add_listed(tmp_path / "nf4", "NOTICE.txt", "# A model")
    with pytest.raises(IntegrityError, match=r"NOTICE\.txt differs"):
        verify(tmp_path / "nf4", options)


def test_without_disk_space_the_error_suggests_setting_tmpdir(llama, tmp_path, monkeypatch):
    base = shutil.copytree(llama, tmp_path / "base")
    quantize(base, tmp_path / "nf4")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    with pytest.raises(DiskError) as caught:
        verify(tmp_path / "nf4", VerifyOptions(parents=(base,), recompute=True))
    assert caught.value.hint == "free some space, or set TMPDIR to a folder on a disk with more space"


def test_a_parent_in_different_shards_gives_a_different_result_and_a_hint(llama_nf4, llama_sharded):
    """The record of a parent without a manifest covers its tensors, but not their split into files."""
    with pytest.raises(IntegrityError, match="gives a different result") as caught:
        verify(llama_nf4, VerifyOptions(parents=(llama_sharded,), recompute=True))
    assert "give the original folders of its parents with --parents" in caught.value.hint


def test_among_parents_with_equal_tensors_the_ones_that_were_merged_are_found(llama, adapter, copy_of, tmp_path):
    twins = [copy_of(adapter, name) for name in ("first", "second")]
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text())
    (twins[1] / ADAPTER_CONFIG_NAME).write_text(json.dumps(config | {"lora_alpha": 3}))
    merge(llama, twins, tmp_path / "both")
    for number, twin in enumerate(twins):
        merge(llama, [twin], tmp_path / f"merged-{number}")
    for merged, used in (("merged-0", twins[:1]), ("merged-1", twins[1:]), ("both", twins)):
        for order in (twins, twins[::-1]):
            report = verify(tmp_path / merged, VerifyOptions(parents=(llama, *order), recompute=True))
            assert [parent.path for parent in report.parents[1:]] == [str(path) for path in used]
            assert report.recomputed[-1][1] == "same bytes"
