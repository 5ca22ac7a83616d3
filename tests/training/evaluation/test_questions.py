"""Questions are grouped, chosen by the seed, and preceded by examples that leave room for them."""

import json

import pytest

from adaptkit.data.dataset import load_data
from adaptkit.data.encoding import IGNORED
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError
from adaptkit.training.evaluation.questions import (
    Question,
    choose,
    load_data_with_shots,
    prompt_with_shots,
    read_questions,
    read_shots,
    with_shots,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def test_rows_that_ask_the_same_are_one_question_with_all_their_answers(tmp_path):
    first = write(tmp_path / "a.jsonl", [
        {"instruction": "define", "context": "noun", "output": "x"},
        {"instruction": "define", "output": "y"},
        {"messages": [user("a"), said("b"), user("c"), said("d"), user("and no more")]},
    ])  # fmt: skip
    second = write(tmp_path / "b.jsonl", [
        {"prompt": "define\n\nnoun", "completion": "z"},
        {"prompt": "define\n\nnoun", "completion": "<think>\na thought\n</think>\n\nx"},
        {"messages": [user("a"), said("other"), user("c"), said("e")]},
    ])  # fmt: skip
    assert read_questions([first, second]) == (
        Question((user("define\n\nnoun"),), ("x", "z")),
        Question((user("define"),), ("y",)),
        Question((user("a"), said("b"), user("c")), ("d",)),
        Question((user("a"), said("other"), user("c")), ("e",)),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "define"}, "line 2: no column output"),
        ({"instruction": "define", "output": "  "}, "line 2: the answer is empty"),
        ({"messages": [said("hello")]}, "line 2: an answer without a question"),
        ({"messages": [user("hello")]}, "line 2: no assistant message"),
    ],
)
def test_a_row_without_question_or_reference_is_named(row, message, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, row])
    with pytest.raises(DataError, match=message):
        read_questions([path])


def test_the_choice_depends_on_the_seed_and_a_larger_one_includes_a_smaller_one():
    questions = [Question((user(str(number)),), ("x",)) for number in range(40)]
    ten, twenty = choose(questions, 10, 7), choose(questions, 20, 7)
    assert len({question.messages[0]["content"] for question in ten}) == 10
    assert all(question in twenty for question in ten)
    assert list(ten) == [question for question in questions if question in ten]
    assert choose(questions, 10, 8) != ten
    assert choose(questions, None, 7) == choose(questions, 40, 7) == tuple(questions)


def test_questions_are_never_used_as_examples(tmp_path):
    rows = [{"instruction": f"ask {number}", "output": "answer"} for number in range(12)]
    path = write(tmp_path / "rows.jsonl", [*rows, *rows])
    questions = [Question((user(f"ask {number}"),), ("answer",)) for number in range(0, 12, 2)]
    found = read_shots([path], 6, 0, questions)
    assert sorted(shot[0]["content"] for shot in found) == sorted(f"ask {number}" for number in range(1, 12, 2))
    assert read_shots([path], 3, 0, questions) == found[:3]
    with pytest.raises(DataError, match="expected 7 examples apart from the questions, found 6 rows"):
        read_shots([path], 7, 0, questions)


SYSTEM = {"role": "system", "content": "be brief"}
LONGER = [user("one"), said("1"), user("two"), said("2")]


@pytest.mark.parametrize(
    ("question", "example"),
    [
        ([SYSTEM, user("one")], [SYSTEM, user("one"), said("1")]),
        ([user("one")], [SYSTEM, user("one"), said("1")]),
        ([user("one")], LONGER),
        (LONGER[:-1], LONGER[:2]),
    ],
    ids=["of a system", "with another system", "that goes on", "that a question begins with"],
)
def test_an_example_never_contains_the_answer_to_a_question(question, example, tmp_path):
    """Examples are used without their system message, and a question's earlier answers carry loss, too."""
    others = [{"messages": [user(f"ask {number}"), said("answer"), *LONGER]} for number in range(3)]
    path = write(tmp_path / "rows.jsonl", [{"messages": example}, *others])
    found = read_shots([path], 3, 0, [Question(tuple(question), ("1",))])
    assert sorted(shot[0]["content"] for shot in found) == ["ask 0", "ask 1", "ask 2"]
    with pytest.raises(DataError, match="expected 4 examples apart from the questions, found 3 rows"):
        read_shots([path], 4, 0, [Question(tuple(question), ("1",))])


def test_examples_come_after_the_system_message_as_turns_of_the_chat():
    system, shots = {"role": "system", "content": "be brief"}, [(user("1"), said("one")), (user("2"), said("two"))]
    assert with_shots([system, user("3")], shots) == [system, *shots[0], *shots[1], user("3")]
    assert with_shots([user("3")], shots[1:]) == [*shots[1], user("3")]


def test_the_first_examples_are_dropped_if_not_all_fit(llama):
    tokenizer = load_tokenizer(llama)
    shots = [(user("what is one"), said("a number")), (user("what is two"), said("another"))]
    whole, count = prompt_with_shots([user("three")], shots, tokenizer, None)
    assert (tokenizer.decode(whole).count("what is"), count) == (2, 2)
    one, count = prompt_with_shots([user("three")], shots, tokenizer, len(whole) - 1)
    assert ("what is one" in tokenizer.decode(one), "what is two" in tokenizer.decode(one), count) == (False, True, 1)
    none, count = prompt_with_shots([user("three")], shots, tokenizer, len(one) - 1)
    assert ("what is" in tokenizer.decode(none), count) == (False, 0)
    assert prompt_with_shots([user("three")], shots, tokenizer, 3) == (none, 0)


def test_an_answer_of_weight_zero_is_not_a_reference(tmp_path):
    row = {"messages": [user("one"), said("right"), user("two"), said("wrong") | {"weight": 0}]}
    (question,) = read_questions([write(tmp_path / "rows.jsonl", [row])])
    assert (question.messages, question.references) == ((user("one"),), ("right",))


def learned_from_the_end(sample):
    """Return the tokens with loss, with their distances from the end: examples are put before them."""
    places = enumerate(sample.labels, -len(sample.labels))
    return [(place, label) for place, label in places if label != IGNORED]


def test_loss_with_examples_is_on_the_same_tokens_as_without(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    path = write(tmp_path / "rows.jsonl", [
        {"instruction": "one", "output": "first answer"},
        {"messages": [user("two"), said("second"), user("three"), said("third one")]},
    ])  # fmt: skip
    shots = [(user("0"), said("first answer"))] * 2
    alone = load_data([path], tokenizer, 1024)
    found, fewer = load_data_with_shots([path], tokenizer, shots, 1024, None)
    assert fewer == 0
    for with_them, without in zip(found.samples, alone.samples, strict=True):
        assert len(with_them.ids) > len(without.ids)
        assert len(with_them.ids) == len(with_them.labels)
        assert learned_from_the_end(with_them) == learned_from_the_end(without) != []
    room = len(found.samples[0].ids) - 1
    tight, fewer = load_data_with_shots([path], tokenizer, shots, 1024, room)
    assert fewer >= 1
    assert all(len(sample.ids) <= room for sample in tight.samples)


@pytest.mark.parametrize("max_length", [1024, 40])
def test_examples_do_not_change_the_counts_and_notes_about_the_rows(llama, tmp_path, max_length):
    """Such as answers with an end token, unused fields, the longest sample, and truncated and dropped samples."""
    tokenizer = load_tokenizer(llama)
    path = write(tmp_path / "rows.jsonl", [
        {"instruction": "one", "output": f"first{tokenizer.eos_token}", "topic": "numbers"},
        {"instruction": "two", "output": "second " * 30},
        {"messages": [user("why " * 60), said("third")]},
        {"messages": [user("four"), said("fourth"), user("unanswered")]},
    ])  # fmt: skip
    alone = load_data([path], tokenizer, max_length)
    found, _ = load_data_with_shots([path], tokenizer, [(user("0"), said("zero"))], max_length, None)
    for name in ("truncated", "dropped", "longest", "longest_at", "twice", "twice_at", "special", "empty", "split"):
        assert getattr(found, name) == getattr(alone, name), name
    assert [(s.name, s.unused) for s in found.sources] == [(s.name, s.unused) for s in alone.sources]
    assert (found.twice, bool(found.sources[0].unused)) == (1, True)
    assert found.has_conversations


def test_a_file_of_one_row_can_be_given_twice(llama, tmp_path):
    path = write(tmp_path / "row.jsonl", [{"instruction": "one", "output": "first"}])
    found, _ = load_data_with_shots([path] * 2, load_tokenizer(llama), [(user("0"), said("zero"))], 1024, None)
    assert len(found.samples) == 2


def test_a_question_includes_its_tools_and_a_call_is_not_a_reference(llama, tmp_path):
    tool = {"name": "depth", "parameters": {"type": "object", "properties": {}}}
    call = {"role": "assistant", "tool_calls": [{"name": "depth", "arguments": {"of": "Rhine"}}]}
    asked = [user("How deep?"), call, {"role": "tool", "content": "3"}]
    rows = [{"messages": [*asked, said("3 m")], "tools": [tool]}, {"messages": [*asked, said("3 m")]}]
    with_tools, without = read_questions([write(tmp_path / "a.jsonl", rows)])
    assert (len(with_tools.tools), without.tools, with_tools.references) == (1, (), ("3 m",))
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    texts = [
        tokenizer.decode(prompt_with_shots(question.messages, (), tokenizer, None, question.tools)[0])
        for question in (with_tools, without)
    ]
    assert [('"parameters"' in text, "Rhine" in text) for text in texts] == [(True, True), (False, True)]
    with pytest.raises(DataError, match="line 1: the answer calls a tool") as raised:
        read_questions([write(tmp_path / "b.jsonl", [{"messages": asked[:2], "tools": [tool]}])])
    assert raised.value.hint
