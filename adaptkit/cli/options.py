"""Options and argument types that several commands share."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import click

from adaptkit.cli.paths import LocalPath
from adaptkit.errors import UsageError
from adaptkit.settings import declared

if TYPE_CHECKING:
    from adaptkit.checkpoint.signing import Signer, Trust

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

weight_option = click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of each adapter, in order. Repeatable. Default: 1 each.",
)


def signer_with(key: Path) -> "Signer":
    """Return the signer for a key; its password comes from the environment."""
    from adaptkit.checkpoint.signing import Signer

    password = os.environ.get("ADAPTKIT_KEY_PASSWORD")
    return Signer(private_key=key, password=password.encode() if password else None)


def trust_in(public_key: Path | None, identity: str | None, identity_provider: str | None) -> "Trust | None":
    """Return the required signer; None if no option is given. An empty option counts as given."""
    from adaptkit.checkpoint.signing import Trust

    if public_key is None and identity is None and identity_provider is None:
        return None
    return Trust(public_key, identity, identity_provider)


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
    """An option that may begin a section of the help, with this heading."""

    def __init__(self, *args: Any, section: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


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


def settings_options(kind: type, **types: click.ParamType[Any]) -> Callable[[Function], Function]:
    """Add an option for every setting of a dataclass; the values of absent options are empty, see ``given``.

    Args:
        kind: dataclass of settings, see ``training.settings``.
        types: option types that differ from the field's type, by name.
    """
    from adaptkit.training.settings import settings

    return _together(*(_setting_option(name, found, rule, types) for name, (found, rule) in settings(kind).items()))


def _setting_option(name: str, found: Any, rule: Any, types: Mapping[str, Any]) -> Any:
    kind, flag = declared(found.type), f"--{name.replace('_', '-')}"
    inner, help_text = get_args(kind), rule.help
    if inner:
        help_text += " Repeatable."
    if found.default is not MISSING and not (
        found.default is None or found.default is False or found.default in ((), {})
    ):
        default = found.default
        help_text += f"  [default: {' '.join(default) if isinstance(default, tuple) else default}]"
    if kind is bool:
        return click.option(
            f"{flag}/--no-{flag[2:]}",
            default=None,
            help=help_text,
            hidden=rule.hidden,
            cls=_SettingOption,
            section=rule.section,
        )
    mapped = {tuple: str, Mapping: NamedNumber() if inner[1:] == (float,) else NamedValue()}
    return click.option(
        flag,
        type=types.get(name, mapped[get_origin(kind)] if inner else kind),
        multiple=bool(inner),
        callback=by_name if get_origin(kind) is Mapping else None,
        metavar=f"[{'|'.join(rule.choices)}]" if rule.choices else None,
        shell_complete=one_of(rule.choices) if rule.choices else None,
        help=help_text,
        cls=_SettingOption,
        section=rule.section,
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
        name = (parameter.name or "").rstrip("_")
        if typed := given.intersection(parameter.opts):
            named[name] = typed.pop()
        if isinstance(parameter, _SettingOption) and "--config" not in given:
            settings[name] = parameter.opts[0]
    paths = set(map(Path, given))
    head, colon, rest = text.partition(": ")
    if colon and head in settings | named and Path(head) not in paths:
        text = f"{(settings | named)[head]}: {rest}"
    known = "|".join(name for name in settings if Path(name) not in paths)

    def renamed(found: re.Match[str]) -> str:
        is_asked = text[: found.start()].endswith(("leave out ", ", or ", ", or use "))
        return settings[found[0]] if "_" in found[0] or is_asked else found[0]

    return re.sub(rf"(?<![\w./-])(?:{known})(?![\w/-]|\.\w)", renamed, text) if known else text  # not in a path


def given(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    from adaptkit.training.settings import settings

    return {name: values[name] for name in settings(kind) if values[name] not in (None, (), {})}
