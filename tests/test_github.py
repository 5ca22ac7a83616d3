"""The workflows and the action use only what GitHub and adaptkit support."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from adaptkit.cli.main import cli

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github").rglob("*.yml"))
ACTION = ROOT / ".github" / "actions" / "adaptkit-run" / "action.yml"


def read(path):
    document = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in document.items()}  # YAML 1.1 takes "on" for a boolean


def steps(document):
    if "runs" in document:
        return document["runs"]["steps"]
    return [step for job in document["jobs"].values() for step in job["steps"]]


def commands(script):
    for line in script.splitlines():
        words = shlex.split(line)
        if words and words[0] == "adaptkit":
            yield words


def test_there_is_an_action_and_two_workflows():
    assert [path.relative_to(ROOT / ".github").as_posix() for path in FILES] == [
        "actions/adaptkit-run/action.yml", "workflows/release.yml", "workflows/test.yml"
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_options_and_files_that_are_used_exist(path):
    document, found = read(path), 0
    for step in steps(document):
        for words in commands(step.get("run", "")):
            command = cli.get_command(click.Context(cli), words[1])
            assert command is not None, words
            known = {name for parameter in command.params for name in parameter.opts}
            given = [word for word in words[2:] if word.startswith("--")]
            assert set(given) <= known, words
            found += 1
        script = step.get("run", "").strip()
        if script.startswith("./"):
            assert (ROOT / script).is_file()
            assert (ROOT / script).stat().st_mode & 0o111
        if step.get("uses", "").startswith("./"):
            assert (ROOT / step["uses"] / "action.yml").is_file()
            assert set(step.get("with", {})) <= set(read(ACTION)["inputs"])
    assert found == (path == ACTION)


def test_the_default_options_of_the_action_exist():
    command = cli.get_command(click.Context(cli), "run")
    known = {name for parameter in command.params for name in parameter.opts}
    options = read(ACTION)["inputs"]["options"]["default"].split()
    assert "--locked" in options
    assert set(options) <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_scripts_contain_no_expressions(path):
    """Expressions are pasted into scripts unescaped, so values are passed by the environment."""
    for step in steps(read(path)):
        assert "${{" not in step.get("run", "")
        if "run" in step and "runs" in read(path):
            assert step["shell"] == "bash"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_external_actions_are_githubs_own_at_a_major_version(path):
    for step in steps(read(path)):
        if "uses" in step and not step["uses"].startswith("./"):
            assert re.fullmatch(r"actions/[a-z-]+(/[a-z]+)?@v\d+", step["uses"])


def test_permissions_are_minimal():
    test, release = (read(ROOT / ".github" / "workflows" / f"{name}.yml") for name in ("test", "release"))
    assert test["permissions"] == {"contents": "read"}
    assert release["permissions"] == {}
    assert release["jobs"]["release"]["permissions"] == {"contents": "read", "id-token": "write"}
    for document in (test, release):
        checkouts = [step for step in steps(document) if step.get("uses", "").startswith("actions/checkout")]
        assert [step["with"]["persist-credentials"] for step in checkouts] == [False]


def test_outputs_that_are_used_are_set():
    made = {
        (step["id"], name)
        for step in steps(read(ACTION))
        if "id" in step
        for name in re.findall(r'^echo "(\w+)=.*" >> "\$GITHUB_OUTPUT"$', step["run"], re.MULTILINE)
    }
    used = re.findall(r"steps\.([\w-]+)\.outputs\.([\w-]+)", ACTION.read_text())
    assert set(used) == made == {("lock", "key"), ("lock", "work"), ("run", "report")}
