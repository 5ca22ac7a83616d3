"""Windows hold the tokenizer's tokens in order, and text that cannot be read is an error."""

import json
import os
import re
from pathlib import Path

import pytest
import tiny
import torch
from folders import edit_json
from hypothesis import example, given
from hypothesis import strategies as st

from adaptkit.data.limits import context_length
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.data.windows import read_tokens
from adaptkit.errors import DataError, UsageError

PROSE = "the rivers in the north are quiet and the metals at night are not. " * 20


@pytest.fixture(scope="module")
def beginning(made):
    """A checkpoint whose tokenizer begins every text with <|im_start|>."""
    from tokenizers.processors import TemplateProcessing

    folder = tiny.write_llama(made / "beginning")
    tokenizer = load_tokenizer(folder)
    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer.save_pretrained(folder)
    return folder


def write(tmp_path, name, *lines):
    path = tmp_path / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_text_file_is_cut_in_order_and_the_remainder_is_dropped(llama, tokenizer, tmp_path):
    path = write(tmp_path, "prose.txt", PROSE)
    ids = tokenizer(PROSE + "\n")["input_ids"]
    windows = read_tokens([path], llama, window=48)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(ids) // 48, 48)
    assert windows.reshape(-1).tolist() == ids[: windows.numel()]
    assert len(ids) % 48


def test_a_text_shorter_than_a_window_is_one_short_window(llama, tokenizer, tmp_path):
    path = tmp_path / "short.md"
    path.write_text("the quiet rivers")
    assert read_tokens([path], llama, window=48).tolist() == [tokenizer("the quiet rivers")["input_ids"]]


def test_text_can_be_read_from_a_pipe(llama, tmp_path):
    """As in ``evaluate --text <(zcat brown.gz)``; unlike data, text is read once and not hashed."""
    path = write(tmp_path, "prose.txt", PROSE)
    pipe, end = os.pipe()
    os.write(end, path.read_bytes())
    os.close(end)
    found = read_tokens([Path(f"/dev/fd/{pipe}")], llama, window=48, max_tokens=96)
    os.close(pipe)
    assert torch.equal(found, read_tokens([path], llama, window=48, max_tokens=96))


def test_texts_and_conversations_are_joined_with_one_end_token_each(llama, tokenizer, tmp_path):
    messages = [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "the Rhine"}]
    rows = [
        {"text": "one text"},
        {"instruction": "Name it", "context": "", "output": "the Rhine"},
        {"text": ""},
        {"prompt": "Name it", "completion": "the Rhine"},
        {"messages": messages},
        {"text": "another"},
    ]
    found = read_tokens([write(tmp_path, "rows.jsonl", *rows)], llama, window=500)
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(found[0]) == f"one text<|im_end|>{chat * 3}another"


def test_without_a_template_a_conversation_is_text_with_an_end_token(llama, copy_of, tmp_path):
    folder = copy_of(llama)
    (folder / "chat_template.jinja").unlink()
    row = {"prompt": "Name it", "completion": "the Rhine"}
    found = read_tokens([write(tmp_path, "rows.jsonl", row, row)], folder, window=99)
    assert load_tokenizer(folder).decode(found[0]) == "Name it\nthe Rhine<|im_end|>" * 2


def test_every_window_begins_with_the_token_that_the_tokenizer_prepends(beginning, tmp_path):
    tokenizer = load_tokenizer(beginning)
    begin, *content = tokenizer(PROSE + "\n")["input_ids"]
    assert begin == tokenizer.bos_token_id
    windows = read_tokens([write(tmp_path, "prose.txt", PROSE)], beginning, window=32)
    assert windows[:, 0].tolist() == [begin] * len(windows)
    assert windows[:, 1:].reshape(-1).tolist() == content[: len(windows) * 31]


def test_an_end_token_that_the_tokenizer_appends_is_neither_repeated_nor_prepended(copy_of, llama, tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = copy_of(llama)
    tokenizer = load_tokenizer(folder)
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    tokenizer.save_pretrained(folder)
    rows = [{"text": "whales under water"}, {"text": "kites"}, {"text": "clocks in old books"}]
    expected = [token for row in rows for token in tokenizer(row["text"])["input_ids"]]
    assert expected.count(number) == 3
    windows = read_tokens([write(tmp_path, "rows.jsonl", *rows)], folder, window=4)
    assert windows.reshape(-1).tolist() == expected[: windows.numel()]


def test_a_tokenizer_without_latin_letters_reads_text(copy_of, llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = copy_of(llama)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["как дела"] * 3, trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    assert tokenizer("a")["input_ids"] == []
    tokenizer.save_pretrained(folder)
    windows = read_tokens([write(tmp_path, "prose.txt", "как дела " * 20)], folder, window=8)
    assert windows.flatten().tolist() == tokenizer("как дела " * 20)["input_ids"][: windows.numel()]


@given(texts=st.lists(st.text(), min_size=1, max_size=5), window=st.integers(2, 60), limit=st.integers(2, 200))
def test_no_token_is_lost_or_moved_and_the_limit_is_respected(llama, tmp_path_factory, tokenizer, texts, window, limit):
    path = write(tmp_path_factory.mktemp("texts"), "rows.jsonl", *({"text": text} for text in texts))
    expected = []
    for text in texts:
        if text.strip():
            expected += [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    expected = expected[1:]
    if len(expected) < 2:
        with pytest.raises(DataError, match="a single token" if expected else "no text to read"):
            read_tokens([path], llama, window=window)
        return
    whole = read_tokens([path], llama, window=window).reshape(-1).tolist()
    assert whole == expected[: len(whole)]
    assert len(expected) - len(whole) < window
    some = read_tokens([path], llama, window=window, max_tokens=limit).reshape(-1).tolist()
    assert some == expected[: len(some)]
    assert len(some) <= limit
    assert len(some) > limit - window or len(some) > len(expected) - window


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"title": "no text"}, "line 2: unknown layout"),
        ("{not json", "line 2: not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, message, llama, tmp_path):
    path = write(tmp_path, "rows.jsonl", {"text": "good"}, line)
    with pytest.raises(DataError, match=re.escape(f"{path}, {message}")):
        read_tokens([path], llama, window=8)


def test_a_refusal_by_the_chat_template_is_reported_with_file_and_line(llama, copy_of, tmp_path):
    folder = copy_of(llama)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system prompt here') }}")
    path = write(tmp_path, "rows.jsonl", {"text": "good"}, {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the chat template refuses .*no system prompt here"):
        read_tokens([path], folder, window=8)


def test_files_that_are_empty_unreadable_or_not_utf_8_are_refused(llama, tmp_path):
    for name, content in (
        ("empty.txt", b""),
        ("blank.txt", b" \n"),
        ("empty.jsonl", b"\n"),
        ("blank.jsonl", b"{}"[:0]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: no text to read"):
            read_tokens([tmp_path / name], llama, window=8)
    (tmp_path / "latin.txt").write_bytes("fine\nna\u00efve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 2: not UTF-8"):
        read_tokens([tmp_path / "latin.txt"], llama, window=8)
    for absent in (tmp_path / "absent.txt", tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_tokens([absent], llama, window=8)


def test_a_window_longer_than_the_model_allows_is_refused(llama, gpt2, tmp_path):
    path = write(tmp_path, "prose.txt", PROSE)
    for folder, longest in ((llama, 512), (gpt2, 128)):
        assert context_length(folder) == longest
        assert read_tokens([path], folder, window=longest).shape[0] > 0
        with pytest.raises(UsageError, match=f"windows of {longest + 1} tokens are longer") as caught:
            read_tokens([path], folder, window=longest + 1)
        assert str(longest) in caught.value.hint


@pytest.mark.parametrize(
    ("sizes", "wrong"), [({"window": 1}, "window"), ({"window": 8, "max_tokens": 1}, "max_tokens")]
)
def test_windows_and_limits_of_fewer_than_two_tokens_are_refused(sizes, wrong, llama, tmp_path):
    with pytest.raises(UsageError, match=f"(?m)^{wrong}: must be at least 2, found 1$"):
        read_tokens([write(tmp_path, "prose.txt", PROSE)], llama, **sizes)


def test_texts_longer_than_model_max_length_cause_no_warning(llama, copy_of, run_cli, tmp_path):
    folder = copy_of(llama)
    edit_json(folder / "tokenizer_config.json", model_max_length=16)
    path = write(tmp_path, "prose.txt", PROSE)
    instructions = tiny.write_instructions(tmp_path / "rows.jsonl", rows=2)
    done = run_cli("evaluate", "--base", folder, "--text", path, "--data", instructions, "--window", 64, "--json")
    assert (done.code, done.stderr) == (0, "")


def test_no_more_of_a_text_is_read_than_needed(llama, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(PROSE.encode() * 400 + b"\xff")
    found = read_tokens([path], llama, window=16, max_tokens=64)
    with pytest.raises(DataError, match=r"long\.txt, line 1: not UTF-8"):
        read_tokens([path], llama, window=16)
    path.write_bytes(PROSE.encode())
    assert found.tolist() == read_tokens([path], llama, window=16)[:4].tolist()


def trained(model, trainer, normalizer=None, pre_tokenizer=None):
    """Train a small tokenizer of a common kind."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator([PROSE, "über die Flüsse, die Berge\n\n  und die   Seen …", "川は静かだ。"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def kinds_of_tokenizers():
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

    bpe = {"vocab_size": 400, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_of])
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # of Llama 2
    unigram = {"vocab_size": 120, "unk_token": "<unk>", "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return {
        "GPT-2": trained(
            models.BPE(), trainers.BpeTrainer(**bpe, initial_alphabet=alphabet), None, pre_tokenizers.ByteLevel()
        ),
        "Llama 3": trained(models.BPE(), trainers.BpeTrainer(**bpe, initial_alphabet=alphabet), None, words),
        "Llama 2": trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer(**bpe), marked),
        "T5": trained(
            models.Unigram(), trainers.UnigramTrainer(**unigram), normalizers.NFKC(), pre_tokenizers.Metaspace()
        ),
        "ALBERT": trained(models.Unigram(), trainers.UnigramTrainer(**unigram), marked),
    }


KINDS = ("GPT-2", "Llama 3", "Llama 2", "T5", "ALBERT")
PIECES = ("the ", "rivers", "\n", "  ", "über", "川は", "…\n", "é", "e\u0301", "aaaa", ".", "\r\n", " \n ", "🏔", "7")


@pytest.fixture(scope="module")
def tokenizers_of_kinds():
    return kinds_of_tokenizers()


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=150).map("".join) | st.text(max_size=60),
    window=st.integers(2, 9),
    limit=st.integers(2, 60),
)
@example(text="the the riversthe  \n ", window=2, limit=2)  # two short prefixes agree on tokens that change later
def test_the_windows_of_a_partly_read_text_are_those_of_the_whole_text(
    kind, text, window, limit, tokenizers_of_kinds, llama, tmp_path_factory
):
    tokenizer = tokenizers_of_kinds[kind]
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text(text, newline="")
    ids = tokenizer(text)["input_ids"] if text.strip() else []
    window = min(window, limit)
    expected = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)][: limit // window] or [ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptkit.data.windows.load_tokenizer", lambda root: tokenizer)
        patch.setattr("adaptkit.data.windows._LEAST_BYTES", 3)
        patch.setattr("adaptkit.data.windows._BYTES_PER_TOKEN", 1)
        if len(ids) < 2:
            with pytest.raises(DataError, match=r"no text to read|a single token"):
                read_tokens([path], llama, window=window, max_tokens=limit)
        else:
            assert read_tokens([path], llama, window=window, max_tokens=limit).tolist() == expected


def test_the_smallest_window_has_room_for_text_if_a_tokenizer_prepends_two_tokens(copy_of, llama, tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = copy_of(llama)
    tokenizer = load_tokenizer(folder)
    both = [(tokenizer.convert_ids_to_tokens(number), number) for number in (0, 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(token for token, _ in both) + " $A", special_tokens=both
    )
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)("whales")["input_ids"][:2] == [0, 1]
    windows = read_tokens([write(tmp_path, "prose.txt", PROSE)], folder, window=2)
    assert windows.shape[1] == 2
    assert len(windows) > 10
