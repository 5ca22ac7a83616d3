"""Options and argument types that several commands share."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import click

from adaptkit.cli.paths import LocalPath
from adaptkit.errors import UsageError
from adaptkit.settings import Kind, Setting, Settings, declared, settings

if TYPE_CHECKING:
    from adaptkit.checkpoint.signing import Signer

Function = TypeVar("Function", bound=Callable[..., Any])


def one_of(choices: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a shell completion for an option whose values the operation, not click, checks."""
    return lambda context, option, begun: [choice for choice in choices if choice.startswith(begun)]


_LEAST_WITHOUT_UNIT = 10**6


class Size(click.ParamType[int]):
    """A number of bytes: 5GB, 500MB, 20000B; without a unit only if it is large, since 5 is hardly meant as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See ``click.ParamType``."""
        text = str(value).strip().upper().removesuffix("B")
        factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
        number = text if factor == 1 else text[:-1]
        try:
            nbytes = int(float(number) * factor)
        except (ValueError, OverflowError):
            return self.fail(f"{value!r} is not a size such as 5GB or 500MB", param, ctx)
        if 0 < nbytes < _LEAST_WITHOUT_UNIT and text == str(value).strip():
            return self.fail(f"{value!r} has no unit; write {value}GB or {value}MB, or {value}B for bytes", param, ctx)
        return nbytes


def _together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


report_options = _together(  # eager: paths may be fetched while they are converted, and need to know these
    click.option("--json", "as_json", is_flag=True, is_eager=True, help="Print one JSON document on stdout."),
    click.option("--quiet", is_flag=True, is_eager=True, help="Print only errors."),
)

output_options = _together(
    click.option("-o", "--output", type=LocalPath(), required=True, help="Output folder."),
    click.option("--force", is_flag=True, help="Overwrite an existing output made by adaptkit."),
    report_options,
)

report_file_option = click.option(
    "--output-file",
    type=LocalPath(),
    metavar="FILE",
    help="Also write the --json document to this file; not in a dry run.",
)

html_option = click.option("--html", type=LocalPath(dir_okay=False), help="Also write the report as an HTML page.")

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Number of threads. Default: one per processor."
)


def signer_with(key: Path) -> "Signer":
    """Return the signer for a key; its password comes from the environment."""
    from adaptkit.checkpoint.signing import Signer

    password = os.environ.get("ADAPTKIT_KEY_PASSWORD")
    return Signer(private_key=key, password=password.encode() if password else None)


class NamedNumber(click.ParamType[tuple[str, float]]):
    """A name and its number: q_proj=8."""

    name = "name=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """See ``click.ParamType``."""
        name, separator, number = str(value).rpartition("=")
        try:
            if name and separator:
                return name, int(number) if number.isdecimal() else float(number)
        except ValueError:
            pass
        return self.fail(f"{value!r} is not a name and a number, such as q_proj=8", param, ctx)


class NamedValue(click.ParamType[tuple[str, str | float | bool]]):
    """A name and its value, read as a JSON scalar if it is one, else as text: enable_thinking=false."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | float | bool]:
        """See ``click.ParamType``."""
        name, separator, text = str(value).partition("=")
        if not name or not separator:
            return self.fail(f"{value!r} is not a name and a value, such as enable_thinking=false", param, ctx)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return name, text
        return name, found if isinstance(found, str | bool) or _is_finite(found) else text


def by_name(context: click.Context, option: click.Parameter, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Collect a repeated option in a dict; refuse a name given twice, as is done for a key of a file."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", context, option)
        found[name] = value
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


class _SettingOption(click.Option):
    """The option of a setting, which may begin a section of the help, with this heading."""

    def __init__(self, *args: Any, setting: str, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setting, self.section = setting, section


class InSections(click.Command):
    """A command whose help groups its settings under headings, and whose errors know what other tools call them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See ``click.Command``."""
        from adaptkit.training.other_names import OTHER_NAMES

        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            meant = OTHER_NAMES.get(error.option_name.lstrip("-").replace("-", "_"))
            flags = [flag for option in self.params if option.name == meant for flag in option.opts if flag[:2] == "--"]
            if not flags:
                raise
            raise UsageError(f"no such option: {error.option_name}", hint=f"did you mean {flags[0]}?") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See ``click.Command``."""
        heading, sections = "Options", dict[str, list[tuple[str, str]]](Options=[])
        for option in self.get_params(ctx):
            if isinstance(option, _SettingOption):
                heading = option.section or heading
            record = option.get_help_record(ctx)
            if record is not None and not isinstance(option, click.Argument):
                sections.setdefault(heading if isinstance(option, _SettingOption) else "Options", []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def settings_options(kind: type[Settings], **types: click.ParamType[Any]) -> Callable[[Function], Function]:
    """Add an option for every setting of a class, also of the settings within it; see ``chosen``.

    Args:
        kind: class of settings.
        types: option types that differ from the field's type, by name.
    """
    is_of_file = bool(kind.other_names)  # an option can switch off what the file switches on
    return _together(*(_option(*found, is_of_file, types) for found in _listed(kind)))


def chosen(kind: type[Kind], values: Mapping[str, Any], **more: Any) -> Kind:
    """Make the settings that were given on the command line; ``more`` are those that are no options of it."""
    return kind(**given(kind, values), **more)


def given(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line, by name; settings within others in a dict."""
    found: dict[str, Any] = {}
    for path, field, rule in _listed(kind):
        value = values[_parameter(path, rule)]
        if value not in (None, (), {}):
            holder = found
            for outer in path[:-1]:
                holder = holder.setdefault(outer, {})
            holder[field.name] = value
    return found


def _listed(kind: type[Settings], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Field[Any], Setting]]:
    """Iterate over the path, field and rule of every setting, also of the settings within others."""
    for name, (field, rule) in settings(kind).items():
        yield (*outer, name), field, rule
    for name, hint in get_type_hints(kind).items():
        inner = declared(hint)
        if name not in settings(kind) and isinstance(inner, type) and issubclass(inner, Settings):
            yield from _listed(inner, (*outer, name))


def _flag(path: tuple[str, ...], rule: Setting) -> str:
    return rule.flag or f"--{path[-1].replace('_', '-')}"


def _parameter(path: tuple[str, ...], rule: Setting) -> str:
    return _flag(path, rule)[2:].replace("-", "_")


def _option(
    path: tuple[str, ...], field: Field[Any], rule: Setting, is_of_file: bool, types: Mapping[str, Any]
) -> Callable[[Function], Function]:
    kind, flag = declared(field.type), _flag(path, rule)
    inner, origin, default = get_args(kind), get_origin(kind), field.default
    help_text = rule.help + (" Repeatable." if inner else "")
    if default not in (MISSING, None, False, ()):
        shown = {bool: flag[2:], tuple: " ".join(map(str, default)) if inner else ""}.get(origin or kind, default)
        help_text += f"  [default: {f'{default // 10**9}GB' if rule.is_size else shown}]"
    more: dict[str, Any] = {"cls": _SettingOption, "setting": path[-1], "section": rule.section, "hidden": rule.hidden}
    if kind is bool:
        both = f"{flag}/--no-{flag[2:]}" if is_of_file or default is True else flag
        return click.option(both, _parameter(path, rule), is_flag=True, default=None, help=help_text, **more)
    named = NamedNumber() if inner[1:] == (float,) else NamedValue()
    of_one = named if origin is Mapping else inner[0] if inner else kind
    of_one = LocalPath() if of_one is Path else Size() if rule.is_size else of_one
    return click.option(
        flag,
        _parameter(path, rule),
        type=types.get(path[-1], of_one),
        multiple=bool(inner),
        callback=by_name if origin is Mapping else None,
        metavar=f"[{'|'.join(rule.choices)}]" if rule.choices and len(rule.choices) < 8 else rule.metavar or None,
        shell_complete=one_of(rule.choices) if rule.choices else None,
        help=help_text,
        **more,
    )


def as_options(text: str, command: click.Command, arguments: Iterable[str]) -> str:
    """Name the parameters in a library's error message as the command line does: ``block_size`` is ``--block-size``.

    A name before the first colon counts if its option was given, unless a path of that name was. If there is no
    ``--config`` file, whose keys have the same names, so do all settings. Elsewhere in the text, those with an
    underscore count, and others after "leave out", ", or" and ", or use": otherwise they may be ordinary words.
    """
    given = {part for argument in arguments for part in argument.split("=", 1)}
    named, settings = {}, {}
    for parameter in command.params:
        name = parameter.setting if isinstance(parameter, _SettingOption) else (parameter.name or "").rstrip("_")
        if typed := given.intersection(parameter.opts):
            named[name] = typed.pop()
        if isinstance(parameter, _SettingOption) and "--config" not in given:
            settings[name] = parameter.opts[0]
    paths = set(map(Path, given))
    head, colon, rest = text.partition(": ")
    head = head.partition(".")[0] if not os.path.exists(head) else head  # an item of a list
    if colon and head in settings | named and Path(head) not in paths:
        text = f"{(settings | named)[head]}: {rest}"
    known = "|".join(name for name in settings if Path(name) not in paths)

    def renamed(found: re.Match[str]) -> str:
        is_asked = text[: found.start()].endswith(("leave out ", ", or ", ", or use "))
        return settings[found[0]] if "_" in found[0] or is_asked else found[0]

    return re.sub(rf"(?<![\w./-])(?:{known})(?![\w/-]|\.\w)", renamed, text) if known else text  # not in a path
