"""An adapter is told from those of other bases by every weight that it was trained on, with manifests and without."""

import shutil

import pytest
import tiny

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.errors import BaseMismatchError
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.network.lineage import check_base


@pytest.fixture(scope="module")
def family(made, instructions):
    """A base, what it was quantized to, adapters of both, and what the base was merged to."""
    root = made / "family"
    base = tiny.write_llama(root / "base", tied=False)
    quantize(base, root / "nf4")
    shared = {"data": (str(instructions),), "steps": 1, "batch_size": 2, "rank": 2, "learning_rate": 5e-2}
    for name, on, more in (
        ("of-base", "base", {}), ("of-nf4", "nf4", {}), ("of-mlp", "base", {"targets": ("*down_proj",)}),
    ):  # fmt: skip
        train(TrainConfig(base=str(root / on), device="cpu", **shared, **more), root / name)
    merge(base, [root / "of-mlp"], root / "merged-mlp")
    merge(base, [root / "of-base"], root / "merged")
    quantize(root / "merged", root / "merged-nf4")
    return root


@pytest.fixture
def unsigned(family, tmp_path):
    """Copy a member without its manifest."""

    def copy(name):
        folder = shutil.copytree(family / name, tmp_path / name)
        (folder / MANIFEST_NAME).unlink()
        return folder

    return copy


@pytest.mark.parametrize("adapter", ["of-base", "of-nf4"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_base_whose_largest_weights_alone_changed_is_another(family, unsigned, adapter, has_manifest):
    merged = family / "merged-mlp" if has_manifest else unsigned("merged-mlp")
    check_base(read_adapter(family / adapter), family / "base")
    with pytest.raises(BaseMismatchError, match=r"belongs to another base than .*down_proj differs"):
        check_base(read_adapter(family / adapter), merged)


def test_a_quantized_base_without_a_manifest_is_known_by_the_parts_of_its_weights(family, unsigned):
    adapter = read_adapter(family / "of-nf4")
    check_base(adapter, unsigned("nf4"))
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        check_base(adapter, unsigned("merged-nf4"))
