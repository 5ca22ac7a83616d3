"""Tied embeddings and heads under various names: a merge computes what peft does, or is refused.

Each architecture is built tiny by transformers, adapted by peft, merged, loaded by transformers, and unmerged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft_adapters import quiet
from safetensors.torch import load_file, save_file

from adaptkit.checkpoint import vocabulary
from adaptkit.errors import AdaptkitError, BaseMismatchError
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.unmerge import unmerge

TEXT, MASKED, SPEECH = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSpeechSeq2Seq"
COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
DECODER = COMMON | {
    "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
OLD = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "d_model": 32, "d_inner": 48}
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 61, "num_mel_bins": 16,
    "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], str, str, str]] = {
    "whisper": (SPEECH, "whisper", WHISPER, "q_proj", "proj_out", "model.decoder.embed_tokens"),
    "bert": (MASKED, "bert", DECODER, "query", "cls.predictions.decoder", "word_embeddings"),
    "roberta": (MASKED, "roberta", DECODER, "query", "lm_head.decoder", "word_embeddings"),
    "distilbert": (
        MASKED,
        "distilbert",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "q_lin",
        "vocab_projector",
        "word_embeddings",
    ),
    "modernbert-decoder": (TEXT, "modernbert-decoder", DECODER, "q_proj", "decoder", "tok_embeddings"),
    "biogpt": (TEXT, "biogpt", DECODER, "q_proj", "output_projection", "embed_tokens"),
    "mamba": (
        TEXT, "mamba", COMMON | {"state_size": 8, "tie_word_embeddings": True}, "in_proj", "lm_head", "embeddings"
    ),
    "openai-gpt": (TEXT, "openai-gpt", OLD, "c_attn", "lm_head", "tokens_embed"),
    "ctrl": (TEXT, "ctrl", OLD | {"dff": 48}, "Wq", "lm_head", "w"),
    "xlnet": (TEXT, "xlnet", OLD, "ff.layer_1", "lm_loss", "word_embedding"),
}  # fmt: skip
"""The auto class, the model type, its configuration, and the names of a linear layer, the head and the embedding."""


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> tuple[str, Path]:
    import transformers

    auto, kind, values, *_ = MODELS[request.param]
    folder = tmp_path_factory.mktemp("tied") / request.param
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **values)
        getattr(transformers, auto).from_config(config).save_pretrained(folder)
    return request.param, folder


def load(name: str, folder: Path) -> Any:
    import transformers

    with quiet():
        return getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=torch.float32).eval()


def adapted(name: str, base: Path, folder: Path, **lora: Any) -> Path:
    """Write an adapter with peft after changing every trainable tensor."""
    from peft import LoraConfig, get_peft_model

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(load(name, base), LoraConfig(r=2, lora_alpha=4, **lora))
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * 0.1
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(name: str, model: Any) -> torch.Tensor:
    words = torch.arange(3, 15)[None]
    if name == "whisper":
        return model(input_features=torch.ones(1, 16, 40), decoder_input_ids=words).logits
    return model(input_ids=words).logits


def running(name: str, base: Path, adapter: Path) -> torch.Tensor:
    """The logits of peft's model with an adapter that is not merged."""
    from peft import PeftModel

    with quiet():
        return logits(name, PeftModel.from_pretrained(load(name, base), adapter).base_model.model.eval())


def assert_merges(name: str, base: Path, adapter: Path, out: Path, untie: bool) -> None:
    """Check that the merged model computes what the unmerged adapter does, and that unmerge restores every byte."""
    wanted, before = running(name, base, adapter), logits(name, load(name, base))
    merge(base, [adapter], out, MergeOptions(untie=untie))
    found = logits(name, load(name, out))
    assert (wanted - before).norm() > 0.01 * wanted.norm(), "the adapter changes nothing"
    assert (found - wanted).norm() < 5e-6 * wanted.norm()
    unmerge(out, [adapter], out.with_name(out.name + "-back"))
    for path in base.iterdir():
        assert (out.with_name(out.name + "-back") / path.name).read_bytes() == path.read_bytes(), path.name


def test_changing_tied_embedding_and_head_differently_needs_untie(model, tmp_path):
    """The head or the embedding changes, or both as whole tensors: one of these for each model."""
    name, base = model
    *_, linear, head, embedding = MODELS[name]
    changes = (
        {"target_modules": [linear, head]},
        {"target_modules": [linear, embedding]},
        {"target_modules": [linear], "modules_to_save": [head, embedding]},
    )
    lora = changes[list(MODELS).index(name) % 3]
    adapter = adapted(name, base, tmp_path / "adapter", **lora)
    with pytest.raises(BaseMismatchError, match="ties its head to its embedding") as caught:
        merge(base, [adapter], tmp_path / "out")
    assert "--untie" in caught.value.hint
    assert_merges(name, base, adapter, tmp_path / "out", untie=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_trained_tokens_change_both_embedding_and_tied_head(model, tmp_path):
    name, base = model
    *_, linear, _, embedding = MODELS[name]
    adapter = adapted(
        name, base, tmp_path / "adapter", target_modules=[linear], trainable_token_indices={embedding: [3, 7]}
    )
    assert_merges(name, base, adapter, tmp_path / "out", untie=False)


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("model", ["whisper", "biogpt"], indirect=True)
def test_a_change_that_peft_ties_is_applied_once(model, kind, tmp_path):
    """The file holds the change twice: for the embedding and for the head."""
    name, base = model
    *_, linear, _, embedding = MODELS[name]
    lora = {"target_modules": [linear]}
    lora[kind] = [*lora.get(kind, []), embedding]
    adapter = adapted(name, base, tmp_path / "adapter", ensure_weight_tying=True, **lora)
    assert_merges(name, base, adapter, tmp_path / "out", untie=False)


@pytest.mark.parametrize("model", ["mamba"], indirect=True)
def test_a_head_saved_with_its_embedding_is_merged(model, tmp_path):
    name, base = model
    *_, linear, head, _ = MODELS[name]
    adapter = adapted(
        name, base, tmp_path / "a", target_modules=[linear], modules_to_save=[head], ensure_weight_tying=True
    )
    assert_merges(name, base, adapter, tmp_path / "out", untie=False)


@pytest.mark.parametrize("model", ["mamba"], indirect=True)
def test_an_embedding_of_unknown_name_is_found_by_its_number_of_rows(model, tmp_path):
    """Untying is refused, since the head's name in the files is unknown."""
    name, base = model
    adapter = adapted(name, base, tmp_path / "adapter", target_modules=["in_proj", "embeddings"])
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"model_type": "of_my_own"}
    (other / "config.json").write_text(json.dumps(config))
    for source, folder in ((base / "model.safetensors", other), (adapter / "adapter_model.safetensors", adapter)):
        tensors = {key.replace(".embeddings.", ".table."): tensor for key, tensor in load_file(source).items()}
        save_file(tensors, folder / source.name, {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="ties its head to its embedding"):
        merge(other, [adapter], tmp_path / "out")
    with pytest.raises(AdaptkitError, match="is not known") as caught:
        merge(other, [adapter], tmp_path / "out", MergeOptions(untie=True))
    assert "of_my_own" in caught.value.message
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(BaseMismatchError, match="which table that is cannot be determined"):
        merge(other, [adapter], tmp_path / "out", MergeOptions(untie=True))


def tuned_from(name: str, base: Path, folder: Path) -> Path:
    """A copy in which the embedding, a linear layer and all biases differ."""
    *_, linear, _, embedding = MODELS[name]
    model = load(name, base)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if embedding in key or key.endswith((f"{linear}.weight", ".bias")):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    with quiet():
        model.save_pretrained(folder)
    return folder


def test_an_extracted_adapter_reproduces_the_tuned_model_in_peft_and_merged(model, tmp_path):
    """It contains embedding and head, with the head's bias."""
    name, base = model
    tuned = tuned_from(name, base, tmp_path / "tuned")
    extract(tuned, base, tmp_path / "adapter", ExtractOptions(rank=32))
    wanted, before = logits(name, load(name, tuned)), logits(name, load(name, base))
    assert (wanted - before).norm() > 0.1 * wanted.norm()
    assert (running(name, base, tmp_path / "adapter") - wanted).norm() < 5e-6 * wanted.norm()
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert (logits(name, load(name, tmp_path / "out")) - wanted).norm() < 5e-6 * wanted.norm()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == ("CAUSAL_LM" if MODELS[name][0] == TEXT else None)


@pytest.mark.parametrize("model", ["biogpt"], indirect=True)
def test_the_head_of_an_unlisted_model_type_is_looked_up_in_transformers(model, tmp_path, monkeypatch):
    name, base = model
    monkeypatch.setattr(vocabulary, "_HEAD_OF", {})
    adapter = adapted(name, base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    assert_merges(name, base, adapter, tmp_path / "out", untie=True)
    for part in ("transformers", "transformers.models.auto.configuration_auto"):  # as if transformers was not installed
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(BaseMismatchError, match=r"name of the tied head in models of type 'biogpt' is not known"):
        merge(base, [adapter], tmp_path / "other", MergeOptions(untie=True))


@pytest.mark.parametrize("model", ["whisper"], indirect=True)
def test_a_head_of_unknown_name_is_not_taken_for_the_embedding(model, tmp_path, monkeypatch):
    """transformers reports both as one tensor, but an adapter of one use must not change the other."""
    name, base = model
    monkeypatch.setattr(vocabulary, "_HEAD_OF", {})
    adapter = adapted(name, base, tmp_path / "adapter", target_modules=["q_proj", "proj_out"])
    for untie in (False, True):
        with pytest.raises(AdaptkitError, match=r"changes proj_out\.weight"):
            merge(base, [adapter], tmp_path / "out", MergeOptions(untie=untie))
    assert not (tmp_path / "out").exists()


ZAMBA = DECODER | {
    "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_head_dim": 16,
    "attention_hidden_size": 64, "mamba_d_state": 8, "n_mamba_heads": 2, "use_mamba_kernels": False,
    "num_key_value_heads": 4,
}  # fmt: skip


def test_a_head_is_not_untied_where_that_would_also_untie_layers(tmp_path, monkeypatch):
    """Files hold Zamba's shared layers once; if the head is untied, transformers initializes the copies randomly."""
    import transformers

    monkeypatch.setitem(MODELS, "zamba", (TEXT, "zamba", ZAMBA, "in_proj", "lm_head", "embed_tokens"))
    base = tmp_path / "base"
    with quiet():
        transformers.AutoModelForCausalLM.from_config(transformers.ZambaConfig(**ZAMBA)).save_pretrained(base)
        _, told = transformers.AutoModelForCausalLM.from_pretrained(
            base, tie_word_embeddings=False, output_loading_info=True
        )
    assert any("shared_transf" in name for name in told["missing_keys"])
    adapter = adapted("zamba", base, tmp_path / "adapter", target_modules=["in_proj", "embed_tokens"])
    with pytest.raises(BaseMismatchError, match="a zamba model shares more than embedding and head"):
        merge(base, [adapter], tmp_path / "out", MergeOptions(untie=True))
    assert not (tmp_path / "out").exists()
    alone = adapted("zamba", base, tmp_path / "alone", target_modules=["in_proj"])
    assert_merges("zamba", base, alone, tmp_path / "out", untie=False)


DEEPSEEK = DECODER | {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1,
    "head_dim": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "index_n_heads": 4, "index_head_dim": 16,
    "index_topk": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_untied_head_is_found_under_its_name_in_the_files(tmp_path, monkeypatch, end):
    """DeepSeek-V4's files have no ``lm_head``, so the embedding used to be taken for the head, too."""
    import transformers

    tiny.need_architecture("deepseek_v4")
    monkeypatch.setitem(MODELS, "deepseek_v4", (TEXT, "deepseek_v4", DEEPSEEK, "q_b_proj", "lm_head", "embed_tokens"))
    base = tmp_path / "base"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model("deepseek_v4", **DEEPSEEK)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    assert "head.weight" in load_file(base / "model.safetensors")
    adapter = adapted("deepseek_v4", base, tmp_path / "adapter", target_modules=["q_b_proj", end])
    assert_merges("deepseek_v4", base, adapter, tmp_path / "out", untie=False)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
