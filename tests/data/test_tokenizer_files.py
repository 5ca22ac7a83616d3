"""Errors about a tokenizer that cannot be loaded have a hint that helps."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import UsageError


@pytest.mark.parametrize(("name", "kind"), [("tokenizer.model", "LlamaTokenizer"), ("spiece.model", "T5Tokenizer")])
def test_the_hint_for_a_sentencepiece_tokenizer_names_packages_that_read_it(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"none")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint.startswith(f"pip install sentencepiece protobuf if {name} is SentencePiece's")


def test_the_hint_for_a_folder_without_a_tokenizer_names_missing_files(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path, kind):
    """transformers would make one with special tokens only, which drops every word or maps all to one token."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "</s>"}))
    with pytest.raises(UsageError, match="tokenizer has no vocabulary") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


def test_a_tokenizer_of_bytes_needs_no_vocabulary_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert len(load_tokenizer(tmp_path)("two words")["input_ids"]) == len("two words") + 1


@pytest.mark.parametrize("model", [WordLevel({"[UNK]": 0}, unk_token="[UNK]"), BPE()], ids=["words", "pairs"])
def test_letters_added_to_an_empty_vocabulary_count_as_a_vocabulary(tmp_path, model):
    """As in most tokenizers of amino acids and nucleotides; these letters are not special tokens."""
    made = Tokenizer(model)
    made.add_special_tokens(["[UNK]", "[PAD]"])
    made.add_tokens(list("ACGT"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).convert_ids_to_tokens(load_tokenizer(tmp_path)("GATC")["input_ids"]) == [*"GATC"]


def test_special_tokens_alone_are_not_a_vocabulary_even_if_saved(tmp_path):
    """As saved from a tokenizer that had been loaded without its vocabulary file."""
    made = Tokenizer(BPE())
    made.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="tokenizer has no vocabulary"):
        load_tokenizer(tmp_path)


def test_tokens_that_the_configuration_adds_are_not_a_vocabulary(tmp_path):
    """Such as <think>, although it is not a special token."""
    added = {"0": {"content": "</s>", "special": True}} | {
        str(number): {"content": f"<{name}>", "special": False} for number, name in enumerate(("think", "tool"), 1)
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="tokenizer has no vocabulary"):
        load_tokenizer(tmp_path)


def test_the_hint_for_a_damaged_tokenizer_json_names_no_packages(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "add the model's tokenizer.json and tokenizer_config.json"


def test_the_hint_for_a_path_that_is_not_utf8_is_to_move_the_folder(llama, tmp_path):
    try:
        folder = shutil.copytree(llama, os.fsdecode(os.fsencode(tmp_path) + b"/model-\xff"))
    except OSError:
        pytest.skip("the file system allows only UTF-8")
    with pytest.raises(UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(Path(folder))
    assert caught.value.hint == "move the folder to a path that is valid UTF-8"
