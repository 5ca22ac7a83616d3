"""Argument types for paths, none of which may be empty.

A path is empty, for instance, if it comes from a shell variable that is not set; ``pathlib`` takes it for the current
folder.
"""

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.cli.output import notes
from adaptkit.cli.progress import byte_progress


class ArtifactPath(click.ParamType[Path]):
    """A local folder, or ``org/name[@revision]``, which is downloaded into the Hub's cache."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See ``click.ParamType``."""
        if not str(value):
            self.fail("the path is empty", param, ctx)
        asked = ctx.params if ctx else {}
        return self._found(str(value), bool(asked.get("as_json") or asked.get("quiet")))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """See ``click.ParamType``."""
        return [CompletionItem(incomplete, type="file")]  # the shell completes file names

    def _found(self, text: str, is_silent: bool) -> Path:
        return fetched(text, is_silent)


class LocalPath(click.Path):
    """A path that is not looked for on the Hub."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See ``click.ParamType``."""
        if not str(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


def fetched(text: str, is_silent: bool) -> Path:
    """Return the local path of an argument; ``org/name[@revision]`` is downloaded first."""
    if not _is_on_the_hub(text):
        return Path(text)  # if it does not exist, the command says so
    from adaptkit.hub.sources import resolve_source

    with byte_progress("fetch", is_silent) as progress:
        return resolve_source(text, progress, notes(is_silent))


class ConfigPath(ArtifactPath):
    """A local folder or its ``config.json``; or ``org/name[@revision]``, of which only that file is downloaded."""

    def _found(self, text: str, is_silent: bool) -> Path:
        path = Path(text)
        if path.name == CONFIG_NAME and os.path.isfile(path):
            return path.parent
        if not _is_on_the_hub(text):
            return path
        from adaptkit.hub.sources import resolve_config

        return resolve_config(text, notes(is_silent))


def _is_on_the_hub(text: str) -> bool:
    """Return whether a text has the form of ``org/name[@revision]`` and is not an existing local path."""
    is_local = text.startswith((".", "/", "~")) or os.path.exists(text)
    return not is_local and text.partition("@")[0].count("/") == 1
