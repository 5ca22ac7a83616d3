"""Chat templates whose prompt for an answer differs from how they render it, and answers with reasoning."""

import pytest

from adaptkit.data.conversation import read_example
from adaptkit.data.encoding import IGNORED, Encoder
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError

MARKS = (
    "<think>", "</think>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<turn|>", "<|channel>", "<channel|>",
    "<|TURN|>", "<|END|>", "<|USER|>", "<|BOT|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>",
)  # fmt: skip
TURNS = "{% for m in messages %}"
LAST_TURN = "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
OWN_MARKS = (  # reasoning in the content, between other marks than the data's, and no end of turn: GLM 4.6
    TURNS + "{% set parts = m.content.split('</think>') %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "<think>{{ parts[0].split('<think>')[-1].strip() if '</think>' in m.content }}</think>\n{{ parts[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_LAST = (  # puts the system message before the last turn, if that is a question: Mistral Nemo
    TURNS + "{% if m.role == 'assistant' %} {{ m.content + eos_token }}{% elif m.role == 'user' %}[INST]"
    + LAST_TURN + "{{ m.content }}[/INST]{% endif %}{% endfor %}"
)  # fmt: skip
NO_THOUGHTS = (  # the prompt ends in empty reasoning, which rendered answers lack: Gemma 4
    TURNS + "<|{{ m.role }}|>{{ m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|channel>thought\n<channel|>{% endif %}"
)
CLOSING = (  # the prompt opens reasoning; an answer without reasoning closes it: GLM 4.7
    TURNS + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '' if '</think>' in m.content else '</think>' }}"
    "{% endif %}{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
ANSWER_CLOSES = (  # prompt and answer both close reasoning: DeepSeek V3.2
    TURNS + "<|{{ m.role }}|>{{ '</think>' if m.role == 'assistant' }}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
CHANNELS = (  # takes reasoning only from a field, and renders only the last answer's: gpt-oss
    TURNS + "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis"
    "<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BOTH = (  # takes reasoning from a field, or leaves it in the content: Nemotron 3
    TURNS + "<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% elif '</think>' "
    "in m.content %}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NEXT_TURN = (  # always opens the assistant's next turn at the end: Command A
    TURNS + "<|TURN|>{{ '<|USER|>' if m.role == 'user' else '<|BOT|>' }}{{ m.content }}<|END|>{% endfor %}"
    "<|TURN|><|BOT|>"
)
BEGUN = (  # the prompt opens reasoning, which rendered answers omit: DeepSeek R1
    TURNS + "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
APART = {"role": "assistant", "content": "the Rhine"}
THOUGHTFUL = "<think>\nlong\nand wide\n</think>\n\nthe Rhine"


@pytest.fixture
def make(llama):
    """Return a function that makes a tokenizer with a given template."""

    def tokenizer_with(template, eos="<|end|>"):
        tokenizer = load_tokenizer(llama)
        tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": list(MARKS)})
        tokenizer.chat_template = template
        return tokenizer

    return tokenizer_with


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def encode(messages, tokenizer, **options):
    row = read_example({"messages": messages}, "here")
    (encoded,) = Encoder(tokenizer, **options).encode([("here", row)])
    return encoded.samples


def learned(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


def check_asked(samples, messages, tokenizer):
    """Check that the tokens before each answer are those of its prompt at inference."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for sample, turn in zip(samples, turns, strict=True):
        asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=True)
        begin = next(place for place, label in enumerate(sample.labels) if label != IGNORED)
        assert list(sample.ids[:begin]) == asked["input_ids"]


def test_reasoning_and_answer_are_learned_with_the_marks_of_the_template(make):
    """The mark that closes reasoning is an added token, as are those that end turns."""
    tokenizer = make(OWN_MARKS)
    (sample,) = encode(chat("Name a river", THOUGHTFUL), tokenizer)
    assert learned(sample, tokenizer) == "<think>long\nand wide</think>\nthe Rhine<|end|>"
    check_asked([sample], chat("Name a river", THOUGHTFUL), tokenizer)


def test_the_system_message_is_included_if_the_template_moves_it_to_the_last_question(make):
    tokenizer = make(SYSTEM_LAST)
    messages = chat("Name a river", "the Rhine", "And another", "the Po", system="Be kind")
    samples = encode(messages, tokenizer)
    assert [learned(sample, tokenizer) for sample in samples] == [" the Rhine<|end|>", " the Po<|end|>"]
    check_asked(samples, messages, tokenizer)
    assert all("Be kind\n" in tokenizer.decode(sample.ids) for sample in samples)
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "Be kind" not in written  # so rendering the whole conversation would lose it


@pytest.mark.parametrize(
    ("template", "said"),
    [(NO_THOUGHTS, "the Rhine<turn|>"), (CLOSING, "</think>the Rhine<|end|>"), (ANSWER_CLOSES, "the Rhine<|end|>")],
    ids=["empty", "begun", "ended twice"],
)
def test_an_answer_without_reasoning_follows_the_prompt_at_inference(make, template, said):
    tokenizer = make(template)
    messages = chat("Name a lake", "none", "Name a river", "the Rhine", system="Be kind")
    samples = encode(messages, tokenizer)
    assert learned(samples[1], tokenizer) == said
    check_asked(samples, messages, tokenizer)


@pytest.mark.parametrize("answer", ["", "n", "think", ">", "/", "end", "<|", "x\n\nd", "<b>so</b>"])
def test_an_answer_whose_text_also_occurs_in_the_marks_around_it_is_found(make, answer):
    said = answer.strip()
    (sample,) = encode(chat("Name a river", answer), make(OWN_MARKS))
    assert learned(sample, make(OWN_MARKS)).split("</think>")[1].strip() == f"{said}<|end|>"
    (sample,) = encode(chat("Name a river", answer), make(ANSWER_CLOSES))
    assert learned(sample, make(ANSWER_CLOSES)).strip() == f"{answer}<|end|>".strip()
    if said:
        (sample,) = encode(chat("Name a river", f"<think>\nlong\n</think>\n\n{answer}"), make(BEGUN))
        assert learned(sample, make(BEGUN)) == f"long\n</think>\n\n{said}<|end|>"


def test_reasoning_that_the_template_omits_is_learned_after_the_prompts_opening_mark(make):
    tokenizer = make(BEGUN)
    for answer in ({"content": THOUGHTFUL}, {"content": "the Rhine", "reasoning_content": "long\nand wide"}):
        messages = [*chat("zero", "<think>\nno\n</think>\n\nnil", "Name a river"), {"role": "assistant"} | answer]
        samples = encode(messages, tokenizer)
        assert [learned(sample, tokenizer) for sample in samples] == [
            "no\n</think>\n\nnil<|end|>", "long\nand wide\n</think>\n\nthe Rhine<|end|>",
        ]  # fmt: skip
        check_asked(samples, messages, tokenizer)
    with pytest.raises(
        DataError, match=r"opens answers with '<think>\\n', but message 2, an answer, does not continue that"
    ):
        encode(chat("Name a river", "the Rhine"), tokenizer)


@pytest.mark.parametrize(
    ("opening", "mark", "answer", "after"),
    [
        ("<|START_THINKING|>", "<|START_TEXT|>", "the Rhine", "<|START_THINKING|>"),  # Cohere's: text does not close it
        ("</think>", "", THOUGHTFUL, "</think>"),  # Laguna's
        ("<think>\n", "<think>\n", THOUGHTFUL, "<think>\n"),
        (
            "<think>\n",
            "<think>\n",
            "the Rhine",
            "<think>\n",
        ),  # Nemotron Nano's: the rendered answer opens reasoning, too, and does not close it
        ("Here are my thoughts:\n", "", "the Rhine", "Here are my thoughts:\n"),
    ],
)
def test_an_answer_that_does_not_continue_the_prompts_reasoning_mark_is_refused(make, opening, mark, answer, after):
    tokenizer = make(
        f"{TURNS}<|{{{{ m.role }}}}|>{{{{ '{mark}' if m.role == 'assistant' }}}}{{{{ m.content + eos_token }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}<|assistant|>{opening}{{% endif %}}"
    )
    with pytest.raises(DataError, match="but message 2, an answer, does not continue that") as caught:
        encode(chat("Name a river", answer), tokenizer)
    assert repr(after) in caught.value.message
    assert (
        f"enable_thinking={'true' if answer == THOUGHTFUL and opening == '</think>' else 'false'}" in caught.value.hint
    )


@pytest.mark.parametrize(
    ("opening", "answer", "said"),
    [
        ("<think>\n\n</think>\n\n", "R1 puts them in <think> and </think>.", None),
        ("<|channel>thought\n<channel|>", "RSS has a <channel>.", None),
        ("<think>\n", "<think>\nthe <think> tag\n</think>\n\nfour", "the <think> tag\n</think>\n\nfour"),
        ("<|START_THINKING|>", "<|START_THINKING|>hm<|END_THINKING|>four", "hm<|END_THINKING|>four"),
    ],
)
def test_answers_and_reasoning_may_contain_reasoning_marks(make, opening, answer, said):
    tokenizer = make(
        TURNS + "<|{{ m.role }}|>{{ m.content + eos_token }}{% endfor %}"
        f"{{% if add_generation_prompt %}}<|assistant|>{opening}{{% endif %}}"
    )
    (sample,) = encode(chat("Name them", answer), tokenizer)
    assert learned(sample, tokenizer) == f"{said or answer}<|end|>"
    check_asked([sample], chat("Name them", answer), tokenizer)


def test_a_reasoning_mark_at_the_end_of_a_question_is_ordinary_text(make):
    tokenizer = make(SYSTEM_LAST.replace("[/INST]", "").replace("[INST]", ""))
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        (sample,) = encode(chat("Mend it: <channel>", "four"), tokenizer)
        assert learned(sample, tokenizer).strip() == "four<|end|>"


def test_reasoning_that_the_template_adds_before_that_of_the_data_is_refused(make):
    """Kimi K2 Thinking's template adds it."""
    tokenizer = make(TURNS + "<|{{ m.role }}|>{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
                     "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    assert learned(encode(chat("Name a river", "the Rhine"), tokenizer)[0], tokenizer).startswith("<think></think>the")
    with pytest.raises(DataError, match="adds reasoning of its own before that of message 2"):
        encode(chat("Name a river", THOUGHTFUL), tokenizer)


def test_an_answer_directly_after_an_answer_is_refused_if_prompts_end_in_extra_text(make):
    messages = [*chat("Name a river", "the Rhine"), {"role": "assistant", "content": "the Po"}]
    with pytest.raises(DataError, match="rewrites the conversation around message 3"):
        encode(messages, make(NO_THOUGHTS))


def test_with_loss_on_all_a_template_that_omits_words_is_refused(make):
    with pytest.raises(DataError, match="leaves out a part of message 2: 'long'"):
        encode(chat("Name a river", THOUGHTFUL), make(BEGUN), loss_on="all")
    forgets = make(TURNS + "<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
                   "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    for last in ("the Po", THOUGHTFUL):
        messages = chat("Name a river", THOUGHTFUL, "And another", last)
        messages[1]["weight"] = 0  # so that every learned answer is found
        with pytest.raises(DataError, match=r"leaves out a part of message [24]: '(long|and wide|the Rhine)'"):
            encode(messages, forgets, loss_on="all")
        assert len(encode(messages, forgets)) == 1
    (sample,) = encode(chat("Name a river", THOUGHTFUL), make(NEXT_TURN), loss_on="all")
    assert THOUGHTFUL in learned(sample, make(NEXT_TURN))


def test_with_loss_on_all_a_conversation_is_learned_as_it_is_rendered_although_its_prompts_differ(make):
    messages, tokenizer = chat("Name a lake", "none", "Name a river", "the Rhine"), make(NO_THOUGHTS)
    (sample,) = encode(messages, tokenizer, loss_on="all")
    assert learned(sample, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_switch_that_the_template_removes_is_not_reported_as_omitted(make):
    """SmolLM3's template removes it from the system message."""
    tokenizer = make(TURNS + "<|{{ m.role }}|>{{ m.content.replace('/no_think', '').rstrip() + eos_token }}{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    for system in ("Be kind. /no_think", "Type /help for help. /no_think", "See /usr/bin."):
        (sample,) = encode(chat("Name a river", "the Rhine", system=system), tokenizer)
        assert learned(sample, tokenizer) == "the Rhine<|end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content", "{{ '' if m.role == 'system' else m.content"
    )
    with pytest.raises(DataError, match=r"leaves out message 1 \(system\)"):
        encode(chat("Name a river", "the Rhine", system="Be kind. /no_think"), tokenizer)


def test_a_template_that_names_but_never_reads_a_field_gets_reasoning_in_the_content(make):
    """As Ministral's, which only looks for blocks of that type in lists."""
    tokenizer = make(TURNS + "<|{{ m.role }}|>{% if m.content is not string %}{% for b in m.content %}"
                     "{{ b['thinking'] }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    for messages in (
        chat("Name a river", THOUGHTFUL),
        [*chat("Name a river"), {**APART, "thinking": "long\nand wide"}],
    ):
        (sample,) = encode(messages, tokenizer)
        assert learned(sample, tokenizer) == f"{THOUGHTFUL}<|end|>"


def test_reasoning_is_refused_if_the_prompt_closes_it(make):
    with pytest.raises(DataError, match=r"answers with '</think>', but message 2, an answer, does not continue"):
        encode(chat("Name a river", THOUGHTFUL), make(ANSWER_CLOSES))


def test_a_template_with_a_reasoning_field_gets_reasoning_there_from_anywhere_in_a_row(make):
    tokenizer = make(CHANNELS)
    apart = [*chat("Name a lake", "none", "Name a river"), {"role": "assistant", "content": "the Rhine"}]
    apart[-1]["thinking"] = "long\nand wide"
    inline = chat("Name a lake", "none", "Name a river", THOUGHTFUL)
    written = tokenizer.apply_chat_template(apart, tokenize=False)
    for messages in (apart, inline):
        samples = encode(messages, tokenizer)
        assert learned(samples[0], tokenizer) == "<|channel|>final<|message|>none<|return|>"
        assert tokenizer.decode(samples[1].ids) == written
        assert learned(samples[1], tokenizer) == written[written.index("<|channel|>analysis") :]


def test_a_template_that_takes_reasoning_both_ways_gets_it_as_in_the_data(make):
    tokenizer = make(BOTH)
    apart = [*chat("Name a river"), {"role": "assistant", "content": "the Rhine", "reasoning_content": "long"}]
    for messages in (apart, chat("Name a river", THOUGHTFUL)):
        (sample,) = encode(messages, tokenizer)
        assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_without_a_reasoning_field_gets_reasoning_in_the_content(make, name):
    tokenizer = make(NEXT_TURN)
    apart = [*chat("Name a river"), {"role": "assistant", "content": "the Rhine", name: "long\nand wide"}]
    (sample,) = encode(apart, tokenizer)
    (inline,) = encode(chat("Name a river", THOUGHTFUL), tokenizer)
    assert (list(sample.ids), list(sample.labels)) == (list(inline.ids), list(inline.labels))
    tokenizer.chat_template = None
    assert learned(encode(apart, tokenizer)[0], tokenizer) == f"{THOUGHTFUL}<|end|>"


def test_omitted_reasoning_is_refused_if_a_part_of_the_answer_is_omitted_too(make):
    tokenizer = make(BEGUN.replace("[-1] + eos_token", "[-1].replace('Rhine', '') + eos_token"))
    with pytest.raises(DataError, match="leaves out a part of message 2: 'long'"):
        encode(chat("Name a river", THOUGHTFUL), tokenizer)


def test_the_omission_of_a_repeated_line_is_found(make):
    tokenizer = make(TURNS + "<|{{ m.role }}|>{{ m.content.removesuffix('\n\nyes') + eos_token }}{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    assert learned(encode(chat("Sure?", "yes\n\nno"), tokenizer)[0], tokenizer) == "yes\n\nno<|end|>"
    with pytest.raises(DataError, match="leaves out a part of message 2: 'yes'"):
        encode(chat("Sure?", "yes\n\nyes"), tokenizer)


def test_reasoning_that_the_template_omits_is_an_error(make):
    tokenizer = make(TURNS + "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    with pytest.raises(DataError, match="here: the chat template leaves out a part of message 2: 'long'"):
        encode(chat("Name a river", THOUGHTFUL), tokenizer)
    (sample,) = encode(chat("Name a river", "the Rhine"), tokenizer)
    assert learned(sample, tokenizer) == "the Rhine<|end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|><|channel|>")
    with pytest.raises(DataError, match="leaves out a part of message 2: 'long'"):  # opens no reasoning of this kind
        encode(chat("Name a river", THOUGHTFUL), tokenizer)


def test_a_template_whose_prompt_depends_on_the_length_of_the_conversation_is_refused(make):
    tokenizer = make(CLOSING.replace("<think>{% endif %}", "<think>{{ messages | length }}{% endif %}"))
    with pytest.raises(DataError, match="rewrites the conversation around message 4"):
        encode(chat("Name a lake", "none", "Name a river", "the Rhine"), tokenizer, loss_on="last_answer")


@pytest.mark.parametrize(
    ("what", "loss_on"),
    [("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "all"), ("{{ m.content[0].text }}", "answers")],
)
def test_a_template_that_leaves_a_message_out_is_refused(make, what, loss_on):
    """As SmolVLM's does with any text that is not in a list."""
    tokenizer = make(TURNS + "<|user|>" + what + "<|end|>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}")
    with pytest.raises(DataError, match=r"leaves out message 1 \(system\)"):
        encode(chat("Name a river", "the Rhine", system="Be kind"), tokenizer, loss_on=loss_on)


END_LATE = "{% if m.role == 'assistant' or not loop.last %}<|end|>{% endif %}"
LATE = {  # a turn, the opening of an answer, and how the prompt ends and the answer would begin
    "no opening": ("<|{{ m.role }}|>{{ m.content }}" + END_LATE, "", "<|user|>river", "<|end|><|assistant|>"),
    "opening": ("<|{{ m.role }}|>{{ m.content }}" + END_LATE, "<|assistant|>", "river<|assistant|>", "<|end|><|ass"),
    "separators": ("{{ m.content }}" + END_LATE, "", "river", "<|end|>"),
    "tags": ("{{ '[INST]' if m.role == 'user' else '[/INST]' }}{{ m.content }}", "", "[INST]river", "[/INST]"),
    "words": (" {{ m.role }}: {{ m.content }}" + END_LATE, " assistant:", "river assistant:", "<|end|> assistant: "),
}


@pytest.mark.parametrize("name", LATE)
def test_a_template_that_ends_a_question_only_once_it_is_answered_is_refused(make, name):
    """The model would learn to begin an answer with the end of the question, which ends its turn at inference."""
    turn, opening, ended, begun = LATE[name]
    rest = "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"
    for messages in (chat("river", "the Rhine"), chat("river", "the Rhine", "lake", "none")):
        with pytest.raises(DataError, match="ends a question only once it is answered") as refused:
            encode(messages, make(TURNS + turn + rest))
        assert f"{ended}', and the answer would begin with '{begun}" in str(refused.value)
    if END_LATE in turn:
        tokenizer = make(TURNS + turn.replace(END_LATE, "<|end|>") + rest)
        (sample,) = encode(messages, tokenizer)
        assert learned(sample, tokenizer).count("<|end|>") == 2


def test_the_token_that_opens_the_next_turn_is_not_part_of_the_answer(make):
    tokenizer = make(NEXT_TURN, eos="<|END|>")
    (sample,) = encode(chat("Name a river", "the Rhine", "And another", "the Po"), tokenizer)
    assert learned(sample, tokenizer) == "the Rhine<|END|>the Po<|END|>"


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ({"content": "a", "thinking": 3}, ": thinking: expected text, found int"),
        ({"content": "a", "thinking": "\udcff"}, ": thinking: expected text, found an unpaired surrogate"),
        ({"content": "a", "thinking": "b", "reasoning": "c"}, ": has reasoning in more than one place"),
        ({"content": THOUGHTFUL, "reasoning": "c"}, ": has reasoning in more than one place"),
        ({"content": "<think>\n\n</think>\n\nso", "reasoning": "c"}, ": has reasoning in more than one place"),
    ],
)
def test_reasoning_that_is_not_text_or_in_two_places_is_refused(answer, what):
    with pytest.raises(DataError, match=f"(?m)^here: message 2 of messages{what}$"):
        read_example({"messages": [*chat("q"), {"role": "assistant"} | answer]}, "here")


def test_identical_duplicate_reasoning_and_empty_reasoning_are_accepted():
    answer = {"role": "assistant", "content": "a", "thinking": "b", "reasoning_content": "b", "reasoning": None}
    example = read_example({"messages": [*chat("q"), answer]}, "here")
    assert example.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "b"}
    for nothing in ("", " ", False, [], {}):
        plain = read_example({"messages": [*chat("q"), {"role": "assistant", "content": "a", "thinking": nothing}]}, "")
        assert plain.messages[1] == {"role": "assistant", "content": "a"}
    twice = {"role": "assistant", "content": THOUGHTFUL, "thinking": " long\nand wide"}
    assert read_example({"messages": [*chat("q"), twice]}, "").messages[1]["content"] == THOUGHTFUL


def test_reasoning_of_answers_in_a_prompt_is_read_and_that_of_users_reported_as_ignored():
    asked = [
        {"role": "user", "content": "q", "thinking": "why"},
        {"role": "assistant", "content": "a", "thinking": "b"},
    ]
    row = {"prompt": [*asked, {"role": "user", "content": "r"}], "completion": [{"role": "assistant", "content": "c"}]}
    example = read_example(row, "here")
    assert (example.messages[1]["reasoning_content"], example.learned) == ("b", (3,))
    assert example.ignored == {"thinking"}
    assert "reasoning_content" not in example.messages[0]


def test_the_end_token_follows_the_last_word_if_the_template_has_none(make):
    tokenizer = make(
        TURNS + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (sample,) = encode(chat("Name a river", "the Rhine  "), tokenizer)
    assert learned(sample, tokenizer) == "the Rhine<|end|>"
