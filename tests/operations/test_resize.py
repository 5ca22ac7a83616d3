"""A resized adapter is the best approximation of its rank; modules that are small enough are unchanged."""

import json

import peft_adapters
import pytest
import tiny
import torch
from folders import changes_of, edited_tensors, tree
from peft_formulas import logits
from safetensors.torch import load_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.compensation import write_compensation
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Manifest, require_manifest
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.verify import verify

PREFIX = "base_model.model."


def dense(folder):
    """Map each module to its change in float64, computed from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = (tensors[f"{PREFIX}{module}.lora_{half}.weight"].double() for half in "AB")
            rank = config["rank_pattern"].get(f"^{module}$".replace(".", r"\."), config["r"])
            alpha = config["alpha_pattern"].get(f"^{module}$".replace(".", r"\."), config["lora_alpha"])
            assert (a.shape[0], b.shape[1]) == (rank, rank)
            found[module] = alpha / (rank**0.5 if config["use_rslora"] else rank) * b @ a
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory, llama):
    """A rank-8 rsLoRA adapter with decreasing singular values."""
    folder = tiny.write_peft_adapter(
        tmp_path_factory.mktemp("wide") / "adapter", llama, rank=8, seed=7, use_rslora=True, lora_alpha=3
    )
    with edited_tensors(folder / "adapter_model.safetensors") as tensors:
        for key, tensor in tensors.items():
            falling = 0.6 ** torch.arange(8.0)
            tensors[key] = tensor * (falling[:, None] if ".lora_A." in key else falling)
    return folder


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_every_module_is_the_best_approximation_of_its_rank(tmp_path, wide, rank):
    dry = resize(wide, tmp_path / "out", ResizeOptions(rank=rank), dry_run=True)
    report = resize(wide, tmp_path / "out", ResizeOptions(rank=rank))
    assert (dry.modules, dry.energy_kept, dry.parameters) == (report.modules, report.energy_kept, report.parameters)
    before, after = dense(wide), dense(tmp_path / "out")
    assert (report.resized, report.unchanged, report.ranks) == (14, 0, (rank, rank))
    total = lost = 0.0
    for entry in report.modules:
        u, sigma, vt = torch.linalg.svd(before[entry.module], full_matrices=False)
        best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        assert (after[entry.module] - best).norm() < 1e-6 * best.norm()
        missing = float((after[entry.module] - before[entry.module]).norm())
        assert entry.norm == pytest.approx(float(before[entry.module].norm()))
        assert entry.relative_error == pytest.approx(missing / entry.norm, rel=1e-5)
        assert entry.energy_kept == pytest.approx(1 - (missing / entry.norm) ** 2)
        total, lost = total + entry.norm**2, lost + missing**2
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert report.energy_kept == pytest.approx(1 - lost / total)
    assert report.parameters * 8 == report.parameters_before * rank
    verify(tmp_path / "out")


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_every_module_has_the_smallest_rank_that_retains_the_energy(tmp_path, wide, energy):
    report = resize(wide, tmp_path / "out", ResizeOptions(energy=energy))
    before = dense(wide)
    for entry in report.modules:
        shares = torch.linalg.svdvals(before[entry.module]).square().cumsum(0) / before[entry.module].square().sum()
        assert entry.rank == int((shares < energy).sum()) + 1
        assert entry.energy_kept >= energy
    assert report.energy_kept >= energy
    assert {entry.rank for entry in report.modules} <= set(range(1, 9))
    assert dense(tmp_path / "out").keys() == before.keys()  # dense compares ranks in patterns with the tensors


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 64}, {"energy": 1.0}])
def test_modules_that_are_small_enough_are_unchanged(tmp_path, wide, options):
    report = resize(wide, tmp_path / "out", ResizeOptions(**options))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (wide, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all((dense(wide)[module] - change).norm() == 0 for module, change in dense(tmp_path / "out").items())
    assert (report.resized, report.unchanged, report.energy_kept, report.relative_error) == (0, 14, 1.0, 0.0)
    assert report.below == (14 if options.get("rank") == 64 else 0)


def test_different_ranks_are_reduced_only_where_they_are_larger(tmp_path, llama):
    parts = {"r": 6, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1}}
    mixed = tiny.write_peft_adapter(tmp_path / "mixed", llama, **parts)
    report = resize(mixed, tmp_path / "out", ResizeOptions(rank=4))
    assert (report.resized, report.unchanged, report.below, report.ranks) == (12, 2, 2, (2, 4))
    before, after = changes_of(mixed), dense(tmp_path / "out")
    for module in before:
        u, sigma, vt = torch.linalg.svd(before[module])
        assert (after[module] - (u[:, :4] * sigma[:4]) @ vt[:4]).norm() < 1e-6 * sigma[0]


def test_an_energy_of_one_drops_only_zero_singular_values(tmp_path, wide, copy_of):
    folder = copy_of(wide)
    with edited_tensors(folder / "adapter_model.safetensors") as tensors:
        key = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"
        tensors[key][5:] = tensors[key][:3]  # three duplicate rows
    report = resize(folder, tmp_path / "out", ResizeOptions(energy=1.0))
    assert {entry.module: entry.rank for entry in report.modules if entry.rank < 8} == {"model.layers.0.mlp.up_proj": 5}
    before, after = dense(folder), dense(tmp_path / "out")
    assert all((before[module] - after[module]).norm() < 2e-7 * before[module].norm() for module in before)


def test_an_adapter_without_effect_can_be_resized(tmp_path, adapter, copy_of):
    folder = copy_of(adapter)
    with edited_tensors(folder / "adapter_model.safetensors") as tensors:
        tensors |= {key: tensor * 0 for key, tensor in tensors.items() if ".lora_B." in key}
    for number, options in enumerate([{"rank": 2}, {"energy": 0.9}]):
        report = resize(folder, tmp_path / str(number), ResizeOptions(**options))
        assert (report.energy_kept, report.relative_error) == (1.0, 0.0)
        assert all(not change.any() for change in dense(tmp_path / str(number)).values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_computes_the_same_if_only_zero_singular_values_were_dropped(tmp_path, family, request):
    base = request.getfixturevalue(family)
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", base, rank=6, seed=3)
    with edited_tensors(adapter / "adapter_model.safetensors") as tensors:
        for key, tensor in tensors.items():
            if ".lora_A." in key:
                tensor[3:] = tensor[:3]
    report = resize(adapter, tmp_path / "out", ResizeOptions(rank=3))
    assert report.resized == len(report.modules)
    ours, theirs = logits(base, tmp_path / "out"), logits(base, adapter)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    plain = logits(base, tiny.write_peft_adapter(tmp_path / "other", base, rank=6, seed=4))
    assert (ours - plain).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_stay_embeddings(tmp_path):
    base = tiny.write_llama(tmp_path / "untied", tied=False)
    adapter = tiny.write_peft_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    report = resize(adapter, tmp_path / "out", ResizeOptions(rank=2))
    assert report.base_copies == ("model.embed_tokens.weight",)
    before, after = read_adapter(adapter), read_adapter(tmp_path / "out")
    assert after.embeddings == before.embeddings == {"model.embed_tokens"}
    assert after.modules["model.embed_tokens"].shape == before.modules["model.embed_tokens"].shape
    change = changes_of(adapter)["model.embed_tokens"]
    u, sigma, vt = torch.linalg.svd(change, full_matrices=False)
    kept = changes_of(tmp_path / "out")["model.embed_tokens"]
    assert (kept - (u[:, :2] * sigma[:2]) @ vt[:2]).norm() < 1e-6 * sigma[0]


def test_threads_and_repetition_do_not_change_the_bytes(tmp_path, wide):
    before = torch.get_num_threads()
    for name, threads in (("one", 1), ("three", 3), ("again", 1)):
        resize(wide, tmp_path / name, ResizeOptions(rank=3, threads=threads))
        assert tree(tmp_path / name) == tree(tmp_path / "one")
    assert torch.get_num_threads() == before


def test_the_result_still_names_its_base(tmp_path, llama, wide, certified):
    known = certified(wide, llama)
    resize(known, tmp_path / "out", ResizeOptions(rank=2))
    manifest = require_manifest(tmp_path / "out")
    assert manifest.operation == {"name": "resize", "options": {"rank": 2}}
    assert [(parent.role, parent.manifest_sha256) for parent in manifest.parents] == [
        ("adapter", require_manifest(known).sha256)
    ]
    assert manifest.targets == require_manifest(known).targets
    with pytest.raises(BaseMismatchError):
        merge(tiny.write_llama(tmp_path / "other", seed=9), [tmp_path / "out"], tmp_path / "merged")
    assert merge(llama, [tmp_path / "out"], tmp_path / "merged").base_verified
    resize(wide, tmp_path / "unknown", ResizeOptions(rank=2))
    assert require_manifest(tmp_path / "unknown").targets == ()


def test_companions_dora_magnitudes_and_replaced_tensors_are_refused(tmp_path, llama, adapter):
    read = read_adapter(adapter)
    with Output(tmp_path / "companion", "test") as out:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            out.write(name, (adapter / name).read_bytes())
        write_compensation(out, read.modules)
        out.publish(Manifest("adapter", {"name": "quantize"}, tuple(out.files), read.records))
    dora = tiny.write_peft_adapter(tmp_path / "dora", llama, use_dora=True)
    saved = tiny.write_peft_adapter(tmp_path / "saved", llama, modules_to_save=["norm"])
    for folder, error in (
        (tmp_path / "companion", r"is a companion adapter, .* and was not trained"),
        (dora, "cannot resize a DoRA magnitude"),
        (saved, "cannot resize a tensor that replaces"),
    ):
        with pytest.raises(AdapterError, match=error):
            resize(folder, tmp_path / "out", ResizeOptions(rank=2))
    assert not list(tmp_path.glob("out*"))


def test_copies_of_the_base_and_the_tokenizer_are_copied(made, tmp_path, copy_of):
    """Rows of new tokens are only in peft's copy of the embedding, and their tokenizer is in the adapter's folder."""
    case = peft_adapters.make(made, "resized_embedding")
    base, whole = case.base, case.adapter
    adapter = copy_of(whole)
    (adapter / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b" ")
    same = resize(adapter, tmp_path / "same", ResizeOptions(rank=64))
    assert set(same.base_copies) == set(read_adapter(adapter).base_copies) != set()
    assert same.tokenizer == ("tokenizer.json",)
    resize(adapter, tmp_path / "small", ResizeOptions(rank=1))
    merged = {}
    for name, folder in (("before", adapter), ("after", tmp_path / "same"), ("small", tmp_path / "small")):
        merge(base, [folder], tmp_path / f"merged-{name}", MergeOptions(undo=False))
        merged[name] = tree(tmp_path / f"merged-{name}")
        assert merged[name]["tokenizer.json"] == (adapter / "tokenizer.json").read_bytes()
    weights = [name for name in merged["before"] if name.endswith(".safetensors") and name.startswith("model")]
    assert all(merged["after"][name] == merged["before"][name] for name in weights)
    shapes = [
        {k: v.shape for k, v in load_file(tmp_path / f"merged-{n}" / weights[0]).items()} for n in ("before", "small")
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["model.embed_tokens.weight"][0] == peft_adapters.GREATER_VOCABULARY
