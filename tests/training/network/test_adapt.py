"""Adapters of every kind give the trained model again: in peft, after a merge, and when they are loaded."""

from dataclasses import dataclass, field
from functools import cache

import peft_adapters
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from adaptkit.checkpoint.adapter import read_adapter
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.data.batches import Batch, collate
from adaptkit.data.encoding import IGNORED, Sample
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.operations.dequantize import DequantizeOptions, dequantize
from adaptkit.operations.merge import merge
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.training.config import TrainConfig
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.adapt import parameter_places, train_whole
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.loss import summed_loss
from adaptkit.training.network.model import load_model
from adaptkit.training.network.start import add_trainable, resolve_method
from adaptkit.training.result import records_of, write_result

CPU = torch.device("cpu")
IDS = torch.arange(2, 298).view(8, 37)


@dataclass(frozen=True)
class Case:
    """An adapter's settings, and the base that it is for."""

    family: str = "tied"
    settings: dict = field(default_factory=dict)
    trained: str = ""
    """Part of the name of a parameter that is trained because of these settings."""


CASES = {
    "rslora": Case(settings={"rslora": True, "alpha": 7.0, "targets": ("q_proj", "*.mlp.*"),
                             "exclude": ("down_proj",)}),
    "patterns": Case(settings={"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 3},
                               "alpha_pattern": {"v_proj": 5}}),
    "dora": Case(settings={"dora": True, "rslora": True, "rank_pattern": {"up_proj": 2}}, trained="magnitude"),
    "dora of Conv1D": Case("gpt2", {"dora": True}, "magnitude"),
    "biases of B": Case("gpt2", {"lora_bias": True, "rslora": True, "targets": ("*.attn.c_proj", "c_fc")}, "lora_bias"),
    "all biases": Case("gpt2", {"bias": "all"}, "ln_1.bias"),
    "biases of adapted layers": Case("gpt2", {"bias": "lora_only", "targets": ("c_attn",)}, "c_attn.bias"),
    "a tied head": Case(settings={"modules_to_save": ("lm_head",)}, trained="embed_tokens"),
    "a head": Case("untied", {"modules_to_save": ("lm_head",)}, "lm_head"),
    "norms": Case(settings={"modules_to_save": ("norm",), "targets": ("q_proj",)}, trained="norm"),
    "a norm with a bias": Case("gpt2", {"modules_to_save": ("ln_f",)}, "ln_f.bias"),
    "tokens of a tied vocabulary": Case(settings={"trainable_tokens": ("<|im_end|>", "%", "40")}, trained="rows"),
    "tokens": Case("untied", {"trainable_tokens": ("<|im_end|>", "%", "40")}, "rows"),
    "experts": Case("moe", {"target_parameters": ("*.experts.*",), "targets": ("q_proj",)}, "changes"),
    "some experts": Case("moe", {"target_parameters": ("down_proj",), "targets": ()}, "changes.down_proj"),
    "all of it": Case(
        "untied",
        {"dora": True, "trainable_tokens": ("%",), "modules_to_save": ("norm", "lm_head"),
         "rank_pattern": {"q_proj": 1}},
        "magnitude",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder with each family plain in float32, quantized (``-nf4``), and dequantized to float32 (``-again``)."""
    root = tmp_path_factory.mktemp("bases")
    tiny.write_llama(root / "tied", dtype="float32")
    tiny.write_llama(root / "untied", dtype="float32", tied=False, shards=2)
    tiny.write_gpt2(root / "gpt2")
    tiny.write_family(root / "moe", "qwen3_moe", dtype="float32")
    for name in ("tied", "untied", "gpt2", "moe"):
        quantize(root / name, root / f"{name}-nf4", QuantizeOptions(moe="quantize" if name == "moe" else "keep"))
        dequantize(root / f"{name}-nf4", root / f"{name}-again", DequantizeOptions(dtype="float32"))
    return root


def begun(base, settings, noise=0.05):
    """Return a model as a run begins with it, but with noise in all trained parameters; and its configuration."""
    config = TrainConfig(base=str(base), data=("none",), **{"rank": 4, "compute_dtype": "float32"} | settings)
    config = resolve_method(config, Checkpoint(base))
    model = load_model(base, torch.float32, CPU)
    add_trainable(model, config, None, load_tokenizer(base))
    trainable = Trainable.of(model, config.lora_plus_ratio)
    generator = torch.Generator().manual_seed(7)
    trainable.values.add_(torch.randn(trainable.values.shape, generator=generator), alpha=noise)
    return model, config


def written(folder, model, config, base):
    manifest = read_manifest(base)
    with Output(folder, "plan") as out:
        out.publish(write_result(out, model, config, manifest, records_of(model.checkpoint, manifest), None, []))
    return folder


def logits(network):
    with torch.no_grad():
        return network(IDS).logits


def by_peft(base, adapter):
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    with peft_adapters.quiet():
        model = PeftModel.from_pretrained(peft_adapters.load_float32(base), adapter).eval()
        loaded = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    assert loaded.unexpected_keys == []
    missing = [key for key in loaded.missing_keys if ".default" in key]
    assert missing in ([], ["base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"])  # tied
    return logits(model)


@pytest.mark.parametrize("name", CASES)
def test_peft_gives_the_logits_of_the_trained_model(bases, name, tmp_path):
    case, base = CASES[name], bases / f"{CASES[name].family}-nf4"
    model, config = begun(base, case.settings)
    assert any(case.trained in n for n, p in model.network.named_parameters() if p.requires_grad)
    adapter = written(tmp_path / "adapter", model, config, base)
    expected = logits(model.network)
    found = by_peft(bases / f"{case.family}-again", adapter)
    assert float((found - expected).abs().max()) < 2e-5
    plain = logits(load_model(base, torch.float32, CPU).network)
    assert float((plain - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_loading_and_merging_give_the_logits_of_the_trained_model(bases, name, tmp_path):
    case, base = CASES[name], bases / CASES[name].family
    model, config = begun(base, case.settings)
    assert config.method == "lora"
    adapter = written(tmp_path / "adapter", model, config, base)
    expected = logits(model.network)
    again = load_model(base, torch.float32, CPU)
    load_adapter(again, read_adapter(adapter))
    assert torch.equal(logits(again.network), expected)
    assert {n for n, p in again.network.named_parameters() if p.requires_grad} == {
        n for n, p in model.network.named_parameters() if p.requires_grad
    }
    merge(base, [adapter], tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged", torch.float32, CPU).network)
    assert float((merged - expected).abs().max()) < 2e-5


def test_a_tied_head_is_saved_with_its_bias(tmp_path):
    """peft replaces whole modules, and only the head has the bias."""
    base = tiny.write_architecture(tmp_path / "base", "modernbert-decoder")
    model, config = begun(base, {"modules_to_save": ("tok_embeddings",), "targets": ("q_proj",)})
    adapter = written(tmp_path / "adapter", model, config, base)
    expected = logits(model.network)
    assert "decoder.bias" in read_adapter(adapter).replaced
    assert float((by_peft(base, adapter) - expected).abs().max()) < 2e-5
    merge(base, [adapter], tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged", torch.float32, CPU).network)
    assert float((merged - expected).abs().max()) < 2e-5


def formula(model, plain):
    """Write out the trained model's parameters as functions of leaves; also return pairs of leaf and parameter."""
    leaves = []

    def leaf(parameter):
        leaves.append((parameter.detach().clone().requires_grad_(), parameter))
        return leaves[-1][0]

    values = {}
    for name, layer in model.adapted().items():
        changed = layer.scaling * leaf(layer.lora_b) @ leaf(layer.lora_a)
        weight = plain.get_parameter(f"{name}.weight").detach()
        weight = (weight.T if model.stores_transposed else weight) + changed
        if layer.magnitude is not None:
            weight = (leaf(layer.magnitude) / weight.norm(dim=1).detach())[:, None] * weight
        values[f"{name}.weight"] = weight.T if model.stores_transposed else weight
        if layer.lora_bias is not None:
            values[f"{name}.bias"] = layer.bias + layer.scaling * leaf(layer.lora_bias)
    for name, module in model.stacks().items():
        change = module.change_of(name.rpartition(".")[2]) if hasattr(module, "changes") else None
        if change is not None:
            delta = torch.einsum("eor,eri->eoi", leaf(change.lora_b), leaf(change.lora_a))
            values[name] = plain.get_parameter(name).detach() + change.scaling * delta
    shared = {}  # one leaf for tied names
    for name, whole in model.whole.items():
        if id(whole.parameter) not in shared:
            shared[id(whole.parameter)] = values[name] = leaf(whole.parameter)
    for path, rows in model.rows.items():
        table = plain.get_parameter(f"{path}.weight").detach()
        values[f"{path}.weight"] = table.index_copy(0, rows.indices, leaf(rows.rows))
    return values, leaves


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, "none") for name in CASES] + [(n, "sqrt") for n, case in CASES.items() if case.family in ("untied", "moe")],
)
def test_gradients_are_those_of_the_formula_on_the_dequantized_model(bases, name, checkpointing):
    case = CASES[name]
    model, _ = begun(bases / f"{case.family}-nf4", case.settings)
    plain = peft_adapters.load_float32(bases / f"{case.family}-again").train()
    plain.get_input_embeddings().padding_idx = None  # otherwise torch gives that row no gradient, even as an end token
    values, leaves = formula(model, plain)
    ids = IDS[:2]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    torch.func.functional_call(plain, values, kwargs=inputs).loss.backward()
    checkpoint_layers(model.network, choose_checkpointing(model.network, checkpointing, measure=None))
    model.network.train()(**inputs).loss.backward()
    trained = [p for p in model.network.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(parameter) for _, parameter in leaves}
    for expected, parameter in leaves:
        assert float(expected.grad.norm()) > 0
        assert float((parameter.grad - expected.grad).norm()) <= 1e-5 * float(expected.grad.norm())


WAYS = {
    "rows": {"trainable_tokens": ("<|im_end|>",)},
    "the table": {"modules_to_save": ("embed_tokens",)},
    "everything": {"method": "full", "rank": 16},
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(3, 290), min_size=3, max_size=9), min_size=2, max_size=4))
@pytest.mark.parametrize("family", ["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_the_padding_tokens_row_learns_from_end_tokens_but_not_from_padding(ends_and_pads, family, way, texts):
    """The row's gradient and the loss are the sums over the samples, computed one by one in transformers."""
    model, plain = ends_and_pads(family, way)
    end = model.network.config.pad_token_id
    samples = [Sample((*text, end, *text[::-1], end), (*text, end, *text[::-1], end)) for text in texts]
    batch = collate([[sample] for sample in samples], end)
    model.network.zero_grad()
    loss = summed_loss(model, batch)
    loss.backward()
    found = padding_gradient(model)
    plain.zero_grad()
    expected = 0.0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        part = cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        part.backward()
        expected += float(part.detach())
    wanted = plain.get_input_embeddings().weight.grad[end]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.fixture(scope="module")
def ends_and_pads(bases):
    """Make a model of a family, and transformers' own without special treatment of the padding token's row."""

    @cache
    def make(family, way):
        model, _ = begun(bases / family, WAYS[way], noise=0.0)
        plain = peft_adapters.load_float32(bases / family)
        assert plain.get_input_embeddings().padding_idx == plain.config.pad_token_id == plain.config.eos_token_id
        plain.get_input_embeddings().padding_idx = None
        return model, plain

    return make


def padding_gradient(model):
    for rows in model.rows.values():
        return rows.rows.grad[0]
    return model.whole["model.embed_tokens.weight"].parameter.grad[model.network.config.pad_token_id]


@pytest.mark.parametrize(("architecture", "options"), [("roberta", {"is_decoder": True}), ("opt", {"ffn_dim": 128})])
def test_position_tables_keep_their_padding_index(architecture, options, tmp_path, monkeypatch):
    """Some architectures count positions from the padding index on."""
    monkeypatch.setitem(tiny.ARCHITECTURES, architecture, options)
    base = tiny.write_architecture(tmp_path / "base", architecture)
    plain = load_model(base, torch.float32, CPU)
    model, _ = begun(base, {"method": "full", "rank": 16}, noise=0.0)
    tables = [
        (before, after)
        for before, after in zip(plain.network.modules(), model.network.modules(), strict=True)
        if isinstance(before, torch.nn.Embedding)
    ]
    for before, after in tables:
        is_of_tokens = after is model.network.get_input_embeddings()
        assert after.padding_idx == (None if is_of_tokens else before.padding_idx)
    assert len(tables) > 1
    ids = IDS[:2].clone()
    mask = torch.ones_like(ids)
    ids[0, 20:], mask[0, 20:] = model.network.config.pad_token_id, 0
    assert torch.equal(*(each.network(ids, attention_mask=mask).logits for each in (plain, model)))


@pytest.mark.parametrize("name", ["rslora", "dora", "tokens of a tied vocabulary", "experts"])
def test_no_dequantized_weight_outlives_a_forward_or_backward_pass(bases, name, monkeypatch):
    """Covers layers with an adapter, layers without one, and experts."""
    model, _ = begun(bases / f"{CASES[name].family}-nf4", CASES[name].settings)
    unpacked, dequantize_really = [], PackedWeight.dequantize

    def watched(weight, dtype, *empty):
        result = dequantize_really(weight, dtype, *empty)
        unpacked.append(StorageWeakRef(result.untyped_storage()))
        return result

    monkeypatch.setattr(PackedWeight, "dequantize", watched)
    loss = model.network.train()(IDS, labels=IDS, use_cache=False).loss
    assert len(unpacked) >= len(model.linears)
    assert all(storage.expired() for storage in unpacked)
    loss.backward()
    assert all(storage.expired() for storage in unpacked)


def test_in_bfloat16_a_fresh_adapter_changes_no_logit(bases):
    """DoRA's magnitudes are initialized to the same norms that it divides by."""
    base = bases / "tied-nf4"
    settings = {"dora": True, "modules_to_save": ("norm",), "trainable_tokens": ("%",), "compute_dtype": "bfloat16"}
    config = TrainConfig(base=str(base), data=("none",), rank=4, **settings)
    model, plain = (load_model(base, torch.bfloat16, CPU) for _ in range(2))
    add_trainable(model, config, None, load_tokenizer(base))
    Trainable.of(model)
    assert all(p.dtype == torch.float32 for p in model.network.parameters() if p.requires_grad)
    assert torch.equal(logits(model.network), logits(plain.network))


@pytest.mark.parametrize("name", ["a tied head", "a head", "tokens of a tied vocabulary", "all biases", "all of it"])
def test_the_trainers_loss_has_the_gradients_of_a_loss_from_all_logits(bases, name):
    """It never computes all logits at once, but trained parts of the output layer still get their gradient."""
    case = CASES[name]
    ids = IDS[:3]
    labels = ids.clone()
    labels[:, :9] = labels[1, 20:] = IGNORED
    gradients = []
    for loss in (
        lambda model: summed_loss(model, Batch(ids, labels, torch.ones_like(ids))),
        lambda model: cross_entropy(
            model.network(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        ),
    ):
        model, _ = begun(bases / f"{case.family}-nf4", case.settings)
        loss(model).backward()
        gradients.append({n: p.grad for n, p in model.network.named_parameters() if p.requires_grad})
    for parameter, expected in gradients[1].items():
        error = float((gradients[0][parameter] - expected).norm())
        assert error <= 1e-5 * float(expected.norm()), parameter


@pytest.mark.parametrize("name", ["dora of Conv1D", "all of it", "all biases"])
def test_checkpointing_with_dropout_changes_no_bit_of_a_gradient(bases, name):
    case, gradients = CASES[name], []
    for checkpointing in ("none", "layer", "sqrt"):
        model, _ = begun(bases / f"{case.family}-nf4", case.settings | {"dropout": 0.3})
        checkpoint_layers(model.network, choose_checkpointing(model.network, checkpointing, measure=None))
        torch.manual_seed(11)
        model.network.train()(IDS[:2], labels=IDS[:2], use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.network.named_parameters() if p.requires_grad})
    for others in gradients[1:]:
        assert all(torch.equal(others[n], gradient) for n, gradient in gradients[0].items())


def test_a_linear_weight_shared_by_layers_is_trained_as_one_parameter(tmp_path, monkeypatch):
    """Zamba's hybrid layers share one attention, and the files hold it once."""
    values = {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 2,
        "num_key_value_heads": 4, "attention_head_dim": 32, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    monkeypatch.setitem(tiny.ARCHITECTURES, "zamba", values)
    base, ids = tiny.write_architecture(tmp_path / "base", "zamba"), torch.arange(3, 27)[None]
    model = load_model(base, torch.float32, torch.device("cpu"))
    train_whole(model, set(parameter_places(model)))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for network in (model.network, plain):
        network(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    expected = dict(plain.named_parameters(remove_duplicate=False))
    names = [name for name in expected if "shared_transf" in name and name.endswith("proj.weight")]
    assert len(names) == 14
    for name in names:
        torch.testing.assert_close(model.whole[name].parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
