"""A tokenizer that cannot be loaded is told with what would help."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adaptkit.errors import UsageError
from adaptkit.text.tokenizer_files import load_tokenizer


@pytest.mark.parametrize(("name", "kind"), [("tokenizer.model", "LlamaTokenizer"), ("spiece.model", "T5Tokenizer")])
def test_a_tokenizer_in_sentence_pieces_only_is_refused_with_the_packages_that_read_it(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"none")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint.startswith(f"pip install sentencepiece protobuf if {name} is SentencePiece's")


def test_a_folder_without_a_tokenizer_lacks_its_files(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path, kind):
    """transformers makes one that knows special tokens only, and loses every word or makes the same of each."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "</s>"}))
    with pytest.raises(UsageError, match="tokenizer has no vocabulary") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


def test_a_tokenizer_of_bytes_needs_no_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert len(load_tokenizer(tmp_path)("two words")["input_ids"]) == len("two words") + 1


@pytest.mark.parametrize("model", [WordLevel({"[UNK]": 0}, unk_token="[UNK]"), BPE()], ids=["words", "pairs"])
def test_letters_that_were_added_to_an_empty_vocabulary_are_one(tmp_path, model):
    """As amino acids and nucleotides mostly are: they are no special tokens."""
    made = Tokenizer(model)
    made.add_special_tokens(["[UNK]", "[PAD]"])
    made.add_tokens(list("ACGT"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).convert_ids_to_tokens(load_tokenizer(tmp_path)("GATC")["input_ids"]) == [*"GATC"]


def test_special_tokens_alone_are_no_vocabulary_though_they_were_saved_as_one(tmp_path):
    """As of a model that was loaded without the file and saved again, where only the first step loses it."""
    made = Tokenizer(BPE())
    made.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="tokenizer has no vocabulary"):
        load_tokenizer(tmp_path)


def test_tokens_that_the_configuration_adds_are_no_vocabulary(tmp_path):
    """Such as <think>, which is no special token either."""
    added = {"0": {"content": "</s>", "special": True}} | {
        str(number): {"content": f"<{name}>", "special": False} for number, name in enumerate(("think", "tool"), 1)
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="tokenizer has no vocabulary"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_beside_sentence_pieces_asks_for_no_packages(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


def test_a_tokenizer_that_does_not_tell_what_was_added_is_taken(tmp_path, monkeypatch):
    """As mistral-common's."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: range(300))
    assert load_tokenizer(tmp_path) == range(300)
