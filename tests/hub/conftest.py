"""A local Hub in this process, and the real command line, with the real client, in processes of their own.

huggingface_hub reads its environment when it is imported, so each command needs its own process. To avoid importing
torch in each, a server process imports it once and forks a child for each command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from signing_keys import write_keys

from adaptkit.checkpoint.adapter import write_adapter
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.manifest import Manifest, Parent, Target
from adaptkit.numerics.lora import LowRank

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from local_hub import LocalHub  # noqa: E402 - it is a script, found through the path above

TOKEN = "hf_plantedTokenForTests0123"
SERVER = """
import json, os, sys
from preloading import imports_for_forks

with imports_for_forks():
    import adaptkit.checkpoint.adapter, adaptkit.checkpoint.integrity, command_line, yaml
    from adaptkit.cli.main import main

    command_line.load("hub")

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(job["environment"])
        for stream, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(job["folder"])
        sys.argv = ["adaptkit", *job["arguments"]]
        try:
            if job["code"]:
                exec(job["code"])
                code = 0
            else:
                if job["hurry"]:
                    import time
                    sleep = time.sleep
                    time.sleep = lambda wait_s: sleep(wait_s / 50)  # adaptkit's and the client's waits before retries
                code = 1
                main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

UPLOAD = """
import json
from pathlib import Path
from huggingface_hub import HfApi, CommitOperationAdd
api = HfApi()
api.create_repo("me/model", exist_ok=True)
files = [CommitOperationAdd(path.name, path) for path in sorted(Path(%r).iterdir())]
print(json.dumps({"commit": api.create_commit("me/model", files, commit_message="by hand").oid}))
"""


@dataclass(frozen=True)
class Done:
    """A finished command: its exit code, its output, and its JSON document (the error's fields if it failed)."""

    code: int
    stdout: str
    stderr: str
    report: dict[str, Any]


class Cli:
    """Runs ``adaptkit`` with its own Hub, token and home."""

    def __init__(self, server: "subprocess.Popen[str]", hub: LocalHub, folder: Path) -> None:
        self.server, self.hub, self.folder = server, hub, folder

    def __call__(
        self,
        *arguments: object,
        token: str = TOKEN,
        url: str = "",
        code: str = "",
        xet: bool = False,
        hurry: bool = True,
    ) -> Done:
        """Run a command with --json, or ``code``, which itself prints a JSON document; ``hurry`` shortens all waits."""
        environment = {"HF_ENDPOINT": url or self.hub.url, "HF_HOME": str(self.folder / "home"), "HF_TOKEN": token}
        environment |= {"HF_HUB_DISABLE_XET": str(int(not xet)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        listed = [] if code else [*map(str, arguments), "--json"]
        exit_code, stdout, stderr = self.run(listed, environment, code, hurry)
        assert "Traceback" not in stderr, stderr
        document = json.loads(stdout)
        return Done(exit_code, stdout, stderr, document.get("error", document))

    def upload(self, folder: Path) -> None:
        """Commit the files of a folder to me/model by hand, as they are."""
        assert "commit" in self(code=UPLOAD % str(folder)).report

    def run(
        self, arguments: list[str], environment: dict[str, str], code: str = "", hurry: bool = True
    ) -> tuple[int, str, str]:
        """Run a command with no other settings of the Hub than these; return its exit code, stdout and stderr."""
        files = {name: str(self.folder / f"{name}.txt") for name in ("stdout", "stderr")}
        job = files | {"environment": environment, "arguments": arguments, "code": code, "hurry": hurry}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job | {"folder": str(self.folder)}) + "\n")
        self.server.stdin.flush()
        exit_code = int(self.server.stdout.readline())
        return exit_code, Path(files["stdout"]).read_text(), Path(files["stderr"]).read_text()


@pytest.fixture(scope="session")
def server() -> Iterator["subprocess.Popen[str]"]:
    """The process that forks; it has none of the outer environment's Hub settings and tokens."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    environment["PYTHONPATH"], pipe = f"{ROOT}:{ROOT / 'fixtures'}", subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment) as run:
        yield run
        assert run.stdin is not None
        run.stdin.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with a write token and a read token."""
    with LocalHub(tmp_path / "hub", tokens={TOKEN}, read_tokens={"reader"}) as hub:
        yield hub


@pytest.fixture
def cli(server: "subprocess.Popen[str]", hub: LocalHub, tmp_path: Path) -> Cli:
    """The command line, in ``tmp_path``, with a write token."""
    return Cli(server, hub, tmp_path)


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Path]:
    """Make a tiny adapter with its manifest."""

    def make(
        name: str = "artifact",
        seed: int = 0,
        base: str = "org/base",
        files: Mapping[str, str] = MappingProxyType({}),
        **texts: str,
    ) -> Path:
        files = {f"{stem}.txt": text for stem, text in texts.items()} | dict(files)
        random = torch.Generator().manual_seed(seed)
        modules = {
            f"model.layers.{i}.q_proj": LowRank.of_tensors(
                torch.randn(2, 24, generator=random), torch.randn(16, 2, generator=random), 2.0
            )
            for i in range(2)
        }
        with Output(tmp_path / name, [name, seed, base, files]) as out:
            write_adapter(out, modules, base)
            for path, text in files.items():
                out.write(path, text.encode())
            manifest = Manifest(
                kind="adapter",
                operation={"name": "train", "options": {"seed": seed, "note": "```| |`"}},
                files=tuple(out.files),
                tensors=tuple(out.tensors),
                parents=(Parent("base", "quantized", "0" * 64),),
                targets=tuple(Target(module, (16, 24)) for module in modules),
            )
            out.publish(manifest)
        return tmp_path / name

    return make


@pytest.fixture
def artifact(make_artifact: Callable[..., Path]) -> Path:
    """A tiny adapter."""
    return make_artifact()


class Repository:
    """A repository, read from the local Hub's folder."""

    def __init__(self, hub: LocalHub, repo_id: str) -> None:
        self.hub, self.folder = hub, hub.store.folder / "repos" / repo_id

    @property
    def state(self) -> dict[str, Any]:
        """Heads, tags and visibility; empty if there is no such repository."""
        path = self.folder / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def head(self) -> str:
        """The commit of main."""
        return str(self.state["heads"]["main"])

    def files(self, revision: str = "main") -> dict[str, str]:
        """The sha256 of every file of a branch, tag or commit, except .gitattributes, which the Hub adds."""
        commit = self.state["heads"].get(revision) or self.state["tags"].get(revision) or revision
        listed = json.loads((self.folder / "commits" / f"{commit}.json").read_text())["files"]
        return {name: file["sha256"] for name, file in listed.items() if name != ".gitattributes"}

    @property
    def commits(self) -> int:
        """Number of commits."""
        return len(list((self.folder / "commits").iterdir()))

    def writes(self) -> list[str]:
        """The requests to the hub so far that could change something."""
        harmless = ("/api/validate-yaml", "/preupload/", "/paths-info/")
        requests = [path for method, path, _ in self.hub.requests if method not in ("GET", "HEAD")]
        return [path for path in requests if not any(part in path for part in harmless)]


@pytest.fixture
def repository(hub: LocalHub) -> Repository:
    """The repository me/model, which may not exist."""
    return Repository(hub, "me/model")


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Make a key; return the files of its private and public parts."""
    return lambda name: write_keys(tmp_path, name)
