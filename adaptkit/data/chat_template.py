"""Reading and checking chat templates, and setting their variables; ``rendering`` runs them."""

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
"""Tags that transformers adds to Jinja, around answers."""
_PREDEFINED = {
    "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "bos_token", "eos_token",
    "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens", "raise_exception",
    "strftime_now", "range", "namespace", "dict", "lipsum", "cycler", "joiner",
}  # fmt: skip
"""Variables and functions that every template is given."""


def read_template(path: Path) -> str:
    """Read a file that holds a chat template; see ``check_template``.

    Raises:
        CheckpointError: the file is absent or not a regular file.
        DataError: it is not UTF-8 text.
    """
    try:
        return read_small(path).decode("utf-8-sig")  # some editors add a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8", hint="save it as UTF-8; a chat template is a Jinja text file") from error


def check_template(text: str, where: str) -> str:
    """Return a chat template's text unchanged; raise DataError if it is not valid."""
    _variables_in(text, f"{where}: invalid chat template")
    return text


def set_template_kwargs(tokenizer: Any, values: Mapping[str, str | float | bool] | None) -> None:
    """Set variables of a chat template, as ``chat_template_kwargs`` of transformers and vLLM do.

    They become the first lines of the tokenizer's template (of each template, if it has several), so they hold for all
    later rendering with this tokenizer.

    Args:
        tokenizer: tokenizer of a checkpoint.
        values: maps variable names to numbers, strings or booleans.

    Raises:
        UsageError: there is no template, or it does not use one of the variables.
        DataError: the template cannot be parsed.
    """
    if not values:
        return
    if tokenizer.chat_template is None:
        raise UsageError("chat_template_kwargs: the tokenizer has no chat template", hint="leave them out")
    asked = _asked_by(tokenizer)
    for name in values:
        if name not in asked:
            hint = f"it uses: {', '.join(sorted(asked))}" if asked else "leave them out: it uses none"
            raise UsageError(f"chat_template_kwargs: the chat template does not use {name!r}", hint=hint)
    lines = "".join(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in values.items())
    own = tokenizer.chat_template
    tokenizer.chat_template = (
        {name: lines + text for name, text in own.items()} if isinstance(own, dict) else lines + own
    )


def known_template_kwargs(tokenizer: Any, values: Mapping[str, str | float | bool]) -> dict[str, str | float | bool]:
    """Return the variables that a tokenizer's chat template uses; raise DataError if it cannot be parsed."""
    if not values or tokenizer.chat_template is None:
        return {}
    asked = _asked_by(tokenizer)
    return {name: value for name, value in values.items() if name in asked}


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """Return the template for conversations with or without tools; some tokenizers have one for each.

    Raises:
        DataError: there are several, but no default and, with tools, none for tools.
    """
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise DataError(f"the tokenizer has no chat template for this conversation ({error})", hint=HINT) from error


def _asked_by(tokenizer: Any) -> set[str]:
    """Return the variables that the templates for conversations with and without tools use."""
    used = {template_of(tokenizer, tools) for tools in (None, ())}
    return {name for text in used for name in _variables_in(text, "invalid chat template")} - _PREDEFINED


def _variables_in(template: str, problem: str) -> set[str]:
    """Return the undeclared variables of a template."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    parser = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(parser.parse(_GENERATION.sub("", template)))
    except TemplateSyntaxError as error:
        raise DataError(f"{problem} (line {error.lineno}: {error.message})", hint=HINT) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        raise DataError(f"{problem} ({error})", hint=HINT) from error
