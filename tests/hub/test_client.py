"""Environment settings that the Hub's client cannot use, and the errors that it raises for them."""

from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub


@pytest.mark.parametrize(
    "setting",
    [
        {"ALL_PROXY": "socks5://me:planted-secret@127.0.0.1:9"},  # without socksio
        {"HTTP_PROXY": "ftp://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:port"},
        {"SSL_CERT_FILE": "/nowhere"},
        {"HF_ENDPOINT": "localhost:9"},
    ],
    ids=lambda setting: next(iter(setting.items())),
)
def test_unusable_connection_settings_are_a_usage_error(cli: Any, artifact: Path, setting: Any) -> None:
    own = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(cli.folder / "home"), "NO_PROXY": "", "no_proxy": ""}
    code, stdout, stderr = cli.run(["publish", "artifact", "me/model"], own | setting)
    assert (code, stdout) == (2, ""), stderr
    assert stderr.startswith("error: cannot connect to the Hub: ")
    assert next(iter(setting)) in stderr
    assert "planted-secret" not in stderr
    assert cli.hub.requests == []


def test_an_impossible_token_is_an_authentication_error(cli: Any, artifact: Path) -> None:
    done = cli("publish", artifact, "me/model", token="hf_\N{LATIN SMALL LETTER E WITH ACUTE}" + "x" * 30)
    assert done.code == 6
    assert "HF_TOKEN" in done.report["hint"]


TOKEN = "hf_plantedTokenForTests0123"
PUBLISHED = """
import json
import adaptkit
from huggingface_hub.utils import are_progress_bars_disabled

adaptkit.publish("artifact", "me/model")
print(json.dumps({"disabled": are_progress_bars_disabled()}))
"""


def test_the_python_function_shows_no_progress_bars_of_the_client(cli: Any, artifact: Path, repository: Any) -> None:
    done = cli(code=PUBLISHED, xet=True)
    assert (done.stderr, done.report) == ("", {"disabled": False})
    assert repository.commits
    own = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(cli.folder / "home"), "HF_TOKEN": TOKEN}
    asked = own | {"HF_HUB_DISABLE_XET": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    assert cli.run([], asked, PUBLISHED.replace("me/model", "me/other"))[2] != ""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unknown_home_folder_is_a_usage_error_and_not_retried(
    cli: Any, artifact: Path, hub: LocalHub, offline: str
) -> None:
    """As in a container that runs under a number without an entry in /etc/passwd; here another user has no home."""
    assert cli("publish", artifact, "me/model").code == 0
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": "~nobody-has-this-name/home", "HF_HUB_OFFLINE": offline}
    recipe = cli.folder / "recipe.yaml"
    recipe.write_text("name: x\nsources: {base: {repo: me/model}}\nsteps: {loads: {check: base}}\n")
    release = ["run", str(recipe), *(["--offline"] if offline == "1" else [])]
    for command in (["inspect", "me/model"], release):
        code, _, stderr = cli.run(command, own | {"HF_TOKEN": "reader"})
        assert code == 2, stderr
        assert "the home folder, in which huggingface_hub keeps its cache, is unknown\nhint: set HF_HOME" in stderr
        assert "trying again" not in stderr


@pytest.mark.parametrize("without_xet", ["0", "1"])
def test_an_unusable_hf_home_is_reported_as_a_disk_error_and_not_retried(
    cli: Any, artifact: Path, hub: LocalHub, without_xet: str
) -> None:
    assert cli("publish", artifact, "me/model", xet=without_xet == "0").code == 0
    (cli.folder / "file").touch()
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cli.folder / "file" / "home"), "HF_TOKEN": "reader"}
    for command in (["inspect", "me/model"], ["pull", "me/model", "-o", "out"]):
        code, _, stderr = cli.run(command, own | {"HF_HUB_DISABLE_XET": without_xet})
        assert code == 1, stderr
        assert "trying again" not in stderr
        assert "Not a directory" in stderr
        assert "HF_HOME" in stderr
