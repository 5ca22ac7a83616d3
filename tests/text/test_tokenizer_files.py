"""A tokenizer that cannot be loaded is told with what would help."""

import json

import pytest

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
