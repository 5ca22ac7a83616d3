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
