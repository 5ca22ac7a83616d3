"""Tool calls are learned after their prompt at inference, and templates that omit a part of them are refused."""

import json

import pytest

from adaptkit.data.conversation import read_example
from adaptkit.data.dataset import load_data
from adaptkit.data.encoding import IGNORED, Encoder, conversation_ids
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError

CHATML = (  # as in Hermes and Qwen
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}"
    "{% for c in m.tool_calls %}{% set f = c.function %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # one call without content; tool results as JSON
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% elif m.tool_calls is defined %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEEPSEEK = (  # arguments are text, and there is no content
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}<|end|>{% elif not m.content is string %}<|assistant|>"
    "{% for c in m.tool_calls %}<|call|>{{ c.function.name }}\n```json\n{{ c.function.arguments + '\n```' }}"
    "{% endfor %}{{ eos_token }}{% else %}<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HARMONY = (  # a call ends with a token of its own
    "{% for t in tools or [] %}<|start|>developer<|message|>{{ t.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ m.content | tojson }}"
    "<|end|>"
    "{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}"
    "<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>{% else %}<|start|>{{ m.role }}"
    "{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
XML = (  # arguments one by one, as they are
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>{{ v if v is string else v | tojson }}</parameter>{% endfor %}</function>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {  # template, end token, learned text of the call
    "chatml": (
        CHATML,
        "<|im_end|>",
        '{said}\n<tool_call>\n{{"name": "depth", "arguments": {json}}}\n</tool_call><|im_end|>',
    ),
    "llama": (LLAMA, "<|eot_id|>", '{{"name": "depth", "parameters": {json}}}<|eot_id|>'),
    "deepseek": (DEEPSEEK, "<|eos|>", "<|call|>depth\n```json\n{json}\n```<|eos|>"),
    "harmony": (HARMONY, "<|endoftext|>", " to=functions.depth<|channel|>commentary json<|message|>{json}<|call|>"),
    "xml": (XML, "<|im_end|>", "{said}<function=depth><parameter=of>{text}</parameter></function><|im_end|>"),
}
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|output|>", "<|call|>", "<|end|>",
         "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|begin|>"]  # fmt: skip
TEXT = 'the "Rhine"\nat Köln, \\ or <b>'
ARGUMENTS = {"of": TEXT}
TOOL = {"name": "depth", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
RESULT = '{"metres": 3, "note": "today"}'


def row(said="", arguments=ARGUMENTS, tools=(TOOL,), result=RESULT):
    return {
        "messages": [
            {"role": "user", "content": "How deep is it?"},
            {"role": "assistant", "content": said, "tool_calls": [{"name": "depth", "arguments": arguments}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": "Three metres."},
        ],
        "tools": list(tools),
    }


def tokenizer_of(llama, name):
    template, end, _ = FAMILIES[name]
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens(
        {"eos_token": end, "pad_token": end, "bos_token": "<|begin|>", "additional_special_tokens": MARKS}
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(row, tokenizer, **options):
    (encoded,) = Encoder(tokenizer, **options).encode([("here", read_example(row, "here"))])
    return encoded


def stretches(samples, tokenizer):
    """Return the text of each contiguous range of learned tokens."""
    found = []
    for sample in samples:
        current = []
        for token, label in zip([*sample.ids, 0], [*sample.labels, IGNORED], strict=True):
            if label != IGNORED:
                current.append(token)
            elif current:
                found.append(tokenizer.decode(current))
                current = []
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_call_and_the_answer_are_learned_and_the_tool_result_is_not(llama, name):
    tokenizer = tokenizer_of(llama, name)
    said = "" if name in ("llama", "deepseek", "harmony") else "Let me look."
    encoded = encode(row(said), tokenizer)
    call, answer = stretches(encoded.samples, tokenizer)
    written = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert call == FAMILIES[name][2].format(said=said, json=written, text=TEXT)
    assert answer.startswith(("Three metres.", "<|channel|>final<|message|>Three metres."))
    assert encoded.ended == 0
    sample = encoded.samples[0]  # before the call are the tokens of its prompt in transformers
    first = next(place for place, label in enumerate(sample.labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template(
        row()["messages"][:1], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert list(sample.ids[:first]) == tokenizer(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "harmony"])
def test_all_of_a_conversation_or_only_its_last_answer_can_be_learned(llama, name):
    tokenizer = tokenizer_of(llama, name)
    (sample,) = encode(row(), tokenizer, loss_on="all").samples
    assert list(sample.labels) == list(sample.ids)
    (last,) = encode(row(), tokenizer, loss_on="last_answer").samples
    (answer,) = stretches([last], tokenizer)
    assert "Three metres." in answer
    assert "depth" not in answer


def test_reasoning_before_a_call_is_learned(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}{% for c", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for c"
    )  # fmt: skip
    example = row()
    example["messages"][1]["reasoning_content"] = "a river"
    call, _ = stretches(encode(example, tokenizer).samples, tokenizer)
    assert call.startswith("<think>a river</think>\n<tool_call>\n")


@pytest.mark.parametrize(
    "more",
    [
        {"arguments": {"<|end|>": 1}},
        {"arguments": {"of": ["the <|end|>"]}},
        {"tools": [TOOL, TOOL | {"description": "up to the <|end|>"}]},
        {"tools": [TOOL, {"name": "depth", "parameters": {"type": "object", "properties": {"<|end|>": {}}}}]},
    ],
)
def test_special_tokens_in_calls_and_tools_are_reported(llama, tmp_path, more):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row())}\n{json.dumps(row(**more))}\n")
    data = load_data([path], tokenizer_of(llama, "chatml"), 999)
    assert (data.special, data.special_at) == (1, f"{path}, line 2: <|end|>")


NO_TOOLS = CHATML.replace("{% if tools %}", "{% if false %}")
NO_CALLS = CHATML.replace("m.tool_calls", "[]")
NO_RESULTS = CHATML.replace("<tool_response>{{ m.content }}", "<tool_response>")
NO_KEYS = CHATML.replace("f.arguments | tojson", "f.arguments.values() | list | tojson")


@pytest.mark.parametrize(
    ("template", "message", "loss_on"),
    [
        (NO_TOOLS, "leaves out the list of tools", "answers"),
        (NO_CALLS, "leaves out tool calls", "all"),
        (NO_KEYS, "leaves out a part of the tool calls in message 2: 'of'", "answers"),
        (NO_KEYS, "leaves out a part of the tool calls in message 2: 'of'", "all"),
        (NO_RESULTS, r"leaves out message 3 \(tool\)", "answers"),
        (NO_RESULTS, r"leaves out message 3 \(tool\)", "all"),
        (None, "which tools need", "answers"),
    ],
)
def test_a_template_that_omits_tools_calls_arguments_or_results_is_refused(llama, template, message, loss_on):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = template
    example = row(tools=(TOOL,) if template is NO_TOOLS else ({"name": "other"},) if template is None else ())
    with pytest.raises(DataError, match=f"^here: .*{message}") as raised:
        encode(example, tokenizer, loss_on=loss_on)
    assert raised.value.hint


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_ends_with_the_same_token_last_as_within_a_conversation(llama, name):
    """No other end token is added."""
    tokenizer = tokenizer_of(llama, name)
    example = row()
    whole, _ = stretches(encode(example, tokenizer).samples, tokenizer)
    example["messages"] = example["messages"][:2]
    encoded = encode(example, tokenizer)
    assert (stretches(encoded.samples, tokenizer), encoded.ended) == ([whole], 0)


def test_an_end_token_is_added_after_a_whole_call_that_has_none(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    tokenizer.chat_template = CHATML.replace(
        "<|im_end|>\n{% endfor %}{% if add", "{{ '' if m.tool_calls else '<|im_end|>\n' }}{% endfor %}{% if add"
    )
    example = row()
    example["messages"] = example["messages"][:2]
    encoded = encode(example, tokenizer)
    (call,) = stretches(encoded.samples, tokenizer)
    assert call.endswith("\n</tool_call><|im_end|>")
    assert encoded.ended == 1


EARLIER = (
    "{% if m.reasoning_content and not (messages[loop.index:] | rejectattr('tool_calls')"
    " | selectattr('role', 'equalto', 'assistant') | list) %}<think>{{ m.reasoning_content }}</think>{% endif %}"
)


@pytest.mark.parametrize("said", ["", "Let me look."])
def test_every_call_is_a_sample_if_the_template_omits_earlier_reasoning(llama, said):
    """As in gpt-oss, which omits reasoning before a call once an answer follows."""
    tokenizer = tokenizer_of(llama, "chatml")
    template = CHATML.replace("{{ m.content }}{% for c", EARLIER + "{{ m.content }}{% for c")
    template = template.replace("<tool_response>{{ m.content }}", "<tool_response>{{ m.content | tojson }}")
    first = "{% if loop.first and m.role == 'tool' %}{{ raise_exception('nobody asked') }}{% endif %}"
    tokenizer.chat_template = template.replace("{% for m in messages %}", "{% for m in messages %}" + first)
    example = row(said)
    example["messages"][1]["reasoning_content"] = "how deep?"
    samples = encode(example, tokenizer).samples
    call, answer = stretches(samples, tokenizer)
    assert len(samples) == 2
    assert call.startswith(f"<think>how deep?</think>{said}\n<tool_call>")
    assert call.endswith("</tool_call><|im_end|>")
    assert answer == "Three metres.<|im_end|>"
    example["messages"][1]["tool_calls"] = [{"function": example["messages"][1]["tool_calls"][0]}]
    for sample, turn in zip(samples, (1, 3), strict=True):
        first = next(place for place, label in enumerate(sample.labels) if label != IGNORED)
        asked = tokenizer.apply_chat_template(
            example["messages"][:turn], tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(sample.ids[:first]) == asked


ASKED_OTHERWISE = (  # the prompt ends in a mark that rendered answers lack, and a call ends with a token of its own
    CHATML.replace(
        "<|im_end|>\n{% endfor %}{% if add", "{{ '<|call|>' if m.tool_calls else '<|im_end|>\n' }}{% endfor %}{% if add"
    )
    .replace("assistant\n{% endif %}", "assistant\n<note>{% endif %}")
)  # fmt: skip


def test_a_call_is_learned_after_its_prompt_even_if_the_template_renders_it_differently(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    tokenizer.chat_template = ASKED_OTHERWISE
    encoded = encode(row(), tokenizer)
    call, answer = stretches(encoded.samples, tokenizer)
    assert (len(encoded.samples), encoded.ended) == (2, 0)
    assert (call[-20:], answer) == ("</tool_call><|call|>", "Three metres.<|im_end|>")
    assert "<note>\n<tool_call>" in tokenizer.decode(encoded.samples[0].ids)
    tokenizer.chat_template = ASKED_OTHERWISE.replace(
        "f.arguments | tojson", "f.arguments | tojson | replace('<b>', '')"
    )
    with pytest.raises(DataError, match="leaves out a part of the tool calls in message 2: 'the "):
        encode(row(), tokenizer)


def test_a_template_that_omits_a_single_tool_is_refused(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    example = row(tools=(TOOL, {"name": "width"}))
    texts = [tokenizer.decode(sample.ids) for sample in encode(example, tokenizer).samples]
    assert ['"name": "width"' in text for text in texts] == [True]
    tokenizer.chat_template = CHATML.replace("for t in tools", "for t in tools[:1]")
    with pytest.raises(DataError, match="leaves out the tool width"):
        encode(example, tokenizer)


def test_parallel_calls_and_nested_arguments_are_learned(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    example = row()
    example["messages"][1]["tool_calls"] = [
        {"name": "depth", "arguments": {"of": ["Rhine", {"at": "Köln"}], "in": 3.5, "now": True}},
        {"name": "depth", "arguments": {}},
    ]
    call, _ = stretches(encode(example, tokenizer).samples, tokenizer)
    assert call.count("<tool_call>") == 2
    assert '{"of": ["Rhine", {"at": "Köln"}], "in": 3.5, "now": true}' in call
    lost = tokenizer_of(llama, "chatml")
    lost.chat_template = CHATML.replace("f.arguments | tojson", "f.arguments | tojson | replace('Köln', '')")
    with pytest.raises(DataError, match="leaves out a part of the tool calls in message 2: 'Köln'"):
        encode(example, lost)


LOSSES = {  # template, content, reasoning, number of calls; what is said to be missing
    "calls after the first": (
        CHATML.replace("m.tool_calls", "(m.tool_calls or [])[:1]"), "", "", 2, "the tool calls in message 2: 'depth'",
    ),
    "calls beside content": (
        CHATML.replace("in m.tool_calls", "in ([] if m.content else m.tool_calls)"), "depth", "", 1,
        "the tool calls in message 2: 'depth'",
    ),
    "content beside calls": (
        CHATML.replace("{{ m.content }}{% for c", "{{ '' if m.tool_calls else m.content }}{% for c"), "Let me look.",
        "", 1, "message 2: 'Let me look.'",
    ),
    "calls after reasoning": (
        CHATML.replace("{% for c in m.tool_calls", "{{ m.thinking }}{% for c in ([] if m.thinking else m.tool_calls)"),
        "", f"call depth of {TEXT}", 1, "the tool calls in message 2: 'depth'",
    ),
    "arguments that are true": (XML.replace(" else v | tojson", ""), "", "", 1, "the tool calls in message 2: 'true'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("weight", [1, 0])
def test_omissions_are_found_even_if_the_same_words_occur_elsewhere(llama, kind, weight):
    template, said, thought, count, lost = LOSSES[kind]
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = template
    example = row(said, ARGUMENTS | ({"deep": True} if "true" in kind else {}))
    example["messages"][0]["content"] += f" depth of {TEXT} deep true Let me look."
    message = example["messages"][1]
    message |= {"weight": weight, "reasoning_content": thought}
    message["tool_calls"] *= count
    with pytest.raises(DataError, match=f"(?m)^here: the chat template leaves out a part of {lost}$") as raised:
        encode(example, tokenizer)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("template", "tools", "kind"),
    [(NO_TOOLS, [TOOL], "the list of tools"), (NO_CALLS, [], "tool calls")],
    ids=["tools", "calls"],
)
def test_of_several_omissions_the_most_general_is_named(llama, template, tools, kind):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = template.replace("m.tool_calls", "[]").replace("<tool_response>{{ m.content }}", "")
    example = row("x", {"metres": 3, "deep": True, "of": None}, tools)
    example["messages"][1]["tool_calls"] *= 2
    with pytest.raises(DataError, match=f"(?m)^here: the chat template leaves out {kind}$"):
        encode(example, tokenizer)


def test_a_template_that_prints_arguments_directly_prints_json(llama):
    tokenizer = tokenizer_of(llama, "chatml")
    tokenizer.chat_template = CHATML.replace("f.arguments | tojson", "f.arguments")
    call, _ = stretches(encode(row(arguments={"of": "Rhine", "now": True}), tokenizer).samples, tokenizer)
    assert '"arguments": {"of": "Rhine", "now": true}}' in call


def test_missing_arguments_in_a_table_are_not_filled_in(llama, tmp_path):
    """In Parquet, every object of a column has the keys of all its objects."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row(arguments={"of": "Rhine"}), row(arguments={"at": "Köln"})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = tokenizer_of(llama, "chatml")
    data = load_data([tmp_path / "rows.parquet"], tokenizer, 900)
    calls = [stretches([sample], tokenizer)[0] for sample in data.samples]
    assert ['"arguments": {"of": "Rhine"}}' in calls[0], '"arguments": {"at": "Köln"}}' in calls[1]] == [True, True]


def test_a_call_is_not_counted_as_an_empty_answer(llama, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()))
    assert load_data([path], tokenizer_of(llama, "chatml"), 900).empty == 0


def test_a_templates_refusal_of_parallel_calls_is_reported(llama):
    example = row()
    example["messages"][1]["tool_calls"] *= 2
    with pytest.raises(DataError, match=r"here: the chat template refuses .*one call at a time"):
        encode(example, tokenizer_of(llama, "llama"))


def test_rows_with_and_without_tools_are_read_from_a_file(llama, tmp_path):
    tokenizer = tokenizer_of(llama, "chatml")
    plain = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in (row(), plain, plain | {"tools": [TOOL]})))
    data = load_data([path], tokenizer, 900)
    assert [source.unused for source in data.sources] == [()]
    assert [len(stretches([sample], tokenizer)) for sample in data.samples] == [2, 1, 1]
    assert len(data.samples[2].ids) > len(data.samples[1].ids)


def test_a_separate_template_for_tools_is_used_for_rows_with_tools(llama):
    """As in Hermes 2 Pro, whose default template ignores calls."""
    tokenizer = tokenizer_of(llama, "chatml")
    plain = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ '' if tools | length }}" + CHATML}
    call = FAMILIES["chatml"][2].format(said="", json=json.dumps(ARGUMENTS, ensure_ascii=False))
    found = stretches(encode(row(), tokenizer).samples, tokenizer)
    assert [found[0].replace("\\u003c", "<").replace("\\u003e", ">"), found[1]] == [call, "Three metres.<|im_end|>"]
    with pytest.raises(DataError, match="leaves out tool calls"):
        encode(row() | {"tools": []}, tokenizer)


@pytest.mark.parametrize("is_alone", [True, False])
def test_instructions_that_a_template_for_tools_puts_after_answers_are_not_learned(llama, is_alone):
    """As Command R+'s, which puts no end token after calls, and cannot be rendered without tools."""
    tokenizer = tokenizer_of(llama, "chatml")
    plain, instructions = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "Answer, or call depth of:"
    template = (
        "{{ tools[0].function.name.strip() }}{% for m in messages %}<|user|><|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}\n]\n{% endfor %}"
        "{{ '<|im_end|>' if not m.tool_calls }}{% endfor %}<|user|><|im_start|>system\n" + instructions + "<|im_end|>"
        "{% if add_generation_prompt %}<|user|><|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template if is_alone else {"default": plain, "tool_use": template}
    *asked, given, answer = row(arguments={"of": "Rhine"})["messages"]
    said = {"role": "assistant", "content": "Which river?"}
    conversation = [*row()["messages"][:1], said, *asked, given, answer]
    samples = encode({"messages": conversation, "tools": [TOOL]}, tokenizer).samples
    assert stretches(samples, tokenizer) == [
        "Which river?<|im_end|>", '<|call|>depth{"of": "Rhine"}\n]<|im_end|>', "Three metres.<|im_end|>"
    ]  # fmt: skip
    for sample, turn in zip(samples, (1, 3, 5), strict=True):
        prompt = conversation_ids(read_example({"messages": conversation}, "here").messages[:turn], tokenizer, TOOLS)
        assert list(sample.ids[: len(prompt)]) == prompt


@pytest.mark.parametrize("opening", ["", "<|im_start|>assistant\n"])
def test_a_template_that_ends_a_question_only_once_it_is_answered_is_refused_for_calls_alone(llama, opening):
    tokenizer = tokenizer_of(llama, "chatml")
    asks = "{% if add_generation_prompt %}" + opening + "{% endif %}"
    late = CHATML.rpartition("<|im_end|>")
    tokenizer.chat_template = late[0] + "{% if m.role == 'assistant' or not loop.last %}<|im_end|>\n{% endif %}"
    tokenizer.chat_template += "{% endfor %}" + asks
    example = row()
    del example["messages"][2:]
    with pytest.raises(DataError, match="ends a question only once it is answered") as refused:
        encode(example, tokenizer)
    assert "How deep is it?" in str(refused.value)
    tokenizer.chat_template = late[0] + "<|im_end|>\n{% endfor %}" + asks
    assert encode(example, tokenizer)
