"""What the pages of documentation name exists: links, headings, files, and options of commands."""

import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path

import click
import pytest

import adaptkit
from adaptkit.cli.main import cli

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_TOOLS = {"--max-lora-rank": "vLLM", "--max-restarts": "torchrun"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(r"`((?:adaptkit|docs|fixtures|scripts|tests)/[\w./]+)`", page.read_text()):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_shown(page):
    text = page.read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"\badaptkit (\w+)([^\n`]*)", text):
        if command in options():
            shown = set(re.findall(r"(?<=\s)--[a-z0-9][\w-]*", rest.partition(" #")[0]))
            assert shown <= options()[command], f"adaptkit {command}{rest}"
    anywhere = set().union(*options().values(), OF_OTHER_TOOLS)
    assert set(re.findall(r"`(--[a-z0-9][\w-]*)", text)) <= anywhere


def test_the_page_on_python_names_every_option_that_is_called_otherwise_there():
    """The other options are named like an argument or a field of the options."""
    text = (ROOT / "docs" / "python.md").read_text()
    context = click.Context(cli)
    for name in cli.list_commands(context):
        known = {"json", "quiet", *inspect.signature(getattr(adaptkit, name)).parameters}
        for public in adaptkit.__all__:
            if public.lower() in (f"{name}options", f"{name}config"):
                known |= {field.name for field in dataclasses.fields(getattr(adaptkit, public))}
        for parameter in cli.get_command(context, name).params:
            own = {option.lstrip("-").replace("-", "_") for option in parameter.opts}
            assert own & known or parameter.param_type_name == "argument" or f"`{parameter.opts[0]}" in text, own


def headings(page: Path) -> set[str]:
    """Return the anchors that a page's headings have on GitHub."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in plain}


@cache
def options() -> dict[str, set[str]]:
    """Return the options of each command."""
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {
        name: {"--help"}.union(*((*parameter.opts, *parameter.secondary_opts) for parameter in command.params))
        for name, command in commands.items()
    }
