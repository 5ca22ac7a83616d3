"""Rows of every layout are read; others are refused with an error that names the problem."""

import functools
import json
import re
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.data.conversation import check_not_excluded, read_example
from adaptkit.errors import DataError

ASKED = {"role": "user", "content": "Name it\n\na river"}
ANSWERED = {"role": "assistant", "content": "the Rhine"}
CHAT = [ASKED, ANSWERED]
DEEP = [{"name": "f", "parameters": functools.reduce(lambda inner, _: {"a": inner}, range(500), {})}]


def parts_of(*texts):
    return [{"type": "text", "text": text} for text in texts]


SHARED = [{"from": "human", "value": "Name it\n\na river"}, {"from": "gpt", "value": "the Rhine"}]


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("instruction", {"instruction": "Name it", "context": "a river", "output": "the Rhine"}),
        ("instruction", {"instruction": "Name it", "input": "a river", "output": "the Rhine"}),
        ("instruction", {"instruction": "Name it\n\na river", "input": "", "response": "the Rhine"}),
        ("instruction", {"instruction": "", "input": "Name it\n\na river", "output": "the Rhine"}),
        ("question", {"question": "Name it\n\na river", "answer": "the Rhine"}),
        ("prompt", {"prompt": "Name it\n\na river", "completion": "the Rhine"}),
        ("prompt", {"prompt": [ASKED], "completion": [ANSWERED]}),
        ("messages", {"messages": CHAT}),
        ("messages", {"messages": SHARED}),
        ("conversations", {"conversations": SHARED}),
        ("conversations", {"conversations": CHAT, "text": None}),
        ("conversation", {"conversation": CHAT, "conversation_id": "of lmsys"}),
        ("conversation", {"conversation": SHARED}),
        ("input", {"input": "Name it\n\na river", "output": "the Rhine"}),
        ("query", {"query": "Name it", "context": "a river", "response": "the Rhine"}),
        ("problem", {"problem": "Name it\n\na river", "solution": "the Rhine"}),
        ("inputs", {"inputs": "Name it\n\na river", "targets": "the Rhine"}),
    ],
)
def test_all_layouts_give_the_same_conversation(layout, row):
    example = read_example(row, "here")
    assert (example.layout, list(example.messages), example.learned, example.text) == (layout, CHAT, (1,), None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": None}, "here: answer is null"),
        ({"question": "a", "answer": None, "response": "b"}, None),
        ({"question": "a", "note": None}, "here: no column output or response or completion or answer"),
        ({"input": "a", "output": None}, "here: output is null"),
        ({"conversations": None}, "here: conversations is null"),
        ({"text": None}, "here: text is null"),
    ],
)
def test_a_null_column_is_named_unless_another_one_has_the_text(row, message):
    if message is None:
        assert read_example(row, "here").messages[1]["content"] == "b"
        return
    with pytest.raises(DataError) as caught:
        read_example(row, "here")
    assert caught.value.message == message
    may_be_empty = "null" in message and not {"messages", "conversations", "text"} & row.keys()
    assert ('write ""' in caught.value.hint) == may_be_empty


def test_a_null_column_of_a_given_layout_is_named():
    with pytest.raises(DataError, match="here: text is null"):
        read_example({"text": None}, "here", "text")


OTHERS = {
    "query": "SELECT name",
    "problem": "9",
    "inputs": "x",
    "solution": "x",
    "targets": "x",
    "conversation": SHARED,
}


@given(st.sampled_from([{"instruction": "Name it", "input": "a river", "output": "the Rhine"},
                        {"question": "x", "answer": "y"}, {"prompt": [ASKED], "completion": [ANSWERED]},
                        {"messages": CHAT}, {"conversations": SHARED}, {"text": "x"}]),
       st.sets(st.sampled_from(sorted(OTHERS))))  # fmt: skip
def test_ambiguous_layout_names_are_plain_columns_if_the_row_has_an_unambiguous_one(row, names):
    assert read_example({name: OTHERS[name] for name in names} | row, "here") == read_example(row, "here")


@given(
    st.sets(st.sampled_from(["role", "message_id", "parent_id", "lang"])), st.sampled_from(["prompter", "assistant"])
)
def test_a_single_message_of_a_tree_is_not_read_as_plain_text(names, role):
    row = {"text": "x", **dict.fromkeys(names, role), "rank": None}  # OASST1's
    plain = read_example(row, "here", "text")
    if "role" in names and {"message_id", "parent_id"} & names:
        with pytest.raises(
            DataError, match=r"^here: text beside role and (message|parent)_id is a single message"
        ) as raised:
            read_example(row, "here")
        assert "list of messages" in raised.value.hint
    else:
        assert read_example(row, "here") == plain
    assert read_example(row | {"messages": CHAT}, "here", "messages").messages


CALL = {"type": "function", "function": {"name": "depth", "arguments": {"of": "Rhine"}}}
ASSISTANT = {"role": "assistant", "content": ""}
SAID = '{"name": "depth", "arguments": {"of": "Rhine"}}'


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}),
        ({"role": "assistant", "tool_calls": [CALL["function"]]}, {"role": "tool", "content": "3"}),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "depth", "arguments": '{"of": "Rhine"}'}}]},
         {"role": "tool", "content": "3"}),
        ({**ASSISTANT, "tool_calls": f"[{SAID}]"}, {"role": "tool", "content": "3"}),
        ({**ASSISTANT, "function_call": CALL["function"]}, {"role": "function", "content": "3"}),
        ({"from": "function_call", "value": SAID}, {"from": "observation", "value": "3"}),
        ({"role": "tool_call", "content": SAID}, {"role": "tool_response", "content": "3"}),
        ({"from": "function_call", "value": f"[{SAID}]"}, {"from": "tool", "value": "3"}),
        ({"from": "function_call", "value": CALL["function"]}, {"from": "observation", "value": "3"}),
        ({**ASSISTANT, "tool_calls": [CALL], "function_call": CALL["function"]}, {"role": "tool", "content": "3"}),
    ],
)  # fmt: skip
def test_all_notations_of_tool_calls_give_the_same_conversation(answer, back):
    example = read_example({"messages": [ASKED, answer, back, ANSWERED]}, "here")
    assert list(example.messages) == [
        ASKED,
        ASSISTANT | {"tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        ANSWERED,
    ]
    assert (example.learned, example.tools, example.ignored) == ((1, 3), (), frozenset())


@given(st.lists(st.sampled_from(["call", "said", "asked", "gave"]), max_size=6), st.booleans())
def test_ms_swift_calls_are_merged_with_the_calls_and_answer_before_them(kinds, is_learned):
    """As ms-swift passes them to templates of transformers."""
    mark = {} if is_learned else {"loss": False}
    of_its = {
        "call": {"role": "tool_call", "content": SAID} | mark,
        "said": {"role": "assistant", "content": "so"} | mark,
        "asked": {"role": "user", "content": "well?"},
        "gave": {"role": "tool_response", "content": "3"},
    }
    turns, expected = [of_its[kind] for kind in kinds], []
    for kind, before in zip(kinds, [None, *kinds], strict=False):
        if kind == "call" and before in ("call", "said"):
            last = expected[-1]
            expected[-1] = last | {"tool_calls": [*last.get("tool_calls", []), CALL]}
        else:
            role = {"call": "assistant", "said": "assistant", "asked": "user", "gave": "tool"}[kind]
            given = {"content": "", "tool_calls": [CALL]} if kind == "call" else {"content": of_its[kind]["content"]}
            expected.append({"role": role} | given | (mark if role == "assistant" else {}))
    rest = [ASKED, ANSWERED]
    row, whole = {"messages": [*turns, *rest]}, {"messages": [*expected, *rest]}
    assert read_example(row, "here") == read_example(whole, "here")


def test_a_call_whose_loss_mark_differs_from_the_answer_before_it_is_refused():
    for marks in ({}, {"loss": False}), ({"loss": False}, {}):
        said, call = (
            {"role": role, "content": SAID} | mark for role, mark in zip(("assistant", "tool_call"), marks, strict=True)
        )
        with pytest.raises(DataError, match=r"^here: message 3 of messages: the call and the answer or call before it"):
            read_example({"messages": [ASKED, said, call]}, "here")


@given(
    st.sampled_from(["assistant", "tool_call"]),
    st.sampled_from(["", "how deep?"]),
    st.sampled_from(["", "how deep?", "so deep"]),
    st.sampled_from(["reasoning_content", "reasoning", "thinking"]),
)
def test_reasoning_of_a_call_that_is_merged_with_the_message_before_it_is_not_lost(role, first, then, name):
    said, call = {"role": role, "content": SAID, name: first}, {"role": "tool_call", "content": SAID, name: then}
    row = {"messages": [ASKED, said, call]}
    if then in ("", first):
        assert read_example(row, "here").messages[1].get("reasoning_content", "") == first
    else:
        with pytest.raises(DataError, match=r"^here: message 3 of messages: the call .*only the call has this"):
            read_example(row, "here")


@given(st.sampled_from([("developer", "system"), ("model", "assistant")]))
def test_roles_developer_and_model_mean_system_and_assistant(names):
    name, role = names
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    renamed = [message | {"role": name} if message["role"] == role else message for message in chat]
    assert read_example({"messages": renamed}, "here") == read_example({"messages": chat}, "here")


FUNCTION = {"name": "depth", "description": "of a river", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("tools", [[FUNCTION], [{"type": "function", "function": FUNCTION}], json.dumps([FUNCTION])])
def test_tools_of_a_row_are_read(tools):
    example = read_example({"messages": CHAT, "tools": tools, "id": 1}, "here")
    assert example.tools == ({"type": "function", "function": FUNCTION},)
    assert example.columns == {"messages", "tools"}
    for none in (None, [], "", "[]", "null"):
        assert read_example({"messages": CHAT, "tools": none}, "here").tools == ()


@given(st.sampled_from([{}, {"tools": None}, {"tools": []}]), st.booleans())
def test_functions_next_to_messages_are_read_as_tools(more, is_wrapped):
    functions = [{"type": "function", "function": FUNCTION} if is_wrapped else FUNCTION]
    row = {"messages": CHAT, "functions": functions, "parallel_tool_calls": False} | more
    example = read_example(row, "here")
    assert example.tools == ({"type": "function", "function": FUNCTION},)
    assert "functions" in example.columns
    with pytest.raises(DataError, match="functions is not a list of functions"):
        read_example(row | {"functions": ["def depth(): ..."]}, "here")
    other = {"instruction": "x", "output": "y", "functions": ["def depth(): ..."]}  # an unrelated column
    assert (read_example(other, "here").tools, read_example(other, "here").columns) == ((), {"instruction", "output"})
    with_both = read_example(row | {"tools": functions}, "here")
    assert (with_both.tools, "functions" in with_both.columns) == (example.tools, False)


def test_an_object_as_the_result_of_a_tool_becomes_json_text():
    back = {"role": "tool", "content": {"depth": [3, "Köln"]}}
    example = read_example({"messages": [ASKED, ASSISTANT | {"tool_calls": [CALL]}, back, ANSWERED]}, "here")
    assert example.messages[2] == {"role": "tool", "content": '{"depth": [3, "Köln"]}'}


def test_empty_tool_calls_are_ignored():
    for none in ([], None, "", "null", "[]"):
        example = read_example({"messages": [ASKED, ANSWERED | {"tool_calls": none}]}, "here")
        assert list(example.messages) == CHAT


def test_ids_names_and_reasoning_of_calls_and_results_are_read():
    call, back = (
        CALL | {"id": "abcdefghi"},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "depth"},
    )
    answer = ASSISTANT | {"tool_calls": [call | {"index": 0}], "reasoning_content": "how deep?"}
    example = read_example({"messages": [ASKED, answer, back | {"ok": 1}, ANSWERED]}, "here")
    assert example.messages[1] == ASSISTANT | {"tool_calls": [call], "reasoning_content": "how deep?"}
    assert example.messages[2] == back
    assert example.ignored == {"ok"}


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]),
                          st.lists(st.text(st.characters(codec="utf-8")), min_size=1))))  # fmt: skip
def test_text_parts_are_joined(turns):
    turns = [*turns, ("assistant", ["<think>a</think>", "the ", "Rhine"])]
    for key, role_key in (("content", "role"), ("value", "from")):
        in_parts = [{role_key: role, key: parts_of(*said)} for role, said in turns]
        whole = [{role_key: role, key: "".join(said)} for role, said in turns]
        assert read_example({"messages": in_parts}, "here") == read_example({"messages": whole}, "here")
        in_parts = [{role_key: "user", key: "x"}, *in_parts]
        assert read_example({"prompt": in_parts[:-1], "completion": in_parts[-1:]}, "here").messages[-1] == {
            "role": "assistant", "content": "<think>a</think>the Rhine"
        }  # fmt: skip


def test_other_keys_of_text_parts_are_reported_and_calls_may_have_no_parts():
    marked = [part | {"cache_control": {}, "image": None} for part in parts_of("the ", "Rhine")]
    assert read_example({"messages": [ASKED, ANSWERED | {"content": marked}]}, "here").ignored == {"cache_control"}
    image = [{"type": "image", "image": "x"}]  # a tool may return anything
    row = {"messages": [ASKED, {**ASSISTANT, "content": [], "tool_calls": [CALL]}, {"role": "tool", "content": image}]}
    assert [message["content"] for message in read_example(row, "here").messages[1:]] == ["", json.dumps(image)]


def test_the_columns_that_were_used_are_reported():
    row = {"id": 1, "system": "Be brief.", "instruction": "x", "input": "", "output": "y", "source": "web"}
    assert read_example(row, "here").columns == {"system", "instruction", "input", "output"}


def test_null_fields_of_a_message_count_as_absent():
    """Data converted between formats have the fields of both, as Parquet does."""
    filled = [
        {"from": "human", "value": "How deep?", "role": None, "content": None, "tool_calls": None},
        {"role": "assistant", "content": None, "from": None, "value": None, "tool_calls": [
            {"function": {"name": "depth", "arguments": None, "parameters": {"of": "Rhine"}}}]},
        {"from": "observation", "value": "3", "role": None, "content": None, "name": None},
        {"role": "assistant", "content": "Three", "from": None, "value": None, "weight": None},
    ]  # fmt: skip
    bare = [{name: value for name, value in message.items() if value is not None} for message in filled]
    example = read_example({"conversations": filled}, "here")
    assert example == read_example({"conversations": bare}, "here")
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"of": "Rhine"}
    assert not example.ignored


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "instruction": "x", "output": "y"},
        {"system_prompt": "Be brief.", "question": "x", "response": "y", "id": "flan.1"},  # OpenOrca's
        {"system": "", "system_prompt": "Be brief.", "messages": [{"from": "user", "value": "x"},
                                                                  {"from": "gpt", "value": "y"}]},
        {"system_prompt": "a copy of it", "messages": [{"from": "system", "value": "Be brief."},
                                                       {"from": "user", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"messages": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "x"},
                      {"from": "gpt", "value": "y"}]},
    ],
)  # fmt: skip
def test_a_system_prompt_comes_first(row):
    example = read_example(row, "here")
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "Be brief."), ("user", "x"), ("assistant", "y"),
    ]  # fmt: skip
    assert example.learned == (2,)


def test_answers_in_a_prompt_or_of_weight_zero_are_not_learned():
    few_shot = {"prompt": [*CHAT, ASKED], "completion": [ANSWERED]}
    assert read_example(few_shot, "here").learned == (3,)
    weighted = {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"weight": 1}, ASKED, ANSWERED]}
    assert read_example(weighted, "here").learned == (3, 5)


MARKS = [
    {"weight": 0}, {"weight": 1}, {"loss": False}, {"loss": True}, {"train": False}, {"train": True},
    {"loss_scale": 0.0}, {"loss_scale": 1.0}, {"training": False}, {"training": True},
]  # fmt: skip
MASKED = [{"masked": True}, {"masked": 0}]
"""Of torchtune, with the opposite meaning."""


@given(
    st.lists(st.lists(st.sampled_from([*MARKS, *MASKED, {"loss": None, "masked": None, "weight": None}]), max_size=3))
)
def test_marks_of_other_trainers_exclude_answers_and_contradictory_ones_are_refused(answers):
    messages, learned = [], []
    for marks in answers:
        said = {key: value for mark in marks for key, value in mark.items()}
        values = {bool(value) != (name == "masked") for name, value in said.items() if value is not None}
        if len(values) > 1:
            with pytest.raises(DataError, match=r"message 2 of messages: .*contradict each other"):
                read_example({"messages": [ASKED, ANSWERED | said]}, "here")
            continue
        messages += [ASKED, ANSWERED | said]
        learned += [len(messages) - 1] * (False not in values)
    example = read_example({"messages": [*messages, ASKED, ANSWERED]}, "here")
    assert (example.learned, example.ignored) == ((*learned, len(messages) + 1), frozenset())


def test_a_mark_to_learn_a_question_is_ignored_and_reported():
    for mark in MARKS:
        example = read_example({"messages": [ASKED | mark, ANSWERED]}, "here")
        assert (example.learned, example.ignored) == ((1,), {name for name, value in mark.items() if value})
    for mark in MASKED:
        example = read_example({"messages": [ASKED | mark, ANSWERED]}, "here")
        assert (example.learned, example.ignored) == ((1,), {name for name, value in mark.items() if not value})


@given(st.sampled_from([0, 1, True, False]), st.booleans())
def test_a_mask_is_refused_as_ambiguous_if_boolean_and_otherwise_reported(value, is_answer):
    def row(mask):
        asked, answered = (ASKED, ANSWERED | {"mask": mask}) if is_answer else (ASKED | {"mask": mask}, ANSWERED)
        return {"messages": [asked, answered]}

    with pytest.raises(DataError, match=r"message [12] of messages: has mask, which excludes an answer .* in others"):
        read_example(row(value), "here")
    assert read_example(row("[MASK]"), "here").ignored == {"mask"}
    assert read_example(row(None), "here").learned == (1,)


PAIRS = st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2))


@given(PAIRS, st.booleans(), st.sampled_from(["instruction", "question", "prompt", "query"]))
def test_history_holds_earlier_turns_whose_answers_are_learned(history, has_system, layout):
    system = {"system": "Be brief."} if has_system else {}
    row = {layout: "x", "context": "", "output": "y", "history": history} | system
    turns = [{"role": "system", "content": "Be brief."}] * has_system
    for asked, said in [*history, ["x", "y"]]:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    example, whole = read_example(row, "here"), read_example({"messages": turns}, "here")
    assert (example.messages, example.learned) == (whole.messages, whole.learned)
    assert example.columns == row.keys()
    none = [read_example(row | {"history": nothing}, "here").messages for nothing in ([], "", "[]", None)]
    assert none == [example.messages[:has_system] + example.messages[-2:]] * 4


@given(st.sampled_from(["instruction", "question", "prompt", "problem"]),
       st.sampled_from(["reasoning_content", "reasoning", "thinking"]), st.text(st.characters(codec="utf-8")),
       st.sampled_from(["y", "<think>so</think>y"]))  # fmt: skip
def test_reasoning_in_a_column_is_read_like_reasoning_in_a_message(layout, name, reasoning, answer):
    row = {layout: "x", "answer": answer, name: reasoning}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer, name: reasoning}]
    try:
        whole = read_example({"messages": messages}, "here")
    except DataError:  # the answer contains different reasoning
        with pytest.raises(DataError, match=r"^here: has reasoning in more than one place"):
            read_example(row, "here")
        return
    example = read_example(row, "here")
    assert (example.messages, example.learned, example.columns) == (whole.messages, whole.learned, row.keys())
    for other in (True, 0.5, ["first"], None):  # a flag or a score, which the report lists
        assert read_example(row | {name: other}, "here").columns == {layout, "answer"}


@pytest.mark.parametrize("layout", ["messages", "conversations"])
@given(turns=st.lists(st.sampled_from([ASKED, ANSWERED, SHARED[0], SHARED[1], {"role": "tool", "content": "3"}])),
       chosen=st.sampled_from([ANSWERED, SHARED[1], [ANSWERED], "the Rhine"]))  # fmt: skip
def test_a_preference_whose_answers_are_outside_of_the_conversation_is_refused(layout, turns, chosen):
    row = {layout: [ASKED, ANSWERED, *turns], "chosen": chosen, "rejected": chosen, "prompt": "Name it"}
    if row[layout][-1] in (ANSWERED, SHARED[1]):  # it ends with the chosen answer, as in UltraFeedback
        assert read_example(row, "here") == read_example({layout: row[layout]}, "here")
        return
    with pytest.raises(DataError, match=f"^here: {layout} does not end with an answer, and chosen and re") as raised:
        read_example(row, "here")
    assert f"append the chosen answer to {layout}" in raised.value.hint
    for name in ("chosen", "rejected"):  # without both, it is not a preference
        assert read_example(row | {name: None}, "here").learned


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
    ],
)
@pytest.mark.parametrize(
    ("name", "excludes", "others"),
    [
        ("weight", 0, (1, 0.5, "0")), ("weight", 0.0, ()), ("train", False, (True, "no")), ("loss", False, (2.5,)),
        ("masked", True, (False,)), ("loss_scale", 0, ([0],)), ("training", False, (None,)),
    ],
)  # fmt: skip
def test_a_row_that_is_marked_as_excluded_is_refused_and_other_values_are_columns(row, name, excludes, others):
    with pytest.raises(DataError, match=f"^here: {name} {excludes!r} excludes the whole row") as raised:
        check_not_excluded(row | {name: excludes}, "here")
    assert "remove such rows, or rename the column" in raised.value.hint
    for other in others:
        check_not_excluded(row | {name: other}, "here")
    for value in (excludes, *others):  # it may be held out, or only be measured
        assert name not in read_example(row | {name: value}, "here").columns


@pytest.mark.parametrize("name", ["label", "kto_tag", "desirable"])
@given(row=st.sampled_from([{"messages": CHAT}, {"conversations": SHARED}, {"prompt": "x", "completion": "y"},
                            {"prompt": [ASKED], "completion": [ANSWERED]}, {"instruction": "x", "output": "y"}]),
       label=st.booleans() | st.none() | st.sampled_from([0, 1, 0.0, "false", "True", ""]))  # fmt: skip
def test_an_answer_marked_as_unwanted_is_refused_and_other_labels_are_columns(name, row, label):
    if label is False:
        with pytest.raises(DataError, match=f"^here: {name} is false, which marks an unwanted answer"):
            read_example(row | {name: label}, "here")
    else:
        assert read_example(row | {name: label}, "here") == read_example(row, "here")
    assert read_example({"text": "x", name: label}, "here").text == "x"  # plain text has no answer


@given(st.dictionaries(st.text(), st.booleans() | st.text()), st.sets(st.text()))
def test_chat_template_variables_in_a_row_are_refused_unless_empty(variables, of_other_rows):
    in_parquet = dict.fromkeys(of_other_rows) | variables  # where each row has the keys of all rows
    row = {"prompt": "x", "completion": "y", "chat_template_kwargs": in_parquet}
    if variables:
        with pytest.raises(DataError, match=r"^here: chat_template_kwargs cannot be set for a single row") as raised:
            read_example(row, "here")
        assert "--chat-template-kwargs NAME=VALUE" in raised.value.hint
    else:
        assert read_example(row, "here").messages[-1]["content"] == "y"
    assert read_example({"text": "x", "chat_template_kwargs": in_parquet}, "here").text == "x"  # text is not rendered


@given(st.sampled_from(["image", "video", "audio"]), st.sampled_from(["", "s"]), st.booleans(),
       st.sampled_from(["a.png", ["a.png"], {"bytes": b"x"}, None, [], ""]))  # fmt: skip
def test_media_are_refused_if_the_text_refers_to_them_and_otherwise_ignored(kind, plural, marked, value):
    asked = {"from": "human", "value": f"<{kind}>\nName it" if marked else "Name it"}
    for row in ({"conversations": [asked, SHARED[1]]}, {"instruction": asked["value"], "output": "the Rhine"}):
        if marked and value:
            with pytest.raises(DataError, match=f"^here: has <{kind}> in its text, but {kind}s? is not read"):
                read_example(row | {f"{kind}{plural}": value}, "here")
        else:
            assert read_example(row | {f"{kind}{plural}": value}, "here") == read_example(row, "here")


ALPACA = {"instruction": "x", "input": "", "output": "y", "text": "Below is an instruction. x y"}


def test_spaces_around_a_column_name_are_visible_in_a_hint():
    with pytest.raises(DataError, match="no column output") as raised:
        read_example({"instruction": "x", " output": "y"}, "here")
    assert raised.value.hint == "columns: instruction, ' output'; rename the one with the answer"


def test_a_row_of_two_layouts_is_refused_unless_one_is_requested():
    with pytest.raises(DataError, match="more than one layout: instruction and text") as raised:
        read_example(ALPACA, "here")
    assert raised.value.hint == "choose one, such as --layout instruction"
    assert read_example(ALPACA, "here", "instruction").messages[1]["content"] == "y"
    assert read_example(ALPACA, "here", "text").text == ALPACA["text"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, "no column output or response or completion or answer"),
        ({"output": "y"}, "no column instruction or question or prompt"),
        ({"title": "x"}, "unknown layout"),
        ({"problem": "x", "targets": "y"}, "unknown layout"),
        ({"problem": "x", "solution": "y", "answer": "z"}, "has both answer and solution"),
        ({"query": "x", "input": "y", "output": "z"}, "has columns of more than one layout: input and query"),
        ({"segments": [{"label": True, "text": "x"}]}, "unknown layout"),
        ({"conversation": [{"input": "x", "output": "y"}]}, "message 1 of conversation: no role"),
        ({}, "unknown layout"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "no column output or"),
        ({"instruction": "x", "output": "y", "response": "z"}, "has both output and response"),
        ({"instruction": "x", "output": "y", "context": "a", "input": "b"}, "has both context and input"),
        ({"instruction": "x", "output": 5}, "output: expected text, found int"),
        ({"instruction": "x", "output": "half: \ud800"}, "output: expected text, found an unpaired surrogate"),
        ({"instruction": "x", "context": 5, "output": "y"}, "context: expected text, found int"),
        *(
            ({"instruction": "x", "output": "y", "history": history}, "history is not a list of earlier turns")
            for history in ('[["a", "b"]]', ["a", "b"], [["a", "b", "c"]], [["a", None]], CHAT, 0)
        ),
        ({"text": ["a"]}, "text: expected text, found list"),
        ({"messages": "x"}, "messages: expected a list of messages, found str"),
        ({"messages": []}, "messages: expected a list of messages, found none"),
        ({"messages": [ASKED]}, "no assistant message to learn"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0}]}, "no assistant message to learn"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "message 2 of messages: invalid weight 0.5"),
        ({"messages": [ASKED, ANSWERED | {"masked": True}]}, "no assistant message to learn"),
        ({"messages": [ASKED, ANSWERED | {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}]},
         "message 2 of messages: has train_detail, but parts of a message cannot be excluded from the loss"),
        ({"messages": [ASKED, {"role": "critic", "content": "x"}]}, "message 2 of messages: unknown role 'critic'"),
        ({"messages": [{"content": "x"}]}, "message 1 of messages: no role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "message 1 of messages: part 1 of its content is not text (NoneType)"),
        ({"messages": [{"role": "user", "content": [*parts_of("a"), {"type": "image_url", "image_url": {}}]}]},
         "message 1 of messages: part 2 of its content is not text (image_url)"),
        ({"prompt": [{"role": "user", "content": ["a"]}], "completion": [ANSWERED]},
         "message 1 of prompt: part 1 of its content is not text (str)"),
        ({"messages": [ASKED, {"role": "assistant", "content": []}]},
         "message 2 of messages: expected text, found list"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]},
         "message 2 of messages: expected text, found null"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [1]}]}, "message 2 of messages: a tool call has no name"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": "{"}]}, "message 2 of messages: tool_calls: not JSON"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": {"name": "f"}}]},
         "message 2 of messages: tool_calls is not a list"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": [1]}]}]},
         "message 2 of messages: the arguments of f are not an object"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"type": "tool_use", "name": "f", "input": {"a": 1}}]}]},
         "message 2 of messages: the call of f has input, but no arguments"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]},
         "message 2 of messages: the arguments of f: not JSON (the key 'a' appears twice)"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": {"a": ["\ud800"]}}]}]},
         "message 2 of messages: a call of 'f': expected text, found an unpaired surrogate"),
        ({"messages": [ASKED, {"role": "tool", "content": "x", "name": "\ud800"}, ANSWERED]},
         "message 2 of messages: expected text, found an unpaired surrogate"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}]},
         "message 2 of messages: a call of 'f': nan is not a JSON value"),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": {"a": date(2026, 1, 1)}}]}]},
         "message 2 of messages: a call of 'f': datetime.date(2026, 1, 1) is not a JSON value"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "[]"}]},
         "message 2 of conversations, its value: contains no tool call"),
        ({"messages": CHAT, "tools": 5}, "tools is not a list of functions"),
        ({"messages": CHAT, "tools": [{"type": "function", "function": {"description": "x"}}]}, "a tool has no name"),
        ({"messages": CHAT, "tools": DEEP}, "tools: nested more than"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, *CHAT]},
         "has both a column system and a system message"),
    ],
)  # fmt: skip
def test_the_error_for_a_row_that_cannot_be_used_names_the_problem(row, message):
    with pytest.raises(DataError, match=re.escape(f"rows.jsonl, line 7: {message}")) as raised:
        read_example(row, "rows.jsonl, line 7")
    assert raised.value.hint


@pytest.mark.parametrize("layout", ["instruction", "messages", "text"])
def test_a_row_without_the_requested_layout_is_refused(layout):
    with pytest.raises(DataError, match=f"no column {layout}"):
        read_example({"title": "x"}, "here", layout)
