"""Pulls: the files have the published bytes, or none appear under the final name."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_hub
import pytest
from folders import edit_manifest, tree
from huggingface_hub.hf_api import RepoFile
from local_hub import Fault, LocalHub

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, require_manifest
from adaptkit.errors import IntegrityError
from adaptkit.hub.download import fetch_small
from adaptkit.hub.signature import fetch_signature

TOKEN = "hf_plantedTokenForTests0123"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("xet", [False, True])
def test_pull_gives_the_published_bytes(cli: Any, artifact: Path, repository: Any, tmp_path: Path, xet: bool) -> None:
    sent = cli("publish", artifact, "me/model", "--tag", "v1", xet=xet).report
    done = cli("pull", "me/model@v1", "-o", "pulled", xet=xet)
    assert any("/xet-read-token/" in path for _, path, _ in repository.hub.requests) == xet
    assert done.code == 0, done.stdout
    found = tree(tmp_path / "pulled")
    assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == repository.files("v1")
    ours = tree(artifact)
    assert {name for name in found if found[name] != ours.get(name)} == {MANIFEST_NAME, "README.md"}
    report = done.report
    assert (report["commit"], report["manifest_sha256"]) == (sent["commit"], sent["manifest_sha256"])
    assert report["kind"] == "adapter"
    assert report["files"] == len(found) - 1
    assert report["bytes"] == sum(len(content) for name, content in found.items() if name != MANIFEST_NAME)
    assert report["tensors_root"] == Manifest.from_bytes(ours[MANIFEST_NAME]).tensors_root
    assert cli("verify", "pulled").code == 0
    assert not (tmp_path / "pulled.partial").exists()


def test_a_commit_can_be_pulled_after_the_branch_moved(
    cli: Any, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    first = cli("publish", make_artifact("old"), "me/model").report
    cli("publish", make_artifact("new", seed=1), "me/model")
    done = cli("pull", f"me/model@{first['commit']}", "-o", "pulled")
    assert done.code == 0
    assert done.report["manifest_sha256"] == first["manifest_sha256"]
    assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == (tmp_path / "old" / WEIGHTS).read_bytes()


def test_an_interrupted_pull_fetches_only_what_is_missing_or_damaged(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, tmp_path: Path
) -> None:
    artifact = make_artifact(notes="as published")
    cli("publish", artifact, "me/model")
    hub.faults.append(Fault("*", rf"/resolve/.*{WEIGHTS}", "404", -1))
    assert cli("pull", "me/model", "-o", "pulled").code != 0
    hub.faults.clear()
    hub.requests.clear()
    assert not (tmp_path / "pulled").exists()
    arrived = tmp_path / "pulled.partial" / ".download" / "notes.txt"
    arrived.write_text("damaged here")
    os.utime(arrived, (2e9, 2e9))  # later than it arrived
    assert cli("pull", "me/model", "-o", "pulled").code == 0
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {WEIGHTS, "notes.txt"}
    assert (tmp_path / "pulled" / "notes.txt").read_text() == "as published"


def test_a_pull_without_enough_disk_space_fetches_no_large_files(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, tmp_path: Path
) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", disk]).returncode:
        pytest.skip("mounting in a user namespace is not allowed")
    cli("publish", make_artifact(large="x" * (1 << 18)), "me/model")
    hub.requests.clear()
    pull = f"mount -t tmpfs -o size={1 << 17} tmpfs {disk} && {sys.executable} -m adaptkit pull me/model -o {disk}/out"
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([*own, "sh", "-c", pull], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"needs [\d,]+ more bytes, but its disk has [\d,]+ free", done.stderr)
    assert not any("large.txt" in path or WEIGHTS in path for _, path, _ in hub.requests)


def test_manifests_and_signatures_that_are_too_large_are_not_fetched() -> None:
    """They are read as a whole, so a large one would exhaust memory, and the disk before; no Hub is asked for them."""
    nothing: Any = None
    large = RepoFile(path=MANIFEST_NAME, size=(256 << 20) + 1, oid="0" * 40)
    with pytest.raises(IntegrityError, match=r"^me/model@c: adaptkit-manifest\.json has 268,435,457 bytes, too many"):
        fetch_small(nothing, "me/model", "c", MANIFEST_NAME, {MANIFEST_NAME: large})
    signature = RepoFile(path=SIGNATURE_NAME, size=(1 << 20) + 1, oid="0" * 40)
    with pytest.raises(IntegrityError, match=r"^me/model@c: adaptkit-manifest\.sig has 1,048,577 bytes, too many"):
        fetch_signature(nothing, "me/model", "c", {SIGNATURE_NAME: signature})


def test_an_existing_output_is_refused_and_force_replaces_it(cli: Any, artifact: Path, hub: LocalHub) -> None:
    cli("publish", artifact, "me/model")
    cli("pull", "me/model", "-o", "pulled")
    hub.requests.clear()
    assert cli("pull", "me/model", "-o", "pulled").code == 8
    assert hub.requests == []
    assert cli("pull", "me/model", "-o", "pulled", "--force").code == 0


def _edit(artifact: Path, edit: Callable[[Any], object]) -> None:
    """Change the document of a manifest, as no version of adaptkit would write it."""
    path = artifact / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def _list(artifact: Path, path: str) -> None:
    record = {"path": path, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    _edit(artifact, lambda document: document["files"].append(record))
    _edit(artifact, lambda document: document["files"].sort(key=lambda record: record["path"]))


def _lie(artifact: Path) -> None:
    first, *rest = require_manifest(artifact).tensors
    edit_manifest(artifact, tensors=(replace(first, xxh3_128="0" * 32), *rest))


HOSTILE = ["../outside.txt", "adaptkit-journal.jsonl", ".download/x", "README.md/x"]
WRONG: dict[str, tuple[Callable[[Path, Path], object], int, str]] = {
    "no manifest": (lambda artifact, other: (artifact / MANIFEST_NAME).unlink(), 3, MANIFEST_NAME),
    "a size": (lambda artifact, other: _edit(artifact, lambda d: d["files"][0].update(size="many")), 3, "size"),
    "other weights": (lambda artifact, other: shutil.copy(other / WEIGHTS, artifact), 3, WEIGHTS),
    "another config": (lambda artifact, other: shutil.copy(other / CONFIG, artifact), 3, CONFIG),
    "a fingerprint": (lambda artifact, other: _lie(artifact), 3, "fingerprint"),
    **{path: (lambda artifact, other, path=path: _list(artifact, path), 5, "") for path in HOSTILE},
}
"""What is wrong in a repository -> how an artifact becomes so, exit code, and a text in the message."""


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_match_its_manifest_or_lists_hostile_paths_is_refused(
    cli: Any, make_artifact: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    artifact, other = make_artifact("one", files={"README.md": "x"}), make_artifact("two", seed=1, base="org/bass")
    for name in (WEIGHTS, CONFIG):
        assert (artifact / name).stat().st_size == (other / name).stat().st_size
    spoil, code, says = WRONG[what]
    spoil(artifact, other)
    cli.upload(artifact)
    done = cli("pull", "me/model", "-o", "pulled")
    assert done.code == code, done.stdout
    assert says in done.report["message"]
    assert done.report["hint"]
    assert not (tmp_path / "pulled").exists()


def test_files_not_in_the_manifest_are_not_pulled(cli: Any, artifact: Path, tmp_path: Path) -> None:
    (artifact / "stray.bin").write_bytes(b"x")
    cli.upload(artifact)
    (artifact / "stray.bin").unlink()
    assert cli("pull", "me/model", "-o", "pulled").code == 0
    assert tree(tmp_path / "pulled") == tree(artifact)


def test_failures_to_find_or_access_a_repository_have_their_exit_codes(cli: Any, artifact: Path, hub: LocalHub) -> None:
    cli("publish", artifact, "me/model", "--private")
    assert cli("pull", "me/model", "-o", "pulled", token="").code == 6
    assert cli("pull", "me/absent", "-o", "pulled").code == 2
    assert cli("pull", "me/model@nowhere", "-o", "pulled").code == 2
    assert cli("pull", "no-repository", "-o", "pulled").code == 2
    assert cli("pull", "me/model", "-o", "pulled", token="reader").code == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (None, f"me/model: {WEIGHTS} is not the file that the manifest lists"),
        ("g" * 40, f"the Hub answered with the wrong commit '{'g' * 40}'"),
        ("0" * 40, f"the Hub answered with the wrong commit '{'0' * 40}'"),
    ],
)
def test_an_answer_with_a_wrong_hash_is_refused(
    cli: Any, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str | None, says: str
) -> None:
    commit = cli("publish", artifact, "me/model").report["commit"]
    replaced = commit if wrong else hashlib.sha256((artifact / WEIGHTS).read_bytes()).hexdigest()
    answer = local_hub.canonical_json
    monkeypatch.setattr(
        local_hub,
        "canonical_json",
        lambda value: answer(value).replace(replaced.encode(), (wrong or "0" * 64).encode()),
    )
    done = cli("pull", f"me/model@{commit}", "-o", "pulled")
    assert (done.code, done.report["message"].endswith(says)) == (7 if wrong else 3, True), done.report
    assert not (tmp_path / "pulled").exists()
