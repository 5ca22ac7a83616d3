"""Chat templates render the same text as in transformers, and what they raise is an error."""

import re
import time

import pytest
import tiny

from adaptkit.data.chat_template import set_template_kwargs
from adaptkit.data.rendering import asks_for_the_date, call_template, render
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.errors import DataError, UsageError

TOOLS = ({"type": "function", "function": {"name": "depth"}},)
ASKED = [{"role": "user", "content": "Name a river"}]
CHAT = [*ASKED, {"role": "assistant", "content": "the Rhine, ⟦half⟧\nand 'more'"}]


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.write_tokenizer(tmp_path)


def apply_template(tokenizer, messages, opening):
    return call_template(tokenizer, messages, opening=opening)


@pytest.mark.parametrize("opening", [False, True])
def test_the_text_is_the_one_that_transformers_renders(tokenizer, opening):
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=opening)
    assert apply_template(tokenizer, CHAT, opening) == expected


DATED = "{{ strftime_now('%d %b %Y, %H:%M') }}: {% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(tokenizer):
    """Otherwise a run that resumes tomorrow would have other samples; transformers passes today's date."""
    assert not asks_for_the_date(tokenizer)
    tokenizer.chat_template = DATED
    assert time.strftime("%d %b %Y") in tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert apply_template(tokenizer, ASKED, False) == "26 Jul 2024, 00:00: Name a river"
    assert asks_for_the_date(tokenizer)


@pytest.mark.parametrize("start", ["", "\n\n", "{# of mine #}\n", "{%- set x = 1 %}\n", "  {# c #}x"])
def test_only_the_date_differs_from_transformers(tokenizer, start):
    rest = "{%- for message in messages %}\n{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = (
        start + "{% if strftime_now is defined %}in {{ strftime_now('%Y 100%%d %f') }}{% endif %} " + rest
    )
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False).replace(time.strftime("%Y"), "2024")
    expected = re.sub(r"%d \d{6}", "%d 000000", expected)
    assert apply_template(tokenizer, CHAT, False) == expected
    assert "in 2024" in expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'].text.strip() }}", "'str object' has no attribute 'text'"),
        ("{{ 7 | wordwrap }}", "'int' object has no attribute 'splitlines'"),
        ("{{ cycler() }}", "at least one item has to be provided"),
        ("{% break %}", "'break' outside loop"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_whatever_a_template_raises_is_the_reason_of_the_refusal(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"refuses the conversation .*{reason}"):
        apply_template(tokenizer, ASKED, False)


@pytest.mark.parametrize("text", ["\ud800 half", "漢字" * 1_000_000, "\u2028\0\x7f"])
def test_every_character_is_returned_unchanged(tokenizer, text):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert apply_template(tokenizer, [{"role": "user", "content": text}], False) == text


def test_a_text_far_longer_than_the_conversation_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] * 200000 }}"
    with pytest.raises(DataError, match=r"turns \d\d characters into 2,400,000"):
        apply_template(tokenizer, ASKED, False)
    tokenizer.chat_template = "{{ messages[0]['content'] * 8 }}"
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(apply_template(tokenizer, long, False)) == 24_000_000


def test_a_tokenizer_with_only_templates_for_other_purposes_is_refused(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    with pytest.raises(DataError, match="multiple chat templates with no default"):
        render(CHAT, tokenizer)
    with pytest.raises(DataError, match="no chat template for this conversation"):
        set_template_kwargs(tokenizer, {"quick": True})


def test_reasoning_counts_towards_the_length_of_a_conversation(tokenizer):
    """A rendered text may have a million characters more than eight times the conversation."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.thinking }}{% endfor %}"
    long = "thought " * (1 << 18)
    answer = {"role": "assistant", "content": "a", "reasoning_content": long}
    text = render([*ASKED, answer], tokenizer)
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
    assert render(CHAT, tokenizer) == expected


def test_template_variables_reach_the_default_template_and_the_one_for_tools(llama):
    tokenizer = load_tokenizer(llama)
    for asking in (("default",), ("tool_use",), ("default", "tool_use")):
        names = ("default", "tool_use", "rag")
        tokenizer.chat_template = {name: f"{name}{{{{ mood }}}}" if name in asking else name for name in names}
        set_template_kwargs(tokenizer, {"mood": " is good"})
        expected = [f"{name} is good" if name in asking else name for name in names[:2]]
        assert [call_template(tokenizer, CHAT, tools) for tools in ((), TOOLS)] == expected
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
