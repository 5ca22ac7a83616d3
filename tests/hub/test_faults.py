"""After any fault, the exit code is right, and the branch is unchanged or has the complete new artifact.

Each row is one run of the command line, with the unmodified client, against a Hub with a fault. The branch holds an
older artifact beforehand, so that an unchanged branch can be told from an empty one.
"""

import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, File, LocalHub, Repo

from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest

WEIGHTS = "adapter_model.safetensors"
OK, INTEGRITY, UNSAFE, USAGE, AUTHENTICATION, NETWORK, CONFLICT = 0, 3, 5, 2, 6, 7, 8
PUBLISH = ("publish", "new", "me/model", "--tag", "v1")
PULL = ("pull", "me/model", "-o", "pulled")
INFO, REFS, TREE = "/api/models/me/model(/revision/.*)?$", "/refs", "/tree/"
COMMIT, TAG, PUT, PREUPLOAD, RESOLVE = "/commit/", "/tag/", "/lfs/", "/preupload/", f"/resolve/.*{WEIGHTS}"


@dataclass(frozen=True)
class Row:
    """A fault, and the expected outcome.

    Attributes:
        fault: METHOD:PATH_REGEX:KIND[:COUNT].
        code: exit code of the command.
        says: text in the error message, or on stderr if the command succeeds.
        remote: "complete" (the artifact and its tag), "untagged" (only the artifact), or "as it was".
        xet: whether to upload through Xet.
        options: further options of the command.
    """

    fault: str
    code: int
    says: str = ""
    remote: str = "as it was"
    xet: bool = False
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.fault}{' xet' * self.xet}{' '.join(('', *self.options))} -> {self.code}"


AGAIN = "trying again in"
ROWS = (
    # Looking at the repository.
    Row(f"GET:{INFO}:401", AUTHENTICATION, "answered 401"),
    Row(f"GET:{INFO}:404:-1", USAGE, "answered 404"),
    Row(f"GET:{INFO}:409", CONFLICT, "answered 409"),
    *(Row(f"GET:{INFO}:{kind}", OK, AGAIN, "complete") for kind in ("500", "drop", "truncate")),
    *(Row(f"GET:{INFO}:{kind}:-1", NETWORK) for kind in ("429", "nonsense")),
    *(Row(f"GET:{INFO}:{status}+1", OK, "trying again in 1 s", "complete") for status in (503, 429)),
    Row(f"GET:{INFO}:429+3600", NETWORK, "answered 429"),  # too long to wait
    Row(f"GET:{REFS}:500", OK, AGAIN, "complete"),
    Row(f"GET:{TREE}:nonsense:-1", NETWORK, "malformed"),
    Row(f"GET:{TREE}:403", AUTHENTICATION, "answered 403"),
    # Uploading.
    Row(f"POST:{PREUPLOAD}:403:-1", AUTHENTICATION, "answered 403"),
    Row(f"POST:{PREUPLOAD}:503", OK, remote="complete"),
    *(Row(f"PUT:{PUT}:{kind}", OK, remote="complete") for kind in ("lost", "503")),
    Row(f"PUT:{PUT}:403:-1", AUTHENTICATION, "answered 403"),
    Row(f"PUT:{PUT}:501:-1", NETWORK, "answered 501"),
    Row("GET:/xet-write-token/:403:-1", AUTHENTICATION, xet=True),
    # The commit.
    Row(f"POST:{COMMIT}:403", AUTHENTICATION, "answered 403"),
    Row(f"POST:{COMMIT}:404", USAGE, "answered 404"),
    Row(f"POST:{COMMIT}:412", CONFLICT, "answered 412"),
    *(Row(f"POST:{COMMIT}:{kind}", OK, AGAIN, "complete") for kind in ("409", "429", "500", "drop")),
    Row(f"POST:{COMMIT}:409:-1", CONFLICT, "answered 409"),
    *(Row(f"POST:{COMMIT}:{kind}:-1", NETWORK) for kind in ("503", "drop")),
    Row(f"POST:{COMMIT}:lost", OK, remote="complete"),
    Row(f"POST:{COMMIT}:nonsense", OK, remote="complete"),
    Row(f"POST:{COMMIT}:503", OK, AGAIN, "complete", xet=True),
    Row(f"POST:{COMMIT}:lost", OK, remote="complete", xet=True),
    # The tag.
    Row(f"POST:{TAG}:403", AUTHENTICATION, "answered 403", "untagged"),
    *(Row(f"POST:{TAG}:{kind}", OK, remote="complete") for kind in ("500", "lost")),
    Row(f"POST:{TAG}:500:-1", NETWORK, "answered 500", "untagged"),
    Row(f"POST:{TAG}:409:-1", CONFLICT, "answered 409", "untagged"),
    # The check.
    Row(f"GET:{RESOLVE}:corrupt", INTEGRITY, "damaged in transit", "complete", options=("--check",)),
    Row(f"GET:{RESOLVE}:truncate", OK, "", "complete", options=("--check",)),
)
PULLS = (
    Row(f"GET:{INFO}:403", AUTHENTICATION, "answered 403"),
    Row(f"GET:{INFO}:503", OK, AGAIN),
    Row(f"GET:{TREE}:nonsense:-1", NETWORK, "malformed"),
    Row(f"*:{RESOLVE}:401:-1", AUTHENTICATION, "answered 401"),
    Row(f"*:{RESOLVE}:404:-1", USAGE, "answered 404"),
    *(Row(f"HEAD:{RESOLVE}:{kind}", OK) for kind in ("500", "drop")),
    *(Row(f"GET:{RESOLVE}:{kind}", OK) for kind in ("503", "drop", "truncate")),
    Row(f"GET:{RESOLVE}:500:-1", NETWORK, "answered 500"),
    Row(f"GET:{RESOLVE}:corrupt", INTEGRITY, "damaged in transit"),
    Row(f"GET:/resolve/.*{MANIFEST_NAME}:corrupt", INTEGRITY, "damaged in transit"),
)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A Hub's folder with an artifact, by whether Xet is used; filled by the first row that needs it."""
    return {}


@pytest.fixture
def start(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, before: dict[bool, Path], tmp_path_factory: Any
) -> Callable[..., None]:
    """Publish the artifact "old", and make "new"."""

    def begin(xet: bool = False) -> None:
        if xet not in before:
            assert cli("publish", make_artifact("old", old="x"), "me/model", xet=xet).code == 0
            before[xet] = tmp_path_factory.mktemp("before") / "hub"
            shutil.copytree(hub.store.folder, before[xet])
        shutil.rmtree(hub.store.folder)
        shutil.copytree(before[xet], hub.store.folder)
        make_artifact("new", seed=1, new="y")
        hub.requests.clear()

    return begin


def check_complete(repository: Any, tagged: bool) -> None:
    """Require that the branch holds every file of the new artifact's manifest and nothing else."""
    files = repository.files()
    manifest = Manifest.from_bytes((repository.hub.store.blob(files[MANIFEST_NAME])).read_bytes())
    assert files == {record.path: record.sha256 for record in manifest.files} | {MANIFEST_NAME: manifest.sha256}
    assert "new.txt" in files
    assert repository.state["tags"] == ({"v1": repository.head} if tagged else {})
    assert repository.commits == 3  # the Hub's own, the old artifact's, and one more, regardless of retries


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_faulty_publish_has_the_right_exit_code_and_never_leaves_a_partial_artifact(
    cli: Any, start: Callable[..., None], hub: LocalHub, repository: Any, row: Row
) -> None:
    start(row.xet)
    state = repository.state
    hub.faults.append(Fault.parse(row.fault))
    done = cli(*PUBLISH, *row.options, xet=row.xet)
    assert done.code == row.code, done.stdout + done.stderr
    hit = [path for method, path, _ in hub.requests if re.search(row.fault.split(":")[1], path)]
    assert hit, "the fault met no request"
    assert row.says in (done.stderr if row.code == OK else done.report["message"])
    if row.code != OK:
        assert done.report["retryable"] == (row.code == NETWORK)
    if row.remote == "as it was":
        assert repository.state == state
    else:
        check_complete(repository, tagged=row.remote == "complete")
    hub.faults.clear()
    if row.code == NETWORK:  # the same command resumes
        assert cli(*PUBLISH, xet=row.xet).code == OK
        check_complete(repository, tagged=True)


@pytest.mark.parametrize("row", PULLS, ids=str)
def test_a_faulty_pull_has_the_right_exit_code_and_leaves_only_correct_output(
    cli: Any, start: Callable[..., None], hub: LocalHub, repository: Any, tmp_path: Path, row: Row
) -> None:
    start()
    state = repository.state
    hub.faults.append(Fault.parse(row.fault))
    done = cli(*PULL)
    assert done.code == row.code, done.stdout + done.stderr
    assert row.says in (done.stderr if row.code == OK else done.report["message"])
    assert (tmp_path / "pulled").exists() == (row.code == OK)
    assert repository.state == state
    hub.faults.clear()
    if row.code != OK:
        assert cli("pull", "me/model", "-o", "pulled").code == OK
    assert cli("verify", "pulled").code == OK


def test_a_tag_set_concurrently_by_another_job_is_not_moved(
    cli: Any, start: Callable[..., None], hub: LocalHub, repository: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    old, take_fault = repository.head, hub.take_fault

    def tag_first(method: str, path: str) -> str | None:
        if TAG in path:
            repo = Repo(hub.store, "me/model")
            repo.save(repo.state | {"tags": {"v1": old}})
        return take_fault(method, path)

    monkeypatch.setattr(hub, "take_fault", tag_first)
    done = cli(*PUBLISH)
    assert done.code == CONFLICT
    assert old in done.report["message"]
    assert repository.state["tags"] == {"v1": old}
    assert "new.txt" in repository.files()


@pytest.mark.parametrize(
    ("name", "command"),
    [("../evil", PUBLISH), *((name, PULL) for name in ("/etc/passwd", "a\nb", "a\\..\\b", ".git/config", "a/../../b"))],
)
def test_a_hostile_name_in_the_repository_is_refused(
    cli: Any,
    start: Callable[..., None],
    hub: LocalHub,
    repository: Any,
    tmp_path: Path,
    name: str,
    command: tuple[str, ...],
) -> None:
    start()
    repo = Repo(hub.store, "me/model")
    tree = {path: File(**asdict(file)) for path, file in repo.commit(repository.head)["files"].items()}
    repo.move("refs/heads/main", repo.write_commit(tree | {name: tree["adapter_config.json"]}, "evil", "", None))
    state, listed = repository.state, sorted(tmp_path.iterdir())
    done = cli(*command)
    assert done.code == UNSAFE, done.stdout
    assert (
        json.dumps(name)[1:-1].encode().decode("unicode_escape")
        in done.report["message"].encode().decode("unicode_escape")
        or repr(name) in done.report["message"]
    )
    assert repository.state == state
    assert [path for path in sorted(tmp_path.iterdir()) if path not in listed and path.suffix != ".txt"] == []


def test_a_commit_is_retried_only_after_checking_that_the_branch_has_not_moved(
    cli: Any, start: Callable[..., None], hub: LocalHub
) -> None:
    start()
    hub.faults.append(Fault("POST", COMMIT, "503", 3))
    assert cli(*PUBLISH).code == OK
    steps = ["commit" if COMMIT in path else "look" for _, path, _ in hub.requests if COMMIT in path or REFS in path]
    assert steps == ["look", *["commit", "look"] * 3, "commit"]


def test_retries_wait_longer_each_time_are_noted_and_end(cli: Any, start: Callable[..., None], hub: LocalHub) -> None:
    """With the real waiting times."""
    start()
    hub.faults.append(Fault("GET", REFS, "503", -1))
    done = cli(*PUBLISH, hurry=False)
    assert done.code == NETWORK
    assert re.findall(r"trying again in (\S+) s", done.stderr) == ["0.5", "1", "2", "4"]
    assert sum(REFS in path for _, path, _ in hub.requests) == 5


SILENT = """
import json, signal
from pathlib import Path
from adaptkit.errors import NetworkError
from adaptkit.hub import client
from adaptkit.hub.pull import PullOptions, pull
client.SILENCE_S, client.WAITS_S = 0.3, ()
signal.alarm(60)
try:
    pull("me/model", Path("out"), PullOptions(revision=%r))
except NetworkError as error:
    print(json.dumps({"message": error.message}))
"""


@pytest.mark.parametrize("revision", [None, "v1"], ids=["what it is", "its branches and tags"])
def test_a_hub_that_accepts_a_connection_but_never_answers_times_out(cli: Any, revision: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = cli(url=f"http://127.0.0.1:{silent.getsockname()[1]}", code=SILENT % revision)
    assert done.code == 0
    assert done.report["message"].startswith("me/model: no usable answer from the Hub: ")
    assert not (cli.folder / "out").exists()
