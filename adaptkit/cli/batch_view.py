"""A batch for people: what carries loss in colour, or in brackets where there is none."""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from adaptkit.cli.output import counted

if TYPE_CHECKING:
    from adaptkit.training.preview import Preview

_VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421", ord("\n"): "↵\n"}
"""Control characters of data would move the cursor, or worse."""


def has_colour() -> bool:
    """Whether stdout is a terminal that wants colour."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def batch_lines(preview: "Preview", colour: bool) -> Iterator[str]:
    """What to print of a batch."""
    for number, sample in enumerate(preview.samples):
        is_new = number == 0 or preview.samples[number - 1].row != sample.row
        title = f"{sample.source}: {counted(sample.tokens, 'token')}, {sample.learned} learned"
        line = f"row {sample.row}  {title}" if is_new else f"  packed  {title}"
        yield click.style(line, bold=True) if colour else line
        yield "".join(_mark(part.text.translate(_VISIBLE), part.learned, colour) for part in sample.stretches).rstrip()
        yield ""
    tokens = sum(sample.tokens for sample in preview.samples)
    learned = sum(sample.learned for sample in preview.samples)
    how = "coloured" if colour else "in ⟦brackets⟧"
    held = f"{counted(preview.rows, 'row')} in {counted(preview.micro_batches, 'micro-batch')}"
    yield f"{held}, {counted(preview.padding, 'position')} of padding"
    yield f"{counted(tokens, 'token')}, {learned} learned ({how})"


def _mark(text: str, learned: bool, colour: bool) -> str:
    if colour:
        return click.style(text, fg="green", bold=True) if learned else click.style(text, dim=True)
    return f"⟦{text}⟧" if learned else text
