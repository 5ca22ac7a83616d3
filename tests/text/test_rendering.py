"""Chat templates render the same text as in transformers, in a process that is replaced after any failure."""

import contextlib
import fcntl
import os
import re
import select
import signal
import threading
import time

import pytest
import tiny

from adaptkit.errors import DataError, UsageError
from adaptkit.text import template_processes
from adaptkit.text.chat_template import set_template_kwargs
from adaptkit.text.conversation import read_example
from adaptkit.text.rendering import render
from adaptkit.text.template_call import Conversation, asks_for_the_date
from adaptkit.text.tokenizer_files import load_tokenizer
from adaptkit.text.tool_calls import OTHER_TOOLS
from adaptkit.training.data.encoding import Encoder, conversation_ids

ASKED = [{"role": "user", "content": "Name a river"}]
CHAT = [*ASKED, {"role": "assistant", "content": "the Rhine, ⟦half⟧\nand 'more'"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # the test's own threads do not make a fork unsafe
    yield tiny.write_tokenizer(tmp_path)
    template_processes._end_processes()


def apply_template(tokenizer, messages, opening):
    (text,) = template_processes.apply_template(tokenizer, [Conversation(messages, opening)])
    return text


def pid():
    return template_processes._processes[0].pid


@pytest.mark.parametrize("opening", [False, True])
def test_the_text_is_the_one_that_transformers_renders(tokenizer, opening):
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=opening)
    assert apply_template(tokenizer, CHAT, opening) == expected
    assert pid() != os.getpid()


DATED = "{{ strftime_now('%d %b %Y, %H:%M') }}: {% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("alone", [False, True])
def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(tokenizer, monkeypatch, alone):
    """Otherwise a run that resumes tomorrow would have other samples; transformers passes today's date."""
    assert not asks_for_the_date(tokenizer)
    tokenizer.chat_template = DATED
    monkeypatch.setattr(template_processes, "can_fork", lambda: not alone)
    assert time.strftime("%d %b %Y") in tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert apply_template(tokenizer, ASKED, False) == "26 Jul 2024, 00:00: Name a river"
    assert asks_for_the_date(tokenizer)


@pytest.mark.parametrize(
    "start", ["", "\n", " \n", "\n\n", "{# of mine #}\n", "{%- set x = 1 %}\n", "  {% set x = 1 %}", "  {# c #}x"]
)
def test_only_the_date_differs_from_transformers(tokenizer, start):
    rest = "{%- for message in messages %}\n{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = (
        start + "{% if strftime_now is defined %}in {{ strftime_now('%Y 100%%d %f') }}{% endif %} " + rest
    )
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False).replace(time.strftime("%Y"), "2024")
    expected = re.sub(r"%d \d{6}", "%d 000000", expected)
    assert apply_template(tokenizer, CHAT, False) == expected
    assert "in 2024" in expected


@pytest.mark.parametrize("portion", [1, 40, 1 << 20])
def test_conversations_are_rendered_in_order_up_to_the_first_refused_one(tokenizer, monkeypatch, portion):
    monkeypatch.setattr(template_processes, "_REQUEST_CHARACTERS", portion)
    asked = [Conversation([{"role": "user", "content": str(number)}], number % 2 == 0) for number in range(500)]
    expected = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=o) for m, o, _ in asked]
    assert list(template_processes.apply_template(tokenizer, asked)) == expected
    tokenizer.chat_template = "{% if messages[0]['content'] == '7' %}{{ raise_exception('no') }}{% endif %}fine"
    texts = template_processes.apply_template(tokenizer, asked)
    assert [next(texts) for _ in range(7)] == ["fine"] * 7
    with pytest.raises(DataError, match="refuses"):
        next(texts)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'].text.strip() }}", "'str object' has no attribute 'text'"),
        ("{{ 7 | wordwrap }}", "'int' object has no attribute 'splitlines'"),
        ("{{ cycler() }}", "at least one item has to be provided"),
        ("{% break %}", "'break' outside loop"),
    ],
)
def test_whatever_a_template_raises_is_the_reason_of_the_refusal(tokenizer, monkeypatch, template, reason, alone):
    tokenizer.chat_template = template
    monkeypatch.setattr(template_processes, "can_fork", lambda: not alone)
    with pytest.raises(DataError, match=f"refuses the conversation .*{reason}"):
        apply_template(tokenizer, ASKED, False)


def test_all_callers_share_one_process(tokenizer):
    encoder, seen = Encoder(tokenizer), set()
    for number in range(5):
        row = {"instruction": f"Name river {number}", "output": "the Rhine"}
        list(encoder.encode([("here", read_example(row, "here"))]))
        seen.add(pid())
        assert len(list(render([Conversation(CHAT, True)], tokenizer))) == 1
        seen.add(pid())
        assert conversation_ids(CHAT, tokenizer)
        seen.add(pid())
    assert len(seen) == 1


def test_a_refused_row_leaves_no_answers_for_the_next_request(tokenizer):
    encoder = Encoder(tokenizer)
    first = read_example({"messages": [CHAT[1]]}, "bad")
    row, other = ({"instruction": f"Name {what}", "output": "the Rhine"} for what in ("STALE", "a river"))
    with pytest.raises(DataError, match="bad: the first message is the assistant's") as kept:
        list(encoder.encode([("bad", first), ("stale", read_example(row, "stale"))]))
    ((sample,),) = [encoded.samples for encoded in encoder.encode([("good", read_example(other, "good"))])]
    assert "Name a river" in tokenizer.decode(sample.ids)
    assert kept.value.hint


def test_the_time_limit_counts_cpu_time_and_not_elapsed_time(tokenizer, monkeypatch):
    monkeypatch.setattr(template_processes, "_SECONDS", 1)
    expected = apply_template(tokenizer, CHAT, False)
    os.kill(pid(), signal.SIGSTOP)
    going_on = threading.Timer(2, os.kill, (pid(), signal.SIGCONT))
    going_on.start()
    assert apply_template(tokenizer, CHAT, False) == expected
    going_on.join()


def test_the_conversation_that_takes_too_long_is_named_in_the_error_and_rendered_once(tokenizer, monkeypatch):
    monkeypatch.setattr(template_processes, "_SECONDS", 0.5)
    begun, start = [], template_processes.start_child
    monkeypatch.setattr(template_processes, "start_child", lambda *arguments: begun.append(1) or start(*arguments))
    tokenizer.chat_template = "{% if messages[0]['content'] == 'x' %}" + LOOP + "{% endif %}"
    tokenizer.chat_template += "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [{"instruction": what, "output": "y"} for what in "abxc"]
    examples = [(f"line {n}", read_example(row, "")) for n, row in enumerate(rows, 1)]
    with pytest.raises(DataError, match=r"line 3: the chat template takes longer than 0\.5 seconds"):
        list(Encoder(tokenizer).encode(examples))
    assert template_processes._processes[0].is_of(tokenizer)  # it rendered the conversations before that one, again
    assert len(begun) == 2


def test_the_process_does_not_hold_locks_of_its_parent(tokenizer, tmp_path):
    handle = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert apply_template(tokenizer, CHAT, False)
    os.close(handle)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


@pytest.mark.parametrize("text", ["\ud800 half", "漢字" * 1_000_000, "\u2028\0\x7f"])
def test_every_character_is_returned_unchanged(tokenizer, text):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert apply_template(tokenizer, [{"role": "user", "content": text}], False) == text


def test_a_conversation_that_is_too_large_is_reported(tokenizer):
    large = [{"role": "user", "content": "漢" * 150_000_000}]
    with pytest.raises(DataError, match="too much memory"):
        apply_template(tokenizer, large, False)


def test_a_text_that_is_too_large_to_send_back_is_reported(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] * 5 }}"
    with pytest.raises(DataError, match="too much memory"):
        apply_template(tokenizer, [{"role": "user", "content": "x" * (20 << 20)}], False)


def test_texts_that_were_not_consumed_are_not_returned_for_the_next_request(tokenizer):
    texts = template_processes.apply_template(tokenizer, [Conversation(ASKED, False)] * 5)
    next(texts)
    texts.close()
    assert "Rhine" in apply_template(tokenizer, CHAT, False)


def test_the_process_renders_more_conversations_after_a_refused_one(tokenizer):
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}fine"
    with pytest.raises(DataError, match=r"refuses the conversation \(too many\)"):
        apply_template(tokenizer, CHAT, False)
    before = pid()
    assert apply_template(tokenizer, ASKED, False) == "fine"
    assert pid() == before


def test_a_process_that_exited_when_idle_is_replaced(tokenizer, monkeypatch):
    monkeypatch.setattr(template_processes, "_IDLE_SECONDS", 0)  # each process exits as soon as it is idle
    first = apply_template(tokenizer, CHAT, False)
    for _ in range(10):
        assert apply_template(tokenizer, CHAT, False) == first
    before = pid()
    template_processes._processes[0]._process.join()
    assert apply_template(tokenizer, CHAT, False) == first
    assert pid() != before


def test_a_process_that_is_killed_is_an_error_and_then_replaced(tokenizer):
    tokenizer.chat_template = LOOP
    killer = threading.Timer(0.5, lambda: os.kill(pid(), signal.SIGKILL))
    killer.start()
    with pytest.raises(DataError, match=r"crashed \(exit code -9\)"):
        apply_template(tokenizer, CHAT, False)
    killer.join()
    tokenizer.chat_template = "fine"
    assert apply_template(tokenizer, CHAT, False) == "fine"


def test_a_process_that_is_killed_is_replaced_if_it_renders_several_conversations(tokenizer):
    """Which one it was that made it exit shows when each is rendered alone: here none."""
    asked = [Conversation([{"role": "user", "content": f"{number}"}], False) for number in range(20)]
    expected = [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _, _ in asked]
    assert apply_template(tokenizer, CHAT, False)
    before = pid()
    os.kill(before, signal.SIGSTOP)
    killer = threading.Timer(0.5, lambda: os.kill(before, signal.SIGKILL))
    killer.start()
    assert list(template_processes.apply_template(tokenizer, asked)) == expected
    killer.join()
    assert pid() != before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_many_conversations_are_divided_among_processes(tokenizer, monkeypatch, count):
    monkeypatch.setattr(template_processes, "processor_count", lambda: count)
    monkeypatch.setattr(template_processes, "_REQUEST_CHARACTERS", 400)
    asked = [Conversation([{"role": "user", "content": f"{number:0100}"}], False) for number in range(90)]
    expected = [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _, _ in asked]
    assert list(template_processes.apply_template(tokenizer, asked)) == expected
    assert len({process.pid for process in template_processes._processes}) == count
    asked[61] = Conversation([{"role": "user", "content": "no"}], False)
    tokenizer.chat_template = "{% if messages[0]['content'] == 'no' %}" + LOOP + "{% endif %}fine"
    monkeypatch.setattr(template_processes, "_SECONDS", 0.3)
    texts = template_processes.apply_template(tokenizer, asked)
    assert [next(texts) for _ in range(61)] == ["fine"] * 61
    with pytest.raises(DataError, match="takes longer"):
        next(texts)


def test_an_interrupted_request_ends_the_process(tokenizer):
    tokenizer.chat_template = LOOP
    held = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            apply_template(tokenizer, CHAT, False)
    finally:
        signal.signal(signal.SIGALRM, held)
    assert not template_processes._processes


@pytest.mark.parametrize("alone", [True, False])
def test_a_text_far_longer_than_the_conversation_is_refused(tokenizer, monkeypatch, alone):
    monkeypatch.setattr(template_processes, "can_fork", lambda: alone)
    tokenizer.chat_template = "{{ messages[0]['content'] * 200000 }}"
    with pytest.raises(DataError, match=r"turns 12 characters into 2,400,000"):
        apply_template(tokenizer, ASKED, False)
    tokenizer.chat_template = "{{ messages[0]['content'] * 8 }}"
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(apply_template(tokenizer, long, False)) == 24_000_000


def test_a_fork_of_the_caller_has_a_process_of_its_own(tokenizer):
    expected = apply_template(tokenizer, CHAT, False)
    before = pid()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            if apply_template(tokenizer, CHAT, False) == expected and pid() != before:
                template_processes._end_processes()
                os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert apply_template(tokenizer, CHAT, False) == expected
    assert pid() == before


def test_the_process_does_not_outlive_a_killed_parent(tokenizer, monkeypatch):
    monkeypatch.setattr(template_processes, "_IDLE_SECONDS", 600)  # it must not exit because it is idle
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            template_processes._processes.clear()
            apply_template(tokenizer, ASKED, False)
            os.write(write, f"{pid()}".encode())
            os.close(read)
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    process = os.pidfd_open(int(os.read(read, 20)))
    os.close(read)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert select.select([process], [], [], 5)[0], "the handle of a process is readable once it has exited"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def test_a_tokenizer_with_only_templates_for_other_purposes_is_refused(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    with pytest.raises(DataError, match="multiple chat templates with no default"):
        list(render([Conversation(CHAT, False)], tokenizer))
    with pytest.raises(DataError, match="no chat template for this conversation"):
        set_template_kwargs(tokenizer, {"quick": True})


def test_a_template_that_loops_is_not_probed_for_every_reasoning_field(tokenizer, monkeypatch):
    monkeypatch.setattr(template_processes, "_SECONDS", 0.5)
    begun, start = [], template_processes.start_child
    monkeypatch.setattr(template_processes, "start_child", lambda *arguments: begun.append(1) or start(*arguments))
    tokenizer.chat_template = LOOP
    with pytest.raises(DataError, match="takes longer than"):
        list(render([Conversation(CHAT, False)], tokenizer))
    assert len(begun) == 2  # for one probe, and for this conversation


def test_reasoning_counts_towards_the_length_of_a_conversation(tokenizer):
    """A rendered text may have a million characters more than eight times the conversation."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.thinking }}{% endfor %}"
    long = "thought " * (1 << 18)
    answer = {"role": "assistant", "content": "a", "reasoning_content": long}
    (text,) = render([Conversation([*ASKED, answer], False)], tokenizer)
    assert text == f"Name a rivera{long.strip()}"


@pytest.mark.parametrize(
    "values",
    [{"enable_thinking": False}, {"enable_thinking": True, "effort": 'as "much"\nas \\ you can ü'}, {"depth": 0.5}],
)
def test_template_variables_have_the_same_effect_as_in_transformers(llama, values):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}quick{% endif %}\n{{ effort }}{{ depth }}\n"
        "{% macro said(m) %}{{ m.content }}{{ depth }}{% endmacro %}{% for m in messages %}{{ said(m) }}{% endfor %}"
    )
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **values)
    assert expected != tokenizer.apply_chat_template(CHAT, tokenize=False)
    set_template_kwargs(tokenizer, values)
    assert list(render([Conversation(CHAT, False)], tokenizer)) == [expected]


def test_template_variables_reach_the_default_template_and_the_one_for_tools(llama):
    tokenizer = load_tokenizer(llama)
    for asking in (("default",), ("tool_use",), ("default", "tool_use")):
        names = ("default", "tool_use", "rag")
        tokenizer.chat_template = {name: f"{name}{{{{ mood }}}}" if name in asking else name for name in names}
        set_template_kwargs(tokenizer, {"mood": " is good"})
        asked = [Conversation(CHAT, False, tools) for tools in ((), OTHER_TOOLS)]
        expected = [f"{name} is good" if name in asking else name for name in names[:2]]
        assert list(template_processes.apply_template(tokenizer, asked)) == expected
    tokenizer.chat_template = {"default": "a", "rag": "{{ mood }}"}
    with pytest.raises(UsageError, match="does not use 'mood'"):
        set_template_kwargs(tokenizer, {"mood": " is good"})


def test_a_variable_that_the_template_does_not_use_is_refused(llama):
    tokenizer = load_tokenizer(llama)
    for name in ("enable_thinking", "not a name", "x %}{{ y"):
        with pytest.raises(UsageError, match=f"does not use '{re.escape(name)}'"):
            set_template_kwargs(tokenizer, {name: False})
    tokenizer.chat_template = (
        "{% set own = 1 %}{% for m in messages %}{{ m.thinking }}{% generation %}a{% endgeneration %}{% endfor %}"
        "{{ quick }}"
    )
    for name in ("thinking", "messages", "add_generation_prompt", "m", "own", "for", "a"):
        with pytest.raises(UsageError, match=f"does not use '{name}'") as caught:
            set_template_kwargs(tokenizer, {name: True})
        assert caught.value.hint == "it uses: quick"
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        set_template_kwargs(tokenizer, {"enable_thinking": False})
    set_template_kwargs(tokenizer, None)
