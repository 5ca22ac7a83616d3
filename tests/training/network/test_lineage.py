"""An adapter's base is recognized by every weight that the adapter was trained on, with and without manifests."""

import shutil

import pytest
import tiny

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.base_weights import Weights, check_base
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.training.config import TrainConfig
from adaptkit.training.loop import train
from adaptkit.training.network.lineage import base_of


@pytest.fixture(scope="module")
def family(made, instructions):
    """A base, its quantized versions, adapters of both, and models merged from them."""
    root = made / "family"
    base = tiny.write_llama(root / "base", tied=False)
    quantize(base, root / "nf4")
    quantize(base, root / "fp4", QuantizeOptions(format="fp4"))
    shared = {"data": (str(instructions),), "steps": 1, "batch_size": 2, "rank": 2, "learning_rate": 5e-2}
    for name, on, more in (
        ("of-base", "base", {}), ("of-nf4", "nf4", {}), ("of-mlp", "base", {"targets": ("*down_proj",)}),
    ):  # fmt: skip
        train(TrainConfig(base=str(root / on), device="cpu", **shared, **more), root / name)
    resize(root / "of-nf4", root / "resized", ResizeOptions(rank=1))  # its parent is an adapter
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
def test_a_base_in_which_only_down_proj_changed_is_a_different_base(family, unsigned, adapter, has_manifest):
    merged = family / "merged-mlp" if has_manifest else unsigned("merged-mlp")
    check_base(read_adapter(family / adapter), Weights(family / "base"))
    with pytest.raises(BaseMismatchError, match=r"belongs to another base than .*down_proj differs"):
        check_base(read_adapter(family / adapter), Weights(merged))


def test_a_quantized_base_without_a_manifest_is_recognized_by_its_packed_weights(family, unsigned):
    adapter = read_adapter(family / "of-nf4")
    check_base(adapter, Weights(unsigned("nf4")))
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        check_base(adapter, Weights(unsigned("merged-nf4")))


@pytest.mark.parametrize(
    ("adapter", "bases", "own"),
    [
        ("resized", ("base", "nf4"), "nf4"),
        ("resized", ("fp4", "nf4"), "nf4"),
        ("resized", ("merged", "base"), "base"),
        ("of-nf4", ("base", "merged-nf4"), "base"),
    ],
)
def test_an_adapter_is_matched_to_the_base_whose_weights_it_was_trained_on(family, adapter, bases, own):
    found = base_of(read_adapter(family / adapter), [Weights(family / base) for base in bases])
    assert found.root == family / own


def test_an_adapter_is_matched_to_its_quantized_base_without_manifests_too(family, unsigned):
    bases = [Weights(unsigned(name)) for name in ("merged-nf4", "nf4")]
    assert base_of(read_adapter(family / "of-nf4"), bases) is bases[1]
    assert base_of(read_adapter(family / "resized"), bases) is bases[1]


def test_an_ambiguous_or_missing_base_is_an_error(family, unsigned):
    resized, of_base = read_adapter(family / "resized"), read_adapter(family / "of-base")
    for adapter, bases in (
        (resized, [family / "base", family / "fp4"]),  # the same 16-bit weights, and neither is its own base
        (of_base, [unsigned("merged-nf4"), unsigned("nf4")]),  # packed, and the adapter records only 16-bit weights
        (of_base, [family / "merged", unsigned("fp4")]),
    ):
        with pytest.raises(UsageError, match=r"cannot tell which of .* it belongs to") as caught:
            base_of(adapter, [Weights(base) for base in bases])
        assert "alone" in caught.value.hint
    with pytest.raises(BaseMismatchError, match="belongs to none of"):
        base_of(resized, [Weights(family / name) for name in ("merged", "merged-nf4")])
