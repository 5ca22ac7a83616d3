"""Properties that hold for every model and adapter, byte for byte where that is promised."""

from dataclasses import asdict

import pytest
import torch
import transformers  # noqa: F401 - if it is not loaded, quantize asks it about a model in a separate process
from folders import tensors_of, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ARCHITECTURES, LORAS, WEIGHTS, scratch
from safetensors.torch import load_file

from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.diff import diff
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.stack import StackOptions, stack
from adaptkit.operations.unmerge import unmerge

few = settings(max_examples=8, derandomize=True, deadline=None)
SMALL_SHARDS = 6_000


def _codes(packed, kind):
    """One code per weight; fp4 has two for zero, of which quantizing again writes the first."""
    codes = torch.stack([packed >> 4, packed & 15])
    return codes.where(codes != 8, 0) if kind == "fp4" else codes


@few
@given(ARCHITECTURES, st.lists(st.tuples(LORAS, WEIGHTS), min_size=1, max_size=3))
def test_unmerge_undoes_merge_to_the_last_byte(architecture, changes):
    with scratch() as root:
        base = architecture.write(root / "base")
        adapters = [lora.write(root / f"lora-{n}", architecture) for n, (lora, _) in enumerate(changes)]
        merge(base, adapters, root / "merged", MergeOptions(weights=tuple(weight for _, weight in changes)))
        unmerge(root / "merged", adapters, root / "out")
        found = tree(root / "out")
        assert {path: found[path] for path in tree(base)} == tree(base)


@few
@given(ARCHITECTURES, LORAS, LORAS, WEIGHTS, WEIGHTS)
def test_a_stack_is_the_weighted_sum_and_merges_like_its_members(architecture, one, two, first, second):
    with scratch() as root:
        base = architecture.write(root / "base")
        adapters = [one.write(root / "one", architecture), two.write(root / "two", architecture)]
        stack(adapters, root / "stacked", StackOptions(method="cat", weights=(first, second)))
        tensors = load_file(root / "stacked" / "adapter_model.safetensors")
        expected = {m: first * delta for m, delta in one.deltas(architecture).items()}
        for module, delta in two.deltas(architecture).items():
            expected[module] = expected.get(module, 0) + second * delta
        size = {
            module: sum(
                abs(weight * lora.scaling) * (f[1].double().abs() @ f[0].double().abs())
                for lora, weight in ((one, first), (two, second))
                if (f := lora.factors(architecture).get(module))
            )
            for module in expected
        }
        half = 2.0**-24  # half a unit of float32, in which B times weight and scaling is stored
        for module, delta in expected.items():
            a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
            assert ((b @ a - delta).abs() <= 1.01 * half * size[module]).all(), module
        merge(base, adapters, root / "apart", MergeOptions(weights=(first, second)))
        merge(base, [root / "stacked"], root / "together")
        apart, together = tensors_of(root / "apart"), tensors_of(root / "together")
        for tensor, found in apart.items():
            module = tensor.removesuffix(".weight")
            if module not in expected:
                assert torch.equal(found, together[tensor])
                continue
            unit = torch.finfo(found.dtype).eps * torch.maximum(found.abs(), together[tensor].abs()).double()
            bound = unit + 2 * half * size[module] + torch.finfo(found.dtype).tiny
            assert ((found.double() - together[tensor].double()).abs() <= bound).all(), tensor


@few
@given(ARCHITECTURES, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64]))
def test_quantizing_dequantized_weights_again_loses_nothing(architecture, kind, block_size):
    """Bit for bit, with constants and weights in float32."""
    options = QuantizeOptions(format=kind, block_size=block_size, double_quant=False)
    with scratch() as root:
        quantize(architecture.write(root / "base"), root / "first", options)
        dequantize(root / "first", root / "plain", DequantizeOptions(dtype="float32"))
        quantize(root / "plain", root / "second", options)
        dequantize(root / "second", root / "again", DequantizeOptions(dtype="float32"))
        plain, again = tensors_of(root / "plain"), tensors_of(root / "again")
        assert plain.keys() == again.keys()
        for tensor in plain:
            assert torch.equal(plain[tensor], again[tensor]), tensor


@few
@given(
    ARCHITECTURES, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64]), st.sampled_from(["float32", "bfloat16"])
)
def test_quantizing_again_keeps_codes_with_nested_constants_and_16_bit_weights(architecture, kind, block_size, dtype):
    """The constants are rounded again, by no more than the resolution of their 8 bits and of the dtype between."""
    options = QuantizeOptions(format=kind, block_size=block_size)
    with scratch() as root:
        quantize(architecture.write(root / "base"), root / "first", options)
        dequantize(root / "first", root / "plain", DequantizeOptions(dtype=dtype))
        quantize(root / "plain", root / "second", options)
        codes, codes_again = tensors_of(root / "first"), tensors_of(root / "second")
        packed = [name for name in codes if codes[name].dtype == torch.uint8 and name.endswith(".weight")]
        assert packed
        for name in packed:
            assert torch.equal(_codes(codes[name], kind), _codes(codes_again[name], kind)), name
        dequantize(root / "first", root / "once", DequantizeOptions(dtype="float32"))
        dequantize(root / "second", root / "again", DequantizeOptions(dtype="float32"))
        once, again = tensors_of(root / "once"), tensors_of(root / "again")
        for name in packed:
            most = once[name].abs().max()
            assert (once[name] - again[name]).abs().max() <= most * (0.01 + torch.finfo(getattr(torch, dtype)).eps)


@few
@given(ARCHITECTURES, LORAS, LORAS, st.integers(2, 5))
def test_any_number_of_threads_gives_the_same_bytes(architecture, one, two, threads):
    with scratch() as root:
        base = architecture.write(root / "base")
        adapters = [one.write(root / "one", architecture), two.write(root / "two", architecture)]
        for count in (1, threads):
            at = root / str(count)
            merge(base, adapters, at / "merged", MergeOptions(threads=count))
            stack(adapters, at / "ties", StackOptions(method="ties", rank=2, threads=count))
            resize(adapters[0], at / "small", ResizeOptions(rank=1, threads=count))
            extract(at / "merged", base, at / "extracted", ExtractOptions(rank=2, threads=count))
            quantize(base, at / "quantized", QuantizeOptions(threads=count))
            dequantize(at / "quantized", at / "plain", DequantizeOptions(threads=count))
        assert tree(root / "1") == tree(root / str(threads))


@few
@given(ARCHITECTURES, LORAS, LORAS)
def test_diff_is_zero_for_the_same_adapter_and_symmetric_for_different_ones(architecture, one, two):
    with scratch() as root:
        folders = [one.write(root / "one", architecture), two.write(root / "two", architecture)]
        same = diff(folders[0], folders[0])
        assert same.same
        assert all(module.difference == 0 and module.relative == 0 for module in same.modules)
        there, back = (
            {module.module: asdict(module) for module in diff(*pair).modules} for pair in (folders, folders[::-1])
        )
        assert there.keys() == back.keys()
        for module, found in there.items():
            for figure in ("ranks", "shapes"):
                assert found[figure] == back[module][figure][::-1], figure
            largest = max(found["norms"])  # the order of a sum affects its last digits
            for figure in ("norms", "spectra"):
                for here, mirrored in zip(found[figure], back[module][figure][::-1], strict=True):
                    assert here == pytest.approx(mirrored, rel=1e-9, abs=1e-12 * largest), figure
            for figure in ("difference", "cosine", "relative", "difference_spectrum"):
                assert found[figure] == pytest.approx(back[module][figure], rel=1e-9, abs=1e-12 * largest), figure
            assert found["inner"] == pytest.approx(back[module]["inner"], rel=1e-9, abs=1e-12 * largest**2)


@few
@given(ARCHITECTURES, LORAS, st.integers(0, 3))
def test_a_resize_to_the_full_rank_changes_nothing(architecture, lora, more):
    with scratch() as root:
        folder = lora.write(root / "lora", architecture)
        resize(folder, root / "out", ResizeOptions(rank=lora.rank + more))
        before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, root / "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert diff(folder, root / "out").total.difference == 0
