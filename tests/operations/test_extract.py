"""Base + extracted adapter is the tuned checkpoint as closely as the rank allows, and the loss is reported."""

import math
import shutil

import peft_adapters
import pytest
import tiny
import torch
from folders import changes_of, edit_json, edited_tensors, rewritten, tensors_of, tree
from peft_formulas import logits
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.manifest import TensorRecord, require_manifest, tensors_root
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import (
    BaseMismatchError,
    CheckpointError,
    IntegrityError,
    NonFiniteError,
    UsageError,
)
from adaptkit.numerics.tensors import as_array
from adaptkit.operations import _shards
from adaptkit.operations.check import check
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.verify import verify

LINEAR = ".layers."
UP = "model.layers.0.mlp.up_proj"
WHOLE = ExtractOptions(rank=4096)


def tuned_from(base, folder, change):
    """Copy a checkpoint, with ``change(name, tensor)`` in place of each tensor, unless that is None."""
    shutil.copytree(base, folder)
    for file in sorted(folder.glob("*.safetensors")):
        with edited_tensors(file) as tensors:
            for name, tensor in tensors.items():
                new = change(name, tensor)
                tensors[name] = tensor if new is None else new.to(tensor.dtype).contiguous()
    return folder


def noise(scale=0.1, only="", rank=None, seed=0):
    """Return a random change of float tensors with ``only`` in their names, or one of low rank of linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def change(name, tensor):
        if only not in name or not tensor.is_floating_point():
            return None
        added = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if rank is not None:
            if tensor.dim() != 2 or LINEAR not in name:
                return None
            sizes = (tensor.shape[0], rank), (rank, tensor.shape[1])
            b, a = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
            added = b * 0.7 ** torch.arange(rank) @ a
        return tensor.double() + added * (scale * tensor.double().norm() / added.norm())

    return change


def changes(tuned, base):
    """Tensor -> tuned - base in float64."""
    before, after = tensors_of(base), tensors_of(tuned)
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A float32 Llama with an untied head."""
    return tiny.write_llama(tmp_path_factory.mktemp("plain") / "base", dtype="float32", tied=False)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, plain):
    """A copy of ``plain`` with a full-rank change of every tensor."""
    return tuned_from(plain, tmp_path_factory.mktemp("tuned") / "tuned", noise())


@pytest.fixture(scope="module")
def falling(tmp_path_factory, plain):
    """A copy of ``plain`` whose linear layers have a change of rank 12 with decreasing singular values."""
    return tuned_from(plain, tmp_path_factory.mktemp("falling") / "tuned", noise(rank=12))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_at_full_rank_the_whole_change_is_extracted(tmp_path, dtype):
    base = tiny.write_llama(tmp_path / "base", dtype=dtype)
    folder = tuned_from(base, tmp_path / "tuned", noise(only="_proj"))
    report = extract(folder, base, tmp_path / "out", WHOLE)
    expected, found = changes(folder, base), changes_of(tmp_path / "out")
    assert len(found) == 14
    for module, delta in found.items():
        difference = delta - expected[f"{module}.weight"]
        assert difference.norm() < 5e-7 * delta.norm()  # A and B are rounded to float32
    assert report.energy_kept == pytest.approx(1, abs=1e-12)
    assert report.relative_error < 1e-6
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "of_tuned"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_dtypes_may_differ_and_rounding_alone_is_not_a_change(tmp_path, dtype, of_tuned):
    """Fine-tuning often saves float32 beside a base in bfloat16."""
    base, changed = tiny.write_llama(tmp_path / "base", dtype=dtype), ("up_proj", "input_layernorm")
    cast = rewritten(shutil.copytree(base, tmp_path / "cast"), of_dtype(getattr(torch, of_tuned)))
    folder = tuned_from(
        cast, tmp_path / "tuned", lambda name, t: noise()(name, t) if name.split(".")[-2] in changed else None
    )
    report = extract(folder, base, tmp_path / "out", WHOLE)
    assert (len(report.modules), len(report.saved), report.equal) == (2, 2, len(Checkpoint(base).tensors) - 4)
    assert merge(base, [tmp_path / "out"], tmp_path / "merged").base_verified
    before, after, found = (tensors_of(where) for where in (base, folder, tmp_path / "merged"))
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        if name.split(".")[-2] in changed:
            assert torch.allclose(tensor.double(), after[name].double(), rtol=torch.finfo(tensor.dtype).eps, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name])


def of_dtype(dtype):
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_extracting_from_a_bfloat16_merge_recovers_the_adapter_up_to_rounding(tmp_path, llama, adapter):
    """Rounding noise is spread over all dimensions; a rank-4 approximation contains the part in its tangent space."""
    merge(llama, [adapter], tmp_path / "merged")
    report = extract(tmp_path / "merged", llama, tmp_path / "out", ExtractOptions(rank=4))
    found, truth, merged = changes_of(tmp_path / "out"), changes_of(adapter), changes(tmp_path / "merged", llama)
    for entry in report.modules:
        rounding = (merged[f"{entry.module}.weight"] - truth[entry.module]).norm()
        off = (found[entry.module] - truth[entry.module]).norm()
        out, columns = truth[entry.module].shape
        caught = math.sqrt(4 * (out + columns - 4) / (out * columns))
        assert 0.8 * caught < off / rounding < 1.3 * caught
        assert entry.relative_error < rounding / entry.norm
        assert entry.rounding == pytest.approx(float(rounding / entry.norm) ** 2, rel=0.2)
    assert report.equal == len(Checkpoint(llama).tensors) - 14
    assert merge(llama, [tmp_path / "out"], tmp_path / "again").base_verified


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_report_agrees_with_a_dense_decomposition(tmp_path, plain, falling, rank):
    report = extract(falling, plain, tmp_path / "out", ExtractOptions(rank=rank))
    truth, base, found = changes(falling, plain), tensors_of(plain), changes_of(tmp_path / "out")
    assert (len(report.modules), report.equal, report.ranks) == (14, 7, (rank, rank))
    total = lost = 0.0
    for entry in report.modules:
        change = truth[f"{entry.module}.weight"]
        norm, missing = float(change.norm()), float((change - found[entry.module]).norm())
        sigma = torch.linalg.svdvals(change)
        best = float(sigma[rank:].norm())
        assert best * 0.999 - 1e-6 * norm <= missing <= best * 1.02 + 1e-6 * norm
        assert entry.norm == pytest.approx(norm, rel=1e-6)
        assert entry.relative_norm == pytest.approx(norm / float(base[f"{entry.module}.weight"].double().norm()))
        assert entry.relative_error == pytest.approx(missing / norm, rel=1e-4, abs=1e-6)
        assert entry.energy_kept == pytest.approx(1 - (missing / norm) ** 2, abs=1e-6)
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        assert entry.rank_99 == int((shares < 0.99).sum()) + 1
        total, lost = total + norm**2, lost + missing**2
    assert report.energy_kept == pytest.approx(1 - lost / total, abs=1e-6)
    assert report.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-4, abs=1e-6)
    assert report.below_90 == sum(entry.energy_kept < 0.9 for entry in report.modules) == (14 if rank < 4 else 0)
    factors = sum(term.lora_a.numel() + term.lora_b.numel() for term in read_adapter(tmp_path / "out").modules.values())
    assert report.parameters == factors


@pytest.mark.parametrize("energy", [0.6, 0.9999])
def test_every_module_reaches_the_energy_with_the_smallest_possible_rank(tmp_path, plain, falling, energy):
    report = extract(falling, plain, tmp_path / "out", ExtractOptions(energy=energy))
    truth = changes(falling, plain)
    for entry in report.modules:
        sigma = torch.linalg.svdvals(truth[f"{entry.module}.weight"])
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        assert entry.rank == int((shares < energy).sum()) + 1
        assert entry.energy_kept >= energy
    assert report.unreached == 0
    assert {module: term.rank for module, term in read_adapter(tmp_path / "out").modules.items()} == {
        entry.module: entry.rank for entry in report.modules
    }
    if energy == 0.9999:
        limited = extract(falling, plain, tmp_path / "less", ExtractOptions(energy=energy, max_rank=3))
        assert limited.ranks == (3, 3)
        assert limited.unreached == 14
        assert all(entry.energy_kept < energy for entry in limited.modules)


FAMILIES = ["tied", "untied", "gpt2", "qwen2", "phi", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A float32 model, and a copy in which every tensor differs."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("tied", "untied"):
        base = tiny.write_llama(folder / "base", dtype="float32", tied=request.param == "tied")
    elif request.param == "gpt2":
        base = tiny.write_gpt2(folder / "base")
    else:
        base = tiny.write_family(folder / "base", request.param, dtype="float32")
    return base, tuned_from(base, folder / "tuned", noise())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:The following (rank|alpha)_pattern")
def test_peft_and_a_merge_give_the_tuned_model(tmp_path, family):
    base, folder = family
    report = extract(folder, base, tmp_path / "out", WHOLE)
    assert len(report.modules) + len(report.saved) == report.tensors
    ours, theirs, before = logits(base, tmp_path / "out"), logits(folder), logits(base)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (before - theirs).abs().max() > 0.05 * theirs.abs().max()
    assert merge(base, [tmp_path / "out"], tmp_path / "merged").base_verified
    merged, wanted = tensors_of(tmp_path / "merged"), tensors_of(folder)
    assert merged.keys() == wanted.keys()
    for name in wanted:
        if name in {tensor.name for tensor in report.saved}:
            assert torch.equal(merged[name], wanted[name]), name
        else:
            assert (merged[name] - wanted[name]).abs().max() <= 1e-6 * wanted[name].abs().max(), name


@pytest.mark.parametrize("only", ["norm", "lm_head"])
def test_an_adapter_without_low_rank_changes_still_loads(tmp_path, plain, only):
    folder = tuned_from(plain, tmp_path / "tuned", noise(only=only))
    report = extract(folder, plain, tmp_path / "out", ExtractOptions(rank=2))
    assert report.modules == ()
    assert report.placeholder == "model.layers.0.mlp.down_proj"
    assert {tensor.name for tensor in report.saved} == {name for name in tensors_of(plain) if only in name}
    assert (logits(plain, tmp_path / "out") - logits(folder)).abs().max() < 1e-6
    merge(plain, [tmp_path / "out"], tmp_path / "merged")
    merged, wanted = tensors_of(tmp_path / "merged"), tensors_of(folder)
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_a_layer_that_the_model_splits_is_neither_extracted_nor_the_placeholder(tmp_path):
    """Of NomicBert, peft's model has no module named as in the files; a placeholder is needed if only norms change."""
    import peft
    import transformers

    tiny.need_architecture("nomic_bert")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "nomic_bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    base = tmp_path / "base"
    transformers.AutoModel.from_config(config).save_pretrained(base)
    folder = tuned_from(base, tmp_path / "tuned", noise(only="norm"))
    report = extract(folder, base, tmp_path / "out", ExtractOptions(rank=4))
    assert report.modules == ()
    assert "Wqkv" not in report.placeholder
    model, wanted = (transformers.AutoModel.from_pretrained(path).eval() for path in (base, folder))
    tokens = torch.arange(12).reshape(2, 6)
    before = model(tokens).last_hidden_state
    found = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(tokens).last_hidden_state
    assert (found - wanted(tokens).last_hidden_state).abs().max() < 1e-6
    assert (before - found).abs().max() > 1e-3
    split = tuned_from(base, tmp_path / "split", lambda n, t: t + 0.1 if "attn." in n and "norm" not in n else None)
    with pytest.raises(UsageError, match=r"Wqkv\.weight differs, but transformers splits it"):
        extract(split, base, tmp_path / "adapter", ExtractOptions(rank=2))
    assert not (tmp_path / "adapter").exists()
    report = extract(split, base, tmp_path / "adapter", ExtractOptions(rank=2, target=("*.out_proj",)))
    assert report.modules
    assert all(entry.module.endswith(".out_proj") for entry in report.modules)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_adapter_has_the_models_prefix_even_if_the_files_lack_it(tmp_path, gpt2):
    """As those of GPT-2 on the Hub do."""
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(gpt2).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    folder = tuned_from(base, tmp_path / "tuned", noise())
    extract(folder, base, tmp_path / "out", WHOLE)
    assert "transformer.h.0.attn.c_attn" in read_adapter(tmp_path / "out").modules
    assert "transformer.ln_f.weight" in read_adapter(tmp_path / "out").replaced
    ours, theirs = logits(base, tmp_path / "out"), logits(folder)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert merge(base, [tmp_path / "out"], tmp_path / "merged").base_verified


@pytest.mark.parametrize("name", tiny.OTHER_CLASSES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_models_other_than_language_models_get_an_adapter_for_their_own_class(tmp_path, name):
    """``AutoModel`` saves no head, and its layers have different names than a language model's."""
    import transformers
    from peft import PeftModel

    base = tiny.write_class(tmp_path / "base", name)
    folder = tuned_from(base, tmp_path / "tuned", noise())
    extract(folder, base, tmp_path / "out", WHOLE)

    def outputs(source, adapter=None):
        model = getattr(transformers, name).from_pretrained(source, dtype=torch.float32)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.eval()(torch.arange(3, 43).view(2, 20))[0]

    with peft_adapters.quiet():
        ours, theirs, before = outputs(base, tmp_path / "out"), outputs(folder), outputs(base)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (before - theirs).abs().max() > 0.05 * theirs.abs().max()
    assert check(tmp_path / "out", ["peft"], base).verdicts[0].findings == ()
    merge(base, [tmp_path / "out"], tmp_path / "merged")
    merged, wanted = tensors_of(tmp_path / "merged"), tensors_of(folder)
    assert all((merged[key] - wanted[key]).abs().max() <= 1e-6 * wanted[key].abs().max() for key in wanted)


ROUTED = {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
NAMED_ALIKE = {
    "norm of LlamaModel": ("LlamaModel", {}, ("norm.weight", "layers.1.self_attn.q_proj.weight"), "norm.weight"),
    "linear layer with a head's name": (
        "DistilBertForSequenceClassification",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3},
        ("classifier.weight", "pre_classifier.weight"),
        "pre_classifier.weight",
    ),
    "router with a buffer": (
        "DeepseekV3ForCausalLM",
        ROUTED,
        ("model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.q_a_proj.weight"),
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ),
}
"""A class, its configuration, tensors that differ, and a tensor that peft matches by a name saved for them."""


@pytest.mark.parametrize("case", NAMED_ALIKE)
def test_other_tensors_that_a_saved_name_matches_are_saved_too(tmp_path, case):
    """peft matches names with the ends of paths, and then expects every matching tensor in the file."""
    import transformers
    from peft import PeftModel

    name, values, differ, beside = NAMED_ALIKE[case]
    of_class = getattr(transformers, name)
    values = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2} | values
    values |= {"num_attention_heads": 4, "pad_token_id": 0} if "dim" not in values else {"pad_token_id": 0}
    with peft_adapters.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of_class(of_class.config_class(**values)).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    folder = tuned_from(base, tmp_path / "tuned", lambda n, t: noise()(n, t) if n in differ else None)
    report = extract(folder, base, tmp_path / "out", WHOLE)
    assert beside in read_adapter(tmp_path / "out").replaced
    assert len(report.modules) + len(report.saved) == len(differ)

    def outputs(source, adapter=None):
        with peft_adapters.quiet(), torch.no_grad():
            model = of_class.from_pretrained(source, dtype=torch.float32)
            model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
            return model.eval()(torch.arange(3, 43).view(2, 20))[0]

    theirs = outputs(folder)
    assert (outputs(base) - theirs).abs().max() > 0.01 * theirs.abs().max()
    assert (outputs(base, tmp_path / "out") - theirs).abs().max() < 1e-5 * theirs.abs().max()
    merged = merge(base, [tmp_path / "out"], tmp_path / "merged")
    assert merged.base_verified
    assert (outputs(tmp_path / "merged") - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("others", ["left out", "rounded"])
def test_a_tensor_that_is_not_extracted_stays_the_bases_even_if_a_saved_name_matches_it(tmp_path, others):
    base = tuned_from(tiny.write_class(tmp_path / "made", "LlamaModel"), tmp_path / "base", noise(only="norm"))
    if others == "left out":
        options, folder = ExtractOptions(rank=2, target=("norm",)), tuned_from(base, tmp_path / "tuned", noise(0.2))
    else:
        options = WHOLE
        folder = tuned_from(base, tmp_path / "tuned", lambda n, t: t * 1.5 if n == "norm.weight" else None)
        rewritten(folder, of_dtype(torch.bfloat16))
    report = extract(folder, base, tmp_path / "out", options)
    assert [tensor.name for tensor in report.saved] == ["norm.weight"]
    merge(base, [tmp_path / "out"], tmp_path / "merged")
    merged, wanted, before = (tensors_of(path) for path in (tmp_path / "merged", folder, base))
    for name in wanted:
        assert torch.equal(merged[name], wanted[name].float() if name == "norm.weight" else before[name]), name


def more_words(tensor, count=5):
    """Add rows for more tokens, and change the existing ones."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, *tensor.shape[1:], generator=generator)
    return torch.cat([tensor.float() * 1.1, rows * tensor.float().std()])


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_saved_whole_and_reported(tmp_path, tied):
    base = tiny.write_llama(tmp_path / "base", dtype="float32", tied=tied)
    folder = tuned_from(base, tmp_path / "tuned", lambda n, t: more_words(t) if "embed" in n or "head" in n else None)
    words = Checkpoint(folder).spec("model.embed_tokens.weight").shape[0]
    edit_json(folder / "config.json", vocab_size=words)
    tuned_from(folder, tmp_path / "more", noise(only="_proj"))
    report = extract(tmp_path / "more", base, tmp_path / "out", WHOLE)
    assert report.resized
    assert [(t.name, t.shape[0] - t.base_shape[0], t.relative_norm) for t in report.saved] == [
        (name, 5, None)
        for name in (["model.embed_tokens.weight"] if tied else ["lm_head.weight", "model.embed_tokens.weight"])
    ]
    assert report.config_differs == ()
    ours, theirs = logits(base, tmp_path / "out", words), logits(tmp_path / "more")
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    merge(base, [tmp_path / "out"], tmp_path / "merged")
    assert (logits(tmp_path / "merged") - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_only_linear_leaves_the_rest_out_and_reports_its_energy(tmp_path, plain, tuned):
    seen, both = [], sum(at.spec.nbytes for folder in (plain, tuned) for at in Checkpoint(folder).tensors.values())
    options = ExtractOptions(rank=4096, only_linear=True)
    report = extract(tuned, plain, tmp_path / "out", options, progress=lambda *now: seen.append(now))
    assert (seen[0], seen[-1]) == ((0, both), (both, both))
    assert seen == sorted(seen)
    assert report.saved == ()
    assert {tensor.name for tensor in report.left_out} == {
        name for name in tensors_of(plain) if LINEAR not in name or "norm" in name
    }
    squares = {name: float(change.square().sum()) for name, change in changes(tuned, plain).items()}
    outside = sum(squares[tensor.name] for tensor in report.left_out)
    assert report.left_out_energy == pytest.approx(outside / sum(squares.values()))
    read = read_adapter(tmp_path / "out")
    assert read.replaced == {}
    assert set(read.modules) == {entry.module for entry in report.modules}
    assert len(read.modules) == 14
    assert read.config["modules_to_save"] is None


def test_target_patterns_apply_to_all_tensors_and_the_rest_is_reported(tmp_path, plain, tuned):
    patterns = ("*.q_proj", "model.norm")
    report = extract(tuned, plain, tmp_path / "out", ExtractOptions(rank=2, target=patterns))
    assert [entry.module for entry in report.modules] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert [tensor.name for tensor in report.saved] == ["model.norm.weight"]
    assert len(report.left_out) == report.tensors - 3
    assert {tensor.why for tensor in report.left_out} == {"not in --target"}
    with pytest.raises(UsageError, match=r"'\*\.z_proj' matches no module") as caught:
        extract(tuned, plain, tmp_path / "none", ExtractOptions(rank=2, target=("*.q_proj", "*.z_proj")))
    assert (
        caught.value.hint == "patterns match whole module paths, such as 'model.layers.0.mlp.down_proj'"
    )  # an example with a low-rank change
    with pytest.raises(UsageError, match="'q_proj' matches no module") as caught:
        extract(tuned, plain, tmp_path / "none", ExtractOptions(rank=2, target=("q_proj",)))
    assert caught.value.hint == "patterns match whole module paths; write '*.q_proj'"


def test_nothing_to_extract_is_an_error_that_leaves_no_files(tmp_path, plain, copy_of):
    signs = tuned_from(plain, tmp_path / "signs", lambda n, t: torch.where(t == 0, -t, t))
    norms = tuned_from(plain, tmp_path / "norms", noise(only="norm"))
    for tuned, options, error in (
        (copy_of(plain), {}, "hold the same weights"),
        (signs, {}, "hold the same weights"),
        (norms, {"only_linear": True}, r"everything that differs would be left out \(5 tensors\)"),
    ):
        with pytest.raises(UsageError, match=error):
            extract(tuned, plain, tmp_path / "out", ExtractOptions(rank=2, **options))
    assert not list(tmp_path.glob("out*"))


def test_mismatched_checkpoints_are_refused_naming_a_tensor(tmp_path, plain, tuned, copy_of):
    def refused(folder, base, message):
        with pytest.raises(BaseMismatchError, match=message):
            extract(folder, base, tmp_path / "out", ExtractOptions(rank=2))
        assert not list(tmp_path.glob("out*"))

    short = rewritten(copy_of(tuned, "short"), lambda t: t.pop(f"{UP}.weight"))
    refused(short, plain, rf"short: lacks {UP}\.weight, which .*base has")
    refused(tuned, rewritten(copy_of(plain, "poor"), lambda t: t.pop("lm_head.weight")), r"poor: lacks lm_head\.weight")
    cut = rewritten(copy_of(tuned, "cut"), lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:64].clone()}))
    refused(cut, plain, rf"shape differs from .*base in {UP}\.weight \(expected \[128, 64\], found \[64, 64\]\)")
    wide = rewritten(copy_of(tuned, "wide"), lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :8].clone()}))
    refused(wide, plain, "shape differs .*lm_head")
    whole = rewritten(copy_of(tuned, "whole"), lambda t: t.update({n: v.long() for n, v in t.items()}))
    refused(whole, plain, r"dtype differs from .*base in .* \(expected F32, found I64\), .* and 18 more")
    refused(tiny.write_llama(tmp_path / "deep", layers=3, dtype="float32", tied=False), plain, "base: lacks ")


def test_a_quantized_checkpoint_is_refused_with_the_reason(tmp_path, plain, tuned, copy_of):
    other = copy_of(tuned, "other")
    edit_json(other / "config.json", quantization_config={"quant_method": "hqq"})
    quantize(tuned, tmp_path / "nf4")
    for pair, ours in (((tmp_path / "nf4", plain), True), ((plain, tmp_path / "nf4"), True), ((other, plain), False)):
        named = "bitsandbytes" if ours else "hqq"
        with pytest.raises(CheckpointError, match=f"quantized with {named}; the difference would mostly be") as caught:
            extract(*pair, tmp_path / "out", ExtractOptions(rank=2))
        assert ("dequantize" in caught.value.hint) == ours


@pytest.mark.parametrize(
    ("where", "value", "name"), [("tuned", float("nan"), f"{UP}.weight"), ("base", float("inf"), "model.norm.weight")]
)
def test_a_tensor_with_nan_or_infinity_is_named(tmp_path, plain, tuned, copy_of, where, value, name):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    broken = rewritten(copy_of(tuned if where == "tuned" else plain, "broken"), spoil)
    pair = (broken, plain) if where == "tuned" else (tuned, broken)
    with pytest.raises(NonFiniteError, match=rf"broken: {name} holds NaN or infinity"):
        extract(*pair, tmp_path / "out", ExtractOptions(rank=2))
    assert not (tmp_path / "out").exists()


def test_a_changed_stack_of_experts_is_refused_unless_only_linear_leaves_it_out(tmp_path):
    base = tiny.write_family(tmp_path / "base", "qwen3_moe", dtype="float32", fused_experts=True)
    folder = tuned_from(base, tmp_path / "tuned", noise(only="layers.0"))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.experts\.down_proj \(expert\) differs"):
        extract(folder, base, tmp_path / "out", ExtractOptions(rank=2))
    report = extract(folder, base, tmp_path / "out", ExtractOptions(rank=2, only_linear=True))
    assert {t.name.rpartition(".")[2] for t in report.left_out if t.why == "expert"} == {"gate_up_proj", "down_proj"}


def test_shards_pieces_and_threads_do_not_change_the_result(tmp_path, plain, tuned, monkeypatch):
    pieces = tiny.write_llama(tmp_path / "pieces", dtype="float32", tied=False, shards=3)
    before = torch.get_num_threads()
    for name, base, threads in (("one", plain, 1), ("three", plain, 3), ("sharded", pieces, 2)):
        extract(tuned, base, tmp_path / name, ExtractOptions(rank=3, threads=threads))
    assert torch.get_num_threads() == before
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "sharded" / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()
    monkeypatch.setattr(_shards, "PIECE_BYTES", 1000)
    extract(tuned, plain, tmp_path / "small", ExtractOptions(rank=3))  # sums differ only in the last bits of float64
    assert tree(tmp_path / "small") == tree(tmp_path / "one")


def test_the_seed_changes_the_result_and_more_iterations_keep_more_energy(tmp_path, plain, tuned):
    usual = {"rank": 3, "only_linear": True}
    report = extract(tuned, plain, tmp_path / "usual", ExtractOptions(**usual))
    extract(tuned, plain, tmp_path / "seed", ExtractOptions(**usual, seed=1))
    assert tree(tmp_path / "seed")["adapter_model.safetensors"] != tree(tmp_path / "usual")["adapter_model.safetensors"]
    rough = extract(tuned, plain, tmp_path / "rough", ExtractOptions(**usual, oversampling=0, iterations=1))
    close = extract(tuned, plain, tmp_path / "close", ExtractOptions(**usual, iterations=12))
    assert rough.energy_kept < report.energy_kept < close.energy_kept
    assert close.energy_kept < report.energy_kept * 1.1


def test_the_manifest_names_both_checkpoints_and_every_tensor_that_is_changed(tmp_path, plain, tuned):
    extract(tuned, plain, tmp_path / "out", ExtractOptions(rank=2, target=("*.q_proj", "model.norm"), threads=2))
    manifest = require_manifest(tmp_path / "out")

    def root(folder):
        checkpoint = Checkpoint(folder)
        return tensors_root(
            TensorRecord(name, "", found.spec.dtype, found.spec.shape, fingerprint(checkpoint.read(name)))
            for name, found in checkpoint.tensors.items()
        )

    assert [(p.role, p.kind, p.tensors_root) for p in manifest.parents] == [
        ("base", "checkpoint", root(plain)),
        ("tuned", "checkpoint", root(tuned)),
    ]
    assert manifest.kind == "adapter"
    assert manifest.operation == {
        "name": "extract",
        "options": {
            "rank": 2, "target": ["*.q_proj", "model.norm"], "only_linear": False, "oversampling": 10, "iterations": 3,
            "seed": 0,
        },
    }  # fmt: skip
    base = tensors_of(plain)
    assert {target.module: target.base_xxh3_128 for target in manifest.targets} == {
        module: fingerprint(as_array(base[f"{module}.weight"]))
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.norm")
    }
    verify(tmp_path / "out")


def test_a_changed_tokenizer_is_copied_and_a_changed_configuration_only_reported(tmp_path, plain, tuned, copy_of):
    report = extract(tuned, plain, tmp_path / "same", ExtractOptions(rank=2))
    assert (report.tokenizer, report.config_differs) == ((), ())
    folder = copy_of(tuned, "changed")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(folder / "config.json", rms_norm_eps=1e-3, transformers_version="0")
    report = extract(folder, plain, tmp_path / "out", ExtractOptions(rank=2))
    assert report.config_differs == ("rms_norm_eps",)
    assert set(report.tokenizer) == {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    verify(tmp_path / "out")


def test_a_dry_run_reads_no_weight_and_writes_nothing(tmp_path, plain, tuned):
    hollow = rewritten(
        shutil.copytree(tuned, tmp_path / "hollow"), lambda t: [v.fill_(float("nan")) for v in t.values()]
    )
    report = extract(hollow, plain, tmp_path / "out", ExtractOptions(rank=2), dry_run=True)
    assert (report.tensors, report.candidates, report.modules, report.manifest_sha256) == (21, 14, (), None)
    assert [path.name for path in tmp_path.iterdir()] == ["hollow"]
    with pytest.raises(UsageError, match="its own input"):
        extract(tuned, plain, tuned / "out", ExtractOptions(rank=2))


def test_a_source_that_changes_during_extraction_is_refused(tmp_path, plain, tuned, copy_of):
    folder = copy_of(tuned, "moving")

    def touch(done, total):
        if done == total:
            (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")

    with pytest.raises(IntegrityError, match=r"config\.json changed while it was read"):
        extract(folder, plain, tmp_path / "out", ExtractOptions(rank=2), progress=touch)
    assert not (tmp_path / "out").exists()


def write_matrix(folder, rows, columns, seed):
    """Write a bfloat16 checkpoint of one linear layer, without an architecture."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(generator=generator)
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, folder / "model.safetensors")


def peak_of_extract(run_cli, tuned, base, out):
    done = run_cli("extract", tuned, base, "-o", out, "--rank", 8, "--threads", 1)
    assert done.code == 0, done.stderr
    return done.peak_bytes


def test_peak_memory_grows_by_less_than_the_size_of_the_matrix(run_cli, tmp_path):
    columns, peaks = 2048, []
    for rows in (2048, 8192):
        for number, name in enumerate(("base", "tuned")):
            write_matrix(tmp_path / f"{name}-{rows}", rows, columns, number)
        folders = [tmp_path / f"{name}-{rows}" for name in ("tuned", "base", "out")]
        peaks.append(peak_of_extract(run_cli, *folders))
    added = 6144 * columns * 2  # of one bfloat16 matrix; in float64 it would be four times this
    assert peaks[1] - peaks[0] < added


def test_a_tied_embedding_that_is_saved_under_two_names_is_in_memory_once(run_cli, tmp_path):
    peaks = []
    for entries in (1024, 2**19):
        folders = [tmp_path / f"{name}-{entries}" for name in ("tuned", "base", "out")]
        for folder, rows in zip(folders[:2], (entries + 64, entries), strict=True):
            tiny.write_llama(folder)
            edit_json(folder / "config.json", vocab_size=rows)
            with edited_tensors(folder / "model.safetensors") as tensors:
                tensors["model.embed_tokens.weight"] = torch.ones(rows, 64, dtype=torch.bfloat16)
        peaks.append(peak_of_extract(run_cli, *folders))
    named = [name for name in load_file(folders[2] / "adapter_model.safetensors") if "lora" not in name]
    assert len(named) == 2
    assert peaks[1] - peaks[0] < 1.7 * 2**19 * 64 * 2
