"""Moments measured layer by layer equal those that hooks measure on the whole model."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch
import transformers
from folders import edit_json, rewritten
from torch import nn

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, NonFiniteError, UsageError
from adaptkit.operations._calibrate import layerwise, replay
from adaptkit.operations._calibrate.layerwise import layer_moments

SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": [FULL, SLIDING, FULL]},
    "qwen3": {"tie_word_embeddings": True},
    "phi": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 12},
    "gemma3_text": {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 12},
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 64, "n_inner": 80},
    "gpt_neox": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 3},
    "phi3": {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma4_text": tiny.ARCHITECTURES["gemma4_text"] | {"vocab_size_per_layer_input": 90},
    "gemma3n_text": tiny.ARCHITECTURES["gemma3n_text"] | {"vocab_size_per_layer_input": 90},
}


@pytest.fixture(scope="module")
def family(made):
    """Write a tiny checkpoint of a family, once."""

    def write(name):
        folder = made / f"layerwise-{name}"
        if not folder.exists():
            sizes = {} if name == "gpt2" else dict(SIZES)
            config = transformers.AutoConfig.for_model(name, **sizes | {"vocab_size": 90} | FAMILIES[name])
            tiny._save(folder, lambda: transformers.AutoModelForCausalLM.from_config(config), "float32", 1, 0)
        return folder

    return write


def windows(count=5, length=24, seed=0):
    return torch.randint(1, 90, (count, length), generator=torch.Generator().manual_seed(seed))


def by_hooks(folder, tokens):
    """Map every linear to its inputs, (tokens, in) in float64, collected by hooks on transformers' whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head, seen = model.get_output_embeddings(), {}
    tied = head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and not (tied and module is head):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for window in tokens:
            model(window[None])
    stored = {"lm_head": "embed_out"} if model.config.model_type == "gpt_neox" else {}
    return {
        stored.get(name, name): torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
        for name, xs in seen.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_equal_those_from_hooks_on_the_whole_model(name, family, monkeypatch):
    monkeypatch.setattr(replay, "BATCH_TOKENS", 48)  # batches of 2, 2 and 1 windows
    monkeypatch.setattr(layerwise, "PRODUCT_COLUMNS", 24)  # not a divisor of all widths
    folder, tokens = family(name), windows()
    layers = list(layer_moments(Checkpoint(folder), tokens, second_moments=True))
    found = {path: moments for layer in layers for path, moments in layer.items()}
    expected = by_hooks(folder, tokens)
    assert set(found) == set(expected)
    for path, x in expected.items():
        product = x.T @ x / len(x)
        scale = float(product.diagonal().mean())
        near = partial(np.allclose, atol=2e-5 * scale, rtol=1e-4)
        assert near(found[path].second_moment, product), path
        assert near(found[path].mean_square, product.diagonal()), path


def test_layers_come_in_order_and_an_untied_head_comes_last(family):
    def prefixes(name):
        layers = layer_moments(Checkpoint(family(name)), windows(1))
        return [".".join(next(iter(layer)).split(".")[:3]) for layer in layers]

    inside = [f"model.layers.{index}" for index in range(3)]
    assert prefixes("llama") == [*inside, "lm_head"]
    assert prefixes("qwen3") == inside


def test_linears_with_the_same_input_share_moments_and_second_moments_are_optional(family):
    layer, again = (next(layer_moments(Checkpoint(family("llama")), windows())) for _ in "ab")
    attention = {name: layer[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo"}
    assert attention["q"] is attention["k"] is attention["v"]
    assert attention["o"] is not attention["q"]
    for name, moments in layer.items():
        assert moments.second_moment is None
        assert np.array_equal(moments.mean_square, again[name].mean_square)  # the same bits


def test_only_the_current_layer_has_its_weights_in_memory_while_batches_are_counted(family, monkeypatch):
    monkeypatch.setattr(replay, "BATCH_TOKENS", 24)
    networks, loaded, seen = [], [], []
    build = replay.empty_network
    monkeypatch.setattr(replay, "empty_network", lambda *given: networks.append(build(*given)) or networks[-1])

    def watch(done, total):
        (network,) = networks
        loaded.append({name for name, parameter in network.named_parameters() if not parameter.is_meta})
        seen.append((done, total))

    for _ in layer_moments(Checkpoint(family("llama")), windows(2), progress=watch):
        assert torch.is_grad_enabled()  # the caller's mode is unchanged
    assert seen == [(done, 6) for done in range(1, 7)]
    outside = {"model.embed_tokens.weight", "model.norm.weight"}
    assert [{name.split(".")[2] for name in names - outside} for names in loaded[::2]] == [{"0"}, {"1"}, {"2"}]
    assert all(outside <= names for names in loaded)


def test_unusable_tokens_and_models_are_refused(family, copy_of):
    checkpoint = Checkpoint(family("llama"))
    empty = copy_of(family("llama"), "empty")
    edit_json(empty / "config.json", num_hidden_layers=0)
    for folder, tokens, message in (
        (checkpoint, torch.tensor([[1, 90]]), "token id 90 is outside the model's vocabulary of 90"),
        (checkpoint, torch.tensor([1, 2]), r"expected \(windows, window\)"),
        (checkpoint, torch.zeros(0, 8, dtype=torch.int64), r"expected \(windows, window\)"),
        (Checkpoint(empty), windows(), "has no list of layers"),
    ):
        with pytest.raises(UsageError, match=message):
            next(layer_moments(folder, tokens))


def test_a_missing_weight_and_the_layer_with_an_infinite_input_are_named(family, copy_of):
    name = "model.layers.1.mlp.up_proj.weight"
    without = Checkpoint(rewritten(copy_of(family("llama"), "without"), lambda tensors: tensors.pop(name)))
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        list(layer_moments(without, windows()))
    infinite = rewritten(copy_of(family("llama"), "infinite"), lambda tensors: tensors[name].fill_(torch.inf))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj: its input is NaN or infinite"):
        list(layer_moments(Checkpoint(infinite), windows()))


@pytest.mark.parametrize(
    ("order", "tied"),  # an untied head is measured, too, after the layers
    [([2, 1, 0], True), ([0, 2], False), ([1, 2], True), ([0, 1, 2, 2], False)],
)
def test_a_model_that_skips_repeats_or_reorders_layers_is_refused(family, copy_of, monkeypatch, order, tied):
    from transformers.models.llama.modeling_llama import LlamaModel

    forward, folder = LlamaModel.forward, copy_of(family("llama"))

    def changed(self, *args, **kwargs):
        layers, count = self.layers, self.config.num_hidden_layers
        self.layers, self.config.num_hidden_layers = nn.ModuleList(layers[index] for index in order), len(order)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.layers, self.config.num_hidden_layers = layers, count

    monkeypatch.setattr(LlamaModel, "forward", changed)
    if tied:
        rewritten(folder, lambda tensors: tensors.pop("lm_head.weight"))
        edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="does not run its layers once each, in order"):
        list(layer_moments(Checkpoint(folder), windows(1)))


def test_moments_use_the_names_in_the_files(gpt2, copy_of):
    """The names in the Hub's GPT-2 lack the prefix ``transformer.``."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    expected = {name: m for layer in layer_moments(Checkpoint(gpt2), windows()) for name, m in layer.items()}
    stripped = Checkpoint(rewritten(copy_of(gpt2), strip))
    found = {name: m for layer in layer_moments(stripped, windows()) for name, m in layer.items()}
    assert {f"transformer.{name}" for name in found} == set(expected)
    for name, moments in found.items():
        assert f"{name}.weight" in stripped.tensors
        assert np.array_equal(moments.mean_square, expected[f"transformer.{name}"].mean_square)
