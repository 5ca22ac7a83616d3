"""A chat template as a text: read, checked, and given variables; ``rendering`` runs it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import read_small
from adaptkit.errors import DataError, UsageError

TEMPLATE_NAME = "chat_template.jinja"
HINT = "use another chat template (train: --chat-template FILE)"
ADD_ONE = "give the model a chat template (train: --chat-template FILE)"
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Marks of transformers' own around answers."""
_OURS = {
    "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "bos_token", "eos_token",
    "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens", "raise_exception",
    "strftime_now", "range", "namespace", "dict", "lipsum", "cycler", "joiner",
}  # fmt: skip
"""What a template gets in any case."""


def read_template(path: Path) -> str:
    """Read a file that holds a chat template; see ``check_template``.

    Raises:
        CheckpointError: it is absent, or no regular file.
        DataError: it is no text.
    """
    try:
        return read_small(path).decode("utf-8-sig")  # the mark of some editors is no part of a conversation
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8", hint="save it as UTF-8; a chat template is a Jinja text file") from error


def check_template(text: str, where: str) -> str:
    """The text, if it is a chat template.

    Raises:
        DataError: it is not.
    """
    _variables_in(text, f"{where}: invalid chat template")
    return text


def set_template_kwargs(tokenizer: Any, values: Mapping[str, str | float | bool] | None) -> None:
    """Give a chat template variables that it asks for, as transformers' and vLLM's ``chat_template_kwargs`` do.

    They become the template's first lines, so that whoever renders with this tokenizer has them; those of each, where
    there are several.

    Args:
        tokenizer: of a checkpoint.
        values: of the variables; numbers, texts and booleans.

    Raises:
        UsageError: there is no template, or it asks for no such variable.
        DataError: it cannot be read.
    """
    if not values:
        return
    if tokenizer.chat_template is None:
        raise UsageError("chat_template_kwargs: the tokenizer has no chat template", hint="leave them out")
    asked = _asked_by(tokenizer)
    for name in values:
        if name not in asked:
            raise UsageError(
                f"chat_template_kwargs: the chat template does not use {name!r}",
                hint=f"it uses: {', '.join(sorted(asked))}" if asked else "leave them out: it uses none",
            )
    lines = "".join(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in values.items())
    own = tokenizer.chat_template
    tokenizer.chat_template = (
        {name: lines + text for name, text in own.items()} if isinstance(own, dict) else lines + own
    )


def known_template_kwargs(tokenizer: Any, values: Mapping[str, str | float | bool]) -> dict[str, str | float | bool]:
    """Those of the variables that a tokenizer's chat template asks for.

    Raises:
        DataError: it cannot be read.
    """
    if not values or tokenizer.chat_template is None:
        return {}
    asked = _asked_by(tokenizer)
    return {name: value for name, value in values.items() if name in asked}


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The template of conversations with or without tools; some tokenizers have one for each.

    Raises:
        DataError: there are several, and none is the one to take.
    """
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise DataError(f"the tokenizer has no chat template for this conversation ({error})", hint=HINT) from error


def _asked_by(tokenizer: Any) -> set[str]:
    """What the templates of conversations with and without tools ask for."""
    used = {template_of(tokenizer, tools) for tools in (None, ())}
    return {name for text in used for name in _variables_in(text, "invalid chat template")} - _OURS


def _variables_in(template: str, problem: str) -> set[str]:
    """What a template asks whoever renders it for."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    parser = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(parser.parse(_GENERATION.sub("", template)))
    except TemplateSyntaxError as error:
        raise DataError(f"{problem} (line {error.lineno}: {error.message})", hint=HINT) from error
    except (RecursionError, ValueError) as error:  # nested beyond reason, or a number of thousands of digits
        raise DataError(f"{problem} ({error})", hint=HINT) from error
