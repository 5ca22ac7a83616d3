"""Display of a training run's data: table rows, and a batch with its learned tokens marked."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from adaptkit.cli.output import Row, counted, percent, plain
from adaptkit.data.rendering import DAY

if TYPE_CHECKING:
    from adaptkit.data.dataset import SourceReport
    from adaptkit.training.data_report import CutReport, DataReport
    from adaptkit.training.preview import Preview

_VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421", ord("\n"): "↵\n"}
_VISIBLE |= {code: plain(chr(code)) for code in range(0x80, 0xA0)}
"""Visible replacements of control characters, which would act on the terminal."""


def data_rows(data: "DataReport") -> Iterator[Row]:
    """Yield a row for each source, and one for each thing that the user may not expect."""
    whole = sum(data.epoch_tokens) or 1
    for source, tokens in zip(data.sources, data.epoch_tokens, strict=True):
        share = f"; {percent(tokens / whole)} of an epoch's tokens" if len(data.sources) > 1 else ""
        yield "data", _source(source) + share
    for source in data.held_out_sources:
        yield "held out", _source(source)
    if data.held_out_limited:
        from adaptkit.data.sampling import MOST_HELD_OUT

        yield "held out", f"{MOST_HELD_OUT:,} rows and not a tenth of them, as --held-out is not given"
    for label, count, noun, verb, text in (
        ("repeated", data.repeated, "held-out sample", "are", "also trained on, so the held-out loss is too low"),
        ("split", data.split, "conversation", "",
         "into one sample per answer: the chat template rewrites earlier turns"),
        ("ended", data.ended, "sample", "", "with an added end token: the chat template puts none after an answer"),
        ("empty", data.empty, "row", "have",
         f"an empty answer, which the model learns to give (the first: {data.empty_at})"),
        ("twice", data.twice, "row", "have",
         f"an answer with an end token, and the model learns another after it (the first: {data.twice_at})"),
        ("special", data.special, "row", "have",
         f"a special token in a message or tool, which the model does not read as text (the first: {data.special_at})"),
    ):  # fmt: skip
        yield label, f"{counted(count, noun, verb)} {text}" if count else None
    if data.chat_template is not None:
        yield "template", f"from {data.chat_template}; it is saved with the output"
    if data.without_template:
        yield "template", "none: messages are joined as plain lines (--chat-template FILE gives one)"
    if data.unnamed_end is not None:
        end = f"answers end with {data.unnamed_end}, which the base's generation_config.json does not name"
        yield "end token", f"{end}; the output's does"
    if data.dated:
        yield "dated", f"the chat template asks for the date; it is always given {DAY:%Y-%m-%d}"


def cut_rows(data: "DataReport", truncated: int, dropped: int) -> Iterator[Row]:
    """Yield rows on samples that were cut or left out, if there are any."""
    yield from _cut("sample", truncated, dropped, data)
    if data.held_out_cut is not None:
        yield from _cut("held-out sample", data.held_out_cut.truncated, data.held_out_cut.dropped, data.held_out_cut)


def _cut(what: str, truncated: int, dropped: int, of: "DataReport | CutReport") -> Iterator[Row]:
    if truncated or dropped:
        longest = counted(of.longest, "token")
        yield "cut", f"{counted(truncated, what)} to max_length; the longest has {longest} ({of.longest_at})"
    if dropped:
        named = f" ({'; '.join(of.masked)})" if of.masked else ""
        yield "left out", f"{counted(dropped, what)}, too long or without an answer after the cut{named}"


def _source(source: "SourceReport") -> str:
    layouts = ", ".join(f"{count} {name}" for name, count in source.layouts.items())
    text = f"{source.name}: {layouts}; {counted(source.tokens, 'token')}, {source.answer_tokens:,} learned"
    return f"{text}; {_not_used(source.unused)}" if source.unused else text


def _not_used(columns: Sequence[str]) -> str:
    return f"not used: {', '.join(name or 'an unnamed column' for name in columns)}"


def has_colour() -> bool:
    """Return whether stdout is a terminal and ``NO_COLOR`` is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def batch_lines(preview: "Preview", colour: bool) -> Iterator[str]:
    """Yield the lines that show a batch; learned text is coloured, or in brackets without colour."""
    for number, sample in enumerate(preview.samples):
        is_new = number == 0 or preview.samples[number - 1].row != sample.row
        title = f"{plain(sample.source)}: {counted(sample.tokens, 'token')}, {sample.learned} learned"
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
    yield from (f"{source}: {_not_used(names)}".translate(_VISIBLE) for source, names in preview.unused.items())


def _mark(text: str, learned: bool, colour: bool) -> str:
    if colour:
        return click.style(text, fg="green", bold=True) if learned else click.style(text, dim=True)
    return f"⟦{text}⟧" if learned else text
