"""No command shows a token in its output, messages, tracebacks or files, whether it succeeds or fails.

Tokens are planted in the environment, in the Hub's login file, in a netrc file, and in the arguments; logging is at its
most verbose. All commands of the commands folder are tested, so a new one is covered automatically, once the arguments
with which it succeeds are listed here.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import local_hub
import pytest
from local_hub import LocalHub, RefusalError

from adaptkit.cli import commands
from adaptkit.cli.main import cli as program
from adaptkit.discovery import names
from adaptkit.hub.secrets import holds_token, redact

PLANTED = "hf_plantedInTheEnvironment" + "Qx7" * 5
LOGIN = "hf_plantedInTheFileOfTheLogin" + "Zr5" * 4
PASSWORD = "plantedInNetrcWithAnOrdinaryName"
ARGUMENT = "hf_plantedInAnArgument" + "Kd9" * 6
SECRETS = (PLANTED, LOGIN, PASSWORD, ARGUMENT)
FORMS = (ARGUMENT, f"org/{ARGUMENT}", f"https://user:{ARGUMENT}@example.org/org/name", f"org/name@{ARGUMENT}")
RECIPE = """\
name: release
sources:
  base: {path: llama}
steps:
  small: {quantize: base}
  shipped: {publish: small, repo: me/released, tag: v1}
"""


@pytest.fixture
def loud(tmp_path: Path, hub: LocalHub) -> dict[str, str]:
    """An environment with tokens in every place, and with verbose logging."""
    (tmp_path / "login").mkdir()
    (tmp_path / "login" / "token").write_text(LOGIN + "\n")
    (tmp_path / "login" / ".netrc").write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    (tmp_path / "tmp").mkdir()
    hub.tokens = frozenset({PLANTED, LOGIN})
    loudness = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    places = {"HF_HOME": "home", "HOME": "login", "TMPDIR": "tmp", "NETRC": "login/.netrc", "XDG_CACHE_HOME": "cache"}
    return (
        {name: str(tmp_path / place) for name, place in places.items()}
        | loudness
        | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    )


def check_nothing_shows(folder: Path, *outputs: str) -> None:
    """Require that no secret is in these outputs or in any file other than those in which it was planted."""
    for secret in SECRETS:
        for output in outputs:
            assert secret not in output, output
    for path in folder.rglob("*"):
        if path.is_file() and folder / "login" not in path.parents and path.name != "planted.yaml":
            content = path.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in content], path
        assert not [secret for secret in SECRETS if secret in path.name], path


def test_no_command_shows_a_token_when_it_succeeds(
    cli: Any, loud: dict[str, str], copy_of: Any, llama: Path, adapter: Path, instructions: Path
) -> None:
    folder: Path = cli.folder
    for source in (llama, adapter):
        copy_of(source, source.name)
    (folder / "rows.jsonl").write_bytes(instructions.read_bytes())
    (folder / "recipe.yaml").write_text(RECIPE)
    successes = {
        "adopt": "adapter -o adopted --base llama",
        "quantize": "llama -o base",
        "dequantize": "base -o whole",
        "train": "--base base --data rows.jsonl -o trained --steps 1 --max-length 64 --rank 2",
        "evaluate": "--base base --adapter trained --data rows.jsonl --max-length 64",
        "merge": "llama adapter -o merged",
        "unmerge": "merged -o restored --adapter adapter",
        "stack": "adapter adapter -o stacked --method cat",
        "resize": "adapter -o small --rank 2",
        "extract": "merged llama -o found --rank 4",
        "diff": "adapter stacked",
        "inspect": "trained",
        "plan": "llama",
        "check": "adapter --target peft",
        "verify": "trained",
        "publish": "trained me/model --tag v1 --check --base-model me/model --output-file report.json",
        "pull": "me/model@v1 -o pulled",
        "run": "recipe.yaml",
    }
    assert set(successes) == set(names(commands)), "say how the new command succeeds"
    for command, arguments in successes.items():
        code, stdout, stderr = cli.run([command, *arguments.split()], loud | {"HF_TOKEN": PLANTED})
        assert code == (1 if command == "diff" else 0), (command, stdout, stderr)
        assert stdout
        check_nothing_shows(folder, stdout, stderr)
    assert any(path.startswith("/api/models/me/released/commit") for _, path, _ in cli.hub.requests)


@pytest.mark.parametrize("xet", ["0", "1"])
def test_the_login_token_is_used_and_not_shown(cli: Any, loud: dict[str, str], artifact: Path, xet: str) -> None:
    used = {"HF_TOKEN_PATH": str(cli.folder / "login" / "token"), "HF_TOKEN": "", "HF_HUB_DISABLE_XET": xet}
    for command in ("publish artifact me/model --private", "pull me/model -o pulled", "inspect me/model"):
        code, stdout, stderr = cli.run(command.split(), loud | used)
        assert code == 0, stderr
        check_nothing_shows(cli.folder, stdout, stderr)


def arguments_with(command: str, secret: str) -> list[str]:
    """Arguments that give the secret for every required parameter of a command."""
    found = program.get_command(click.Context(program), command)
    assert found is not None
    arguments = []
    for parameter in found.params:
        if isinstance(parameter, click.Option) and (parameter.required or parameter.name in ("base", "data")):
            arguments += [max(parameter.opts, key=len), "out" if parameter.name == "output" else secret]
        elif isinstance(parameter, click.Argument):
            arguments.append(secret)
    return arguments


@pytest.mark.parametrize("command", names(commands))
def test_no_command_shows_a_token_when_it_fails(
    cli: Any, loud: dict[str, str], artifact: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The arguments are secrets, or the Hub repeats the token that it was sent."""

    def repeat(handler: Any) -> None:
        cli.hub.record(handler.command, handler.path, 403)
        raise RefusalError(403, f"not with {handler.headers.get('Authorization')} at {handler.path}")

    monkeypatch.setattr(local_hub.Handler, "_call_endpoint", repeat)
    mine = names(commands).index(command)  # each command gets two of the forms, and all commands get all
    runs = [[command, f"--token={ARGUMENT}"], [command, *arguments_with(command, "org/name")]]
    runs += [[command, *arguments_with(command, FORMS[mine % len(FORMS)])]]
    runs += [[command, *arguments_with(command, FORMS[(mine + 1) % len(FORMS)]), "--json"]]
    if command == "publish":
        runs += [[command, "artifact", form] for form in (*FORMS, "org/name")]
    for run in runs:
        code, stdout, stderr = cli.run(run, loud | {"HF_TOKEN": PLANTED})
        assert code != 0, (run, stdout, stderr)
        assert stdout or stderr
        check_nothing_shows(cli.folder, stdout, stderr)


def test_tokens_are_redacted_from_the_traceback_of_an_unexpected_error() -> None:
    code = (
        "import adaptkit.cli.main as m\n"
        "def fail(**_): raise AssertionError('Authorization: Bearer " + ARGUMENT + ", " + PLANTED + "')\n"
        "m.cli.main = fail\n"
        "m.main()"
    )
    environment = os.environ | {"HF_TOKEN": PLANTED}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Authorization: Bearer (token), (token)" in done.stderr


def test_no_command_takes_a_token_as_an_option() -> None:
    for command in names(commands):
        found = program.get_command(click.Context(program), command)
        assert found is not None
        for parameter in found.params:
            assert not {"--token", "--hf-token", "--password"} & set(parameter.opts), command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@example.org/x", "https://(token)@example.org/x"),
        (f"Bearer {ARGUMENT}.", "Bearer (token)."),
        (f"a={ARGUMENT}&b", "a=(token)&b"),
        ("models/hf_small, hf_hub_download", "models/hf_small, hf_hub_download"),
        ("me@example.org", "me@example.org"),
        ("abc-correct-horse-xyz", "abc-(token)-xyz"),
        ("the login file's kind", "the (token)'s kind"),
    ],
)
def test_tokens_and_passwords_in_urls_are_redacted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, shown: str
) -> None:
    (tmp_path / "token").write_text("login file\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    assert redact(text) == shown


def test_redaction_works_if_the_home_folder_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "~nobody-of-this-name/token")
    assert redact("as it is") == "as it is"


@pytest.mark.parametrize("before", [(1 << 20) - 1400, (1 << 20) - 700, (1 << 20) - 1])
def test_a_long_token_is_detected_at_any_offset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: int) -> None:
    """A CI job's identity token can have over a thousand characters, and files are read in pieces."""
    identity = "eyJ" + "x7Q" * 500
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", identity)
    file = tmp_path / "tokenizer.json"
    file.write_text(" " * before + identity + " " * (1 << 20))
    assert holds_token(file)
