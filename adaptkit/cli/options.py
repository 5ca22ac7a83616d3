"""Options and argument types that several commands share."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


class ArtifactPath(click.ParamType[Path]):
    """A local folder, or ``org/name[@revision]``, which is downloaded into the Hub's cache."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See ``click.ParamType``."""
        path = Path(value)
        if os.path.exists(path) or str(value).count("/") != 1 or str(value).startswith((".", "/", "~")):
            return path  # whoever opens it says what is wrong with it
        from adaptkit.hub.download import resolve_source

        return resolve_source(str(value))


class Size(click.ParamType[int]):
    """A number of bytes: 5GB, 500MB, 20000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See ``click.ParamType``."""
        text = str(value).strip().upper().removesuffix("B")
        factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
        number = text if factor == 1 else text[:-1]
        try:
            return int(float(number) * factor)
        except (ValueError, OverflowError):
            return self.fail(f"{value!r} is not a size such as 5GB or 500MB", param, ctx)


class Share(click.ParamType[tuple[int, int]]):
    """One of several equal shares: 2/4."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """See ``click.ParamType``."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            return self.fail(f"{value!r} is not a share such as 1/4 to 4/4", param, ctx)
        return int(found[1]), int(found[2])


def _together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


report_options = _together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)

output_options = _together(
    click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to make."),
    click.option("--force", is_flag=True, help="Replace an output that adaptkit made."),
    report_options,
)

threads_option = click.option("--threads", type=click.IntRange(min=1), help="Default: one per processor.")

weight_option = click.option(
    "--weight", "weights", type=float, multiple=True, help="One per adapter, in their order. Default: 1 each."
)
