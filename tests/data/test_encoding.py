"""Loss is on answers and their end tokens, and on nothing else, for any chat template."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.conversation import read_example
from adaptkit.data.encoding import IGNORED, Encoder, prompt_ids
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError, UsageError
from adaptkit.training.evaluation.generation import stop_tokens

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # no opening: the answer follows [/INST]
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ALPACA = (  # puts text instead of an end token after an answer
    "{% for m in messages %}### {{ 'Response' if m.role == 'assistant' else 'Instruction' }}:\n{{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
QWEN3 = (  # omits reasoning from all answers but the last
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (  # also ends the text if no answer is asked for
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (  # opens an answer with tokens and words that the prompt lacks
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>"
    "{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FAMILIES = {  # template; first and end token of a text; token that ends a turn
    "chatml": (None, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>"),
    "alpaca": (ALPACA, None, "</s>", "</s>"),
    "phi3": (PHI3, None, "<|endoftext|>", "<|end|>"),
}
ONCE = {  # the same, and what the template puts after the end of a turn
    **{
        name: (*family, {"chatml": "\n", "gemma": "\n", "phi3": "\n<|endoftext|>"}.get(name, ""))
        for name, family in FAMILIES.items()
    },
    "harmony": (HARMONY, None, "<|endoftext|>", "<|return|>", ""),
}
MARKS = [
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>",
    "<|assistant|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "</think>",
]  # fmt: skip


@pytest.fixture(scope="module")
def families(llama):
    """A tokenizer for each family, which adds its first token to a text by itself."""
    from tokenizers import processors

    made = {}
    for name, (template, begin, end, *_) in ONCE.items():
        made[name] = tokenizer = load_tokenizer(llama)
        if template is not None:
            tokenizer.add_special_tokens(
                {"eos_token": end, "pad_token": end, "additional_special_tokens": MARKS}
                | ({"bos_token": begin} if begin else {})
            )
            tokenizer.chat_template = template
            if begin:
                special = [(begin, tokenizer.bos_token_id)]
                tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                    single=f"{begin} $A", special_tokens=special
                )
    return made


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def encode_row(row, tokenizer, **options):
    """Return the samples of a row, and how many were given an end token."""
    (encoded,) = Encoder(tokenizer, **options).encode([("here", read_example(row, "here"))])
    return encoded.samples, encoded.ended


def encode(messages, tokenizer, **options):
    """Return the only sample of a conversation."""
    ((sample,), _) = encode_row({"messages": messages}, tokenizer, **options)
    return sample


def learned(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


CLOSED_LATE = (  # puts an answer's end before the next message: Apertus, Hy3
    "{% for m in messages %}{% if m.role == 'user' %}{{ '</s>' if not loop.first }}<|user|>{{ m.content }}"
    "<|assistant|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHAT = conversation("Name a river", "the Rhine", "And another", "the Po")


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_ends_are_learned_under_every_template(name, families):
    tokenizer, end = families[name], FAMILIES[name][3]
    sample = encode(CHAT, tokenizer)
    space = " " if name == "mistral" else ""  # the template's, between [/INST] and the answer
    first = "the Rhine" if name == "alpaca" else f"{space}the Rhine{end}"
    assert learned(sample, tokenizer) == f"{first}{space}the Po{end}"
    assert sample.labels[-1] == IGNORED or list(sample.ids)[-1] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_those_of_transformers_for_the_conversation(name, families):
    """So there is only one first token, and the prompt is that at inference."""
    tokenizer = families[name]
    sample = encode(CHAT, tokenizer)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    if name == "alpaca":  # an end token replaces the template's line ends
        assert list(sample.ids[-1:]) == [tokenizer.eos_token_id]
        whole, sample_ids = whole[: len(sample.ids) - 1], list(sample.ids[:-1])
    else:
        sample_ids = list(sample.ids)
    assert sample_ids == whole
    begin = FAMILIES[name][1]
    if begin and name != "chatml":
        assert sample_ids.count(tokenizer.bos_token_id) == 1
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=True)
    start = next(i for i, label in enumerate(sample.labels) if label != IGNORED)
    assert sample_ids[:start] == prompt["input_ids"] == prompt_ids("Name a river", tokenizer)


def test_labels_equal_the_assistant_mask_of_transformers(families):
    """That mask requires generation tags in the template; SmolLM2's has none."""
    tokenizer = families["llama3"]
    marked = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    sample = encode(CHAT, tokenizer)
    assert [int(label != IGNORED) for label in sample.labels] == marked["assistant_masks"]
    assert sum(marked["assistant_masks"]) > 0
    assert "{% generation %}" not in families["chatml"].chat_template


def test_loss_can_be_on_the_last_answer_only_or_on_everything(tokenizer):
    assert learned(encode(CHAT, tokenizer, loss_on="last_answer"), tokenizer) == "the Po<|im_end|>"
    everything = encode(CHAT, tokenizer, loss_on="all")
    assert list(everything.labels) == list(everything.ids)


@given(st.text(min_size=1).filter(lambda t: t.strip()), st.text(min_size=1).filter(lambda t: t.strip()))
def test_labels_are_one_range_from_the_prompt_to_the_end_token_for_any_text(tokenizer, question, answer):
    sample = encode(conversation(question, answer), tokenizer)
    marked = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    assert marked == list(range(marked[0], marked[-1] + 1))
    assert all(sample.labels[i] == sample.ids[i] for i in marked)
    assert sample.ids[marked[-1]] == tokenizer.eos_token_id
    assert list(sample.ids[: marked[0]]) == prompt_ids(question, tokenizer)


SPOKEN = st.lists(
    st.one_of(
        st.sampled_from(
            [*MARKS, "<|im_end|>", "</s>", "<|eot_id|>", "<|endoftext|>", "end", "a", "return", "final", " "]
        ),
        st.text(max_size=5),
    ),
    max_size=4,
).map("".join)


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    """A model whose files name no end token."""
    folder = tmp_path_factory.mktemp("unnamed")
    (folder / "config.json").write_text("{}")
    return SimpleNamespace(checkpoint=SimpleNamespace(root=folder))


@given(SPOKEN)
@pytest.mark.parametrize("name", [name for name in ONCE if name != "alpaca"])
def test_nothing_after_the_end_of_the_turn_is_learned_for_any_answer(families, unnamed, name, answer):
    """The token that ends the turn is also a stop token in generation."""
    tokenizer, (*_, end, after) = families[name], ONCE[name]
    ((sample,), ended) = encode_row({"prompt": "Name a river", "completion": answer}, tokenizer)
    marked = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    assert marked == list(range(len(prompt_ids("Name a river", tokenizer)), marked[-1] + 1))
    assert (sample.ids[marked[-1]], ended) == (tokenizer.convert_tokens_to_ids(end), 0)
    assert tokenizer.decode(sample.ids[marked[-1] + 1 :]) == after
    assert sample.ids[marked[-1]] in stop_tokens(unnamed, tokenizer)


def test_a_template_that_requires_a_system_message_can_be_learned_from(llama):
    """It refuses the probe for what it puts after an answer."""
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}{% endif %}" + tokenizer.chat_template
    )
    messages = [{"role": "system", "content": "You are a river"}, *CHAT]
    assert learned(encode(messages, tokenizer), tokenizer) == "the Rhine<|im_end|>the Po<|im_end|>"
    with pytest.raises(DataError, match="here: the chat template refuses the conversation"):
        encode(CHAT, tokenizer)


@given(SPOKEN)
def test_an_end_token_is_added_last_if_the_template_has_none(families, answer):
    tokenizer = families["alpaca"]
    ((sample,), _) = encode_row({"prompt": "Name a river", "completion": answer}, tokenizer)
    assert sample.ids[-1] == sample.labels[-1] == tokenizer.eos_token_id


@given(SPOKEN.map(str.rstrip).filter(lambda text: not text.endswith("</s>")))
def test_no_end_token_is_added_to_an_answer_that_ends_with_it_already(families, answer):
    row = {"prompt": "Name a river</s>", "completion": answer}
    ended, added = encode_row(row | {"completion": f"{answer}</s>"}, families["alpaca"])
    assert (ended, added) == (encode_row(row, families["alpaca"])[0], 0)


@pytest.fixture(scope="module")
def merging(tokenizer):
    """A tokenizer with a token for two line ends, as real ones have."""
    from tokenizers import Tokenizer

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"]["ĊĊ"] = len(values["model"]["vocab"])
    values["model"]["merges"].append(["Ċ", "Ċ"])
    copied = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(values)), eos_token="<|im_end|>")
    copied.chat_template = tokenizer.chat_template
    return copied


def test_no_token_spans_the_end_of_the_prompt_and_the_start_of_the_answer(merging):
    messages = conversation("Write a poem", "\nOh", "More", "\n\nAh")
    whole = merging.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    sample = encode(messages, merging)
    assert merging.decode(list(sample.ids)) == merging.decode(whole)
    assert list(sample.ids) != whole  # which has "assistant", then both line ends in one token
    start = next(i for i, label in enumerate(sample.labels) if label != IGNORED)
    assert list(sample.ids[:start]) == prompt_ids("Write a poem", merging)
    assert learned(sample, merging) == "\nOh<|im_end|>\n\nAh<|im_end|>"


@pytest.mark.parametrize("loss_on", ["answers", "last_answer", "all"])
def test_no_token_spans_the_end_of_the_answer_and_what_the_template_puts_after_it(tokenizer, loss_on):
    from tokenizers import Tokenizer

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"][".<"] = len(values["model"]["vocab"])
    values["model"]["merges"].append([".", "<"])
    merging = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(values)), eos_token="<|im_end|>")
    merging.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ((sample,), ended) = encode_row({"prompt": "Name a river.", "completion": "The Rhine."}, merging, loss_on=loss_on)
    assert ended == 1
    assert learned(sample, merging).endswith("The Rhine.<|im_end|>")


def test_text_is_tokenized_as_a_whole_if_the_tokenizer_puts_a_space_before_it(llama):
    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer(llama)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    sample = encode(conversation("one", "two"), tokenizer)
    whole = tokenizer.apply_chat_template(conversation("one", "two"), tokenize=True, return_dict=True)["input_ids"]
    assert list(sample.ids) == whole
    assert learned(sample, tokenizer).endswith("two<|im_end|>")


def test_the_first_word_is_learned_if_its_token_includes_the_prompts_last_space():
    """As with tokenizers converted from SentencePiece and Vicuna's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    words.train_from_iterator(["USER: hello ASSISTANT: hello world two " * 9], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    sample = encode(conversation("hello", "hello world", "two", "two"), tokenizer)
    assert learned(sample, tokenizer) == "hello world</s> two</s>"


def test_messages_after_the_last_learned_answer_are_not_read(families):
    """So the answer gets an end token even if the template has none."""
    asked = [*conversation("Name a river", "the Rhine"), {"role": "user", "content": "Thanks"}]
    for name in ("alpaca", "chatml"):
        sample = encode(asked, families[name])
        assert list(sample.ids) == list(encode(asked[:2], families[name]).ids)
        assert learned(sample, families[name]) == f"the Rhine{FAMILIES[name][3]}"
    everything = encode(asked, families["chatml"], loss_on="all")
    assert "Thanks" in families["chatml"].decode(everything.ids)


def test_every_answer_is_a_sample_if_the_template_changes_earlier_turns(llama):
    """Each begins with the prompt of that answer at inference."""
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = QWEN3
    messages = conversation("one", "<think>long</think>first", "two", "second")
    samples, _ = encode_row({"messages": messages}, tokenizer)
    assert [learned(sample, tokenizer) for sample in samples] == [
        "<think>long</think>first<|im_end|>", "second<|im_end|>",
    ]  # fmt: skip
    for sample, turn in zip(samples, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=True)
        start = next(i for i, label in enumerate(sample.labels) if label != IGNORED)
        assert list(sample.ids[:start]) == prompt["input_ids"]
    (last,), _ = encode_row({"messages": messages}, tokenizer, loss_on="last_answer")
    assert list(last.ids) == list(samples[1].ids)


def test_each_sample_ends_with_its_answer_if_the_template_changes_some_earlier_turns(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = QWEN3
    messages = conversation("one", "plain", "two", "<think>long</think>second", "three", "third")
    samples, _ = encode_row({"messages": messages}, tokenizer)
    for sample, turn in zip(samples, (1, 3, 5), strict=True):
        whole = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        assert tokenizer.decode(sample.ids) == whole


def test_a_template_that_opens_an_answer_unlike_it_renders_it_is_refused(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    with pytest.raises(DataError, match="here: the chat template opens answers with 'A:', but message 2"):
        encode(conversation("one", "two"), tokenizer)


def test_a_template_that_rewrites_the_question_is_refused(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="here: the chat template rewrites the conversation around message 2"):
        encode(conversation("one", "two"), tokenizer)


def test_a_conversation_that_the_assistant_begins_is_refused(tokenizer):
    with pytest.raises(DataError, match="here: the first message is the assistant's"):
        encode([{"role": "assistant", "content": "hello"}], tokenizer)


@pytest.mark.parametrize("name", ["chatml", "mistral"])
@pytest.mark.parametrize("marks", [0, 1], ids=["plain", "with its marks"])
def test_plain_text_is_learned_whole_between_one_first_token_and_one_end_token(name, marks, families):
    tokenizer = families[name]
    begin, end = (FAMILIES[name][1], FAMILIES[name][2]) if marks else ("", "")
    ((sample,), _) = encode_row({"text": f"{begin}Call me Ishmael.{end}"}, tokenizer)
    first = [] if name == "chatml" and not marks else [tokenizer.bos_token_id]  # ChatML's comes from the template
    inside = tokenizer("Call me Ishmael.", add_special_tokens=False)["input_ids"]
    assert list(sample.ids) == [*first, *inside, tokenizer.eos_token_id]
    assert list(sample.labels[1:]) == list(sample.ids[1:])


def test_without_a_template_messages_are_joined_after_the_first_token(families, llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.backend_tokenizer.post_processor = families["mistral"].backend_tokenizer.post_processor
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = None
    sample = encode(CHAT, tokenizer)
    assert tokenizer.decode(list(sample.ids)).endswith("Name a river\nthe Rhine</s>And another\nthe Po</s>")
    assert learned(sample, tokenizer) == "the Rhine</s>the Po</s>"
    assert list(
        sample.ids[: sample.labels.index(sample.ids[len(prompt_ids("Name a river", tokenizer))])]
    ) == prompt_ids("Name a river", tokenizer)


def test_a_tokenizer_without_an_end_token_is_refused_if_the_template_has_none(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template, tokenizer.eos_token = ALPACA, None
    with pytest.raises(DataError, match="here: the tokenizer has no end token"):
        encode(CHAT, tokenizer)


def test_a_prompt_that_is_not_utf8_is_refused(tokenizer):
    with pytest.raises(UsageError, match="not UTF-8"):
        prompt_ids("\udcff", tokenizer)


@pytest.mark.parametrize("count", [1, 2])
def test_all_tokens_that_end_every_turn_are_learned(llama, count):
    """Command R7B has two, the last of which is the end token. A token only at the end of the text is not learned."""
    tokenizer = load_tokenizer(llama)
    ends, last = ["<|im_end|>", "<|endoftext|>"][:count], {1: "<|endoftext|>", 2: ""}[count]
    tokenizer.eos_token = ends[-1]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + ' ' + m.content + '" + "".join(ends) + "' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% else %}" + last + "{% endif %}"
    )
    assert learned(encode(CHAT, tokenizer), tokenizer) == "".join(
        f"{river}{''.join(ends)}" for river in ("the Rhine", "the Po")
    )


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_tokens_within_an_answer_are_not_stop_tokens(llama, unnamed, eos):
    """As in Kimi K3, which closes reasoning, answer and message with one token, and the turn with a different one."""
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": ["<|close|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' %}<|close|>think "
        "{% endif %}{{ m.content }}<|close|>said <|close|>message <|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    sample = encode(conversation("Name a river", "the Rhine"), tokenizer)
    labels = [label for label in sample.labels if label != IGNORED]
    stops = stop_tokens(unnamed, tokenizer)
    assert [token for token in labels if token in stops] == labels[-1:] == tokenizer.encode("<|im_end|>")


def test_an_answer_ends_before_an_opening_that_is_always_rendered(llama, unnamed):
    """As in Llama 3's first template, which opens the next answer without being asked to."""
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant "
    )
    assert stop_tokens(unnamed, tokenizer) == sorted(tokenizer.encode("<|endoftext|><|im_end|>"))
    assert learned(encode(CHAT, tokenizer), tokenizer) == "the Rhine<|im_end|>the Po<|im_end|>"


def test_an_end_token_that_the_template_adds_before_the_next_message_is_learned(families):
    tokenizer = families["alpaca"]
    own, tokenizer.chat_template = tokenizer.chat_template, CLOSED_LATE
    try:
        ((sample,), ended) = encode_row({"messages": CHAT}, tokenizer)
        assert (learned(sample, tokenizer), ended) == ("the Rhine</s>the Po</s>", 1)
        tokenizer.chat_template = CLOSED_LATE.replace("'</s>'", "'<|end|>'")  # no end token: may be the next message's
        assert learned(encode(CHAT, tokenizer), tokenizer) == "the Rhinethe Po</s>"
    finally:
        tokenizer.chat_template = own


def test_the_tokenizers_first_token_is_not_added_to_a_template_without_it(families, llama):
    """As in transformers, the template decides."""
    tokenizer = load_tokenizer(llama)
    tokenizer.backend_tokenizer.post_processor = families["mistral"].backend_tokenizer.post_processor
    assert tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = ALPACA
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert list(encode(CHAT, tokenizer).ids[:-1]) == whole[: len(encode(CHAT, tokenizer).ids) - 1]
