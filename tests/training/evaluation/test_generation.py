"""Generated answers do not depend on their batch, and end where a turn ends."""

import sys

import pytest
import tiny
import torch
from folders import edit_json
from transformers import AutoConfig, AutoModelForCausalLM

from adaptkit.data.encoding import conversation_ids
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.training.evaluation.generation import generate, stop_tokens
from adaptkit.training.memory.activations import PeakMemory
from adaptkit.training.network.model import load_model

SENTENCES = (
    "Tell me about whales.",
    "x",
    "How many kinds of bridges are there in the north, under water and by the sea, and in old books?",
    "Salt?",
    "There are nine kinds of clocks at night. Which of them are quiet?",
)


def prompts_of(tokenizer):
    return [conversation_ids([{"role": "user", "content": text}], tokenizer) for text in SENTENCES]


def by_hand(folder, ids, new_tokens, stops):
    """Decode greedily with transformers, without a cache; return the new tokens, and whether a stop token followed."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = list(ids)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(network(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            return tokens[len(ids) :], True
        tokens.append(token)
    return tokens[len(ids) :], False


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_answers_in_a_batch_equal_those_of_a_loop_without_cache_or_padding(family, gpt2, made):
    folder = gpt2 if family == "gpt2" else tiny.write_family(made / f"generating-{family}", family)
    tokenizer = load_tokenizer(folder)
    prompts = prompts_of(tokenizer)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    stops, rows, made_by = stop_tokens(model, tokenizer), [], model.network.generate
    model.network.generate = lambda ids, **options: (rows.append(len(ids)), made_by(ids, **options))[1]
    found = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    assert rows[-2:] == [3, 2]
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, ended = by_hand(folder, prompt, 12, stops)
        assert (answer.text, answer.ended) == (tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended)
    assert len({answer.text for answer in found}) > 1  # answers depend on the question


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_output_layer_is_not_copied_for_every_prompt(tmp_path):
    tokenizer = tiny.write_tokenizer(tmp_path)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=32768, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16, torch.device("cpu"))
    weight = model.network.get_output_embeddings().weight
    grown = []
    for _ in range(2):  # first, what stays
        peak = PeakMemory(torch.device("cpu"))
        generate(model, tokenizer, prompts_of(tokenizer)[:4], max_new_tokens=2, batch_size=4)
        grown.append(peak.growth())
    assert grown[-1] < weight.nbytes / 2


SHIFTED = {
    "minimax": {"head_dim": 16, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "whisper": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
                "max_target_positions": 512},
}  # fmt: skip
"""Architectures whose states include padding, that count it as positions, or that mix the rows of a batch."""


@pytest.mark.parametrize("name", SHIFTED)
def test_models_that_padding_or_other_rows_affect_give_the_answers_of_single_prompts(name, made, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, name, SHIFTED[name] | {"tie_word_embeddings": False})
    folder = tiny.write_architecture(made / f"shifted-{name}", name)
    tokenizer = load_tokenizer(folder)
    prompts = prompts_of(tokenizer)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    found = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, _ = by_hand(folder, prompt, 8, stop_tokens(model, tokenizer))
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("said", [{"output_attentions": True}, {"output_hidden_states": True}])
def test_output_options_in_config_json_do_not_change_answers(llama, copy_of, said):
    """transformers would apply them to generation, too, which then returns an object instead of a tensor."""
    folder, texts = copy_of(llama), []
    tokenizer = load_tokenizer(folder)
    for more in ({}, said):
        edit_json(folder / "config.json", **more)
        model = load_model(folder, torch.float32, torch.device("cpu"))
        texts.append(generate(model, tokenizer, prompts_of(tokenizer), max_new_tokens=6, batch_size=3))
    assert texts[0] == texts[1]


def test_the_limit_of_new_tokens_does_not_force_an_end_token(made, monkeypatch):
    """Configurations such as BART's name a token that transformers would force at the limit."""
    values = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
    monkeypatch.setitem(tiny.ARCHITECTURES, "marian", values | {"forced_eos_token_id": 2})
    folder = tiny.write_architecture(made / "forced", "marian")
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    prompts = prompts_of(tokenizer)[:1]
    (found,) = generate(model, tokenizer, prompts, max_new_tokens=4, batch_size=1)
    assert (stop_tokens(model, tokenizer), found.ended) == ([2], False)


def test_an_answer_ends_at_any_end_token_of_the_generation_config(llama, copy_of):
    """Here generation_config.json also names a token that the model is known to generate."""
    folder = copy_of(llama)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    prompts = prompts_of(tokenizer)[:2]
    (free, _) = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    assert not free.ended
    tokens, _ = by_hand(folder, prompts[0], 6, [])
    edit_json(folder / "generation_config.json", eos_token_id=[2, tokens[3]])
    stops = stop_tokens(model, tokenizer)
    assert stops == sorted({tokenizer.eos_token_id, 2, tokens[3]})
    (cut, _) = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    first = tokens.index(tokens[3])
    assert (cut.text, cut.ended) == (tokenizer.decode(tokens[:first], skip_special_tokens=True).strip(), True)


def test_the_templates_end_of_turn_token_is_a_stop_token_even_if_it_is_not_the_end_token(llama, copy_of):
    """As in Llama 3, whose turns end with <|eot_id|> and whose end token is <|end_of_text|>."""
    folder = copy_of(llama)
    tokenizer = load_tokenizer(folder)
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    changed = load_tokenizer(folder)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    assert stop_tokens(model, changed) == sorted({changed.eos_token_id, turn_end})
    changed.chat_template = tiny.CHAT_TEMPLATE.replace("+ '<|im_end|>' +", "+ ' over' +")  # ordinary words end a turn
    assert stop_tokens(model, changed) == [changed.eos_token_id]
    changed.chat_template = tiny.CHAT_TEMPLATE.replace("+ '<|im_end|>' +", "+ ' over<|im_end|>' +")
    assert stop_tokens(model, changed) == sorted({changed.eos_token_id, turn_end})
