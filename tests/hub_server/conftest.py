"""A local Hub in this process, and the unmodified huggingface_hub client in separate processes.

The client reads its environment when it is imported, so each call of `Client` starts a new interpreter.
"""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from local_hub import LocalHub  # noqa: E402 - it is a script, found through the path above

PRELUDE = """
import json, os, warnings
from pathlib import Path
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

api, repo, folder = HfApi(), "me/model", Path(os.environ["CLIENT_FOLDER"])

def add(*names):
    return [Add(name, str(folder / name)) for name in names]

def commit(operations, **options):
    return api.create_commit(repo, operations, commit_message="a title", **options)

def read(name, revision):
    return Path(hf_hub_download(repo, name, revision=revision)).read_bytes()

def head(revision="main"):
    return api.model_info(repo, revision=revision).sha

def failure(call, *args, **options):
    try:
        call(*args, **options)
    except HfHubHTTPError as error:
        return [error.response.status_code, type(error).__name__]
    except Exception as error:
        return [0, type(error).__name__]

def answer(value):
    print("ANSWER", json.dumps(value))
"""


class Client:
    """Runs code against a Hub, and returns what the code passes to `answer`.

    `folder` holds the files that `add` uploads; each instance starts with an empty cache.
    """

    def __init__(self, url: str, home: Path, folder: Path) -> None:
        self.url, self.home, self.folder = url, home, folder
        folder.mkdir(exist_ok=True)

    def __call__(self, code: str, *, xet: bool = False, token: str | None = "secret") -> Any:
        offline = {"TRANSFORMERS_OFFLINE"}  # the client also obeys it
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k not in offline}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "CLIENT_FOLDER": str(self.folder)}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        if done.returncode or len(answers) != 1:
            raise RuntimeError(f"the client failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(answers[0].removeprefix("ANSWER "))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with a write token and a read token."""
    with LocalHub(tmp_path / "hub", tokens={"secret"}, read_tokens={"reader"}) as hub:
        yield hub


@pytest.fixture
def new_client(tmp_path: Path) -> Callable[[str], Client]:
    """Make a client for a URL, with its own cache; all clients upload from tmp_path / "files"."""
    numbers = itertools.count()
    return lambda url: Client(url, tmp_path / f"home-{next(numbers)}", tmp_path / "files")


@pytest.fixture
def client(hub: LocalHub, new_client: Callable[[str], Client]) -> Client:
    """A client for `hub`."""
    return new_client(hub.url)


@pytest.fixture
def hub_script() -> Path:
    """Path of the local Hub's script."""
    return SCRIPTS / "local_hub.py"
