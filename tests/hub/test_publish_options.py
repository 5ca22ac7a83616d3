"""Pull requests, signatures, checks, reports, and content that must never be published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import tree
from local_hub import Fault, LocalHub

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME
from adaptkit.checkpoint.signing import Trust, check_signature
from adaptkit.errors import UsageError
from adaptkit.hub.publish import PublishOptions

Make = Callable[..., Path]
Keys = Callable[[str], tuple[Path, Path]]
SHAPED = "hf_" + "aB3" * 11 + "x"
"""A text that looks like a token of the Hub."""


# --- LFS and Xet


@pytest.mark.parametrize("xet", [False, True])
def test_lfs_and_xet_publish_the_same_files_and_a_second_run_uploads_nothing(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any, xet: bool
) -> None:
    first = cli("publish", artifact, "me/model", "--tag", "v1", xet=xet)
    assert first.code == 0, first.stdout
    uploads = [path for method, path, _ in hub.requests if method == "PUT" or "/xet-write-token/" in path]
    assert uploads
    assert all(("/xet-write-token/" in path) == xet for path in uploads)
    hub.requests.clear()
    received = hub.bytes_received
    again = cli("publish", artifact, "me/model", "--tag", "v1", xet=xet)
    assert again.report["already_there"]
    assert {method for method, path, _ in hub.requests if TAG not in path} <= {"GET", "HEAD"}
    assert hub.bytes_received - received < 100
    other = cli("publish", artifact, "me/other", xet=not xet).report
    assert other["manifest_sha256"] == first.report["manifest_sha256"]


TAG = "/tag/"


# --- pull requests


def test_a_pull_request_leaves_main_alone(cli: Any, make_artifact: Make, repository: Any) -> None:
    old = cli("publish", first := make_artifact("old"), "me/model").report
    asked = cli("publish", make_artifact("new", seed=1), "me/model", "--pr")
    assert asked.code == 0, asked.stdout
    assert asked.report["pull_request"] == 1
    assert asked.report["url"].endswith("/me/model/discussions/1")
    assert repository.head == old["commit"]
    assert repository.files(asked.report["commit"])[MANIFEST_NAME] == asked.report["manifest_sha256"]
    assert cli("pull", "me/model@refs/pr/1", "-o", "pulled").report["commit"] == asked.report["commit"]
    assert cli("publish", first, "me/model", "--pr").report["already_there"]  # main holds it


@pytest.mark.parametrize(("fault", "code", "requests"), [("lost", 7, 1), ("503", 0, 1), ("drop", 7, 0), ("412", 8, 0)])
def test_a_pull_request_is_asked_for_again_only_if_the_hub_refused_it(
    cli: Any, make_artifact: Make, hub: LocalHub, repository: Any, fault: str, code: int, requests: int
) -> None:
    cli("publish", make_artifact("old"), "me/model")
    hub.faults.append(Fault("POST", "/commit/", fault))
    done = cli("publish", make_artifact("new", seed=1), "me/model", "--pr")
    assert done.code == code
    assert len(repository.state["discussions"]) == requests
    assert code != 7 or "look at the repository's pull requests" in done.report["hint"]


def test_a_pull_request_needs_a_repository_and_excludes_other_targets(
    cli: Any, artifact: Path, repository: Any
) -> None:
    for options in ((), ("--dry-run",)):
        assert cli("publish", artifact, "me/model", "--pr", *options).code == 2
    assert not repository.state
    for other in ({"tag": "v1"}, {"private": True}, {"branch": "next"}):
        with pytest.raises(UsageError, match="pull request"):
            PublishOptions(pull_request=True, **other)


# --- signatures


def test_a_signature_is_published_pulled_verified_and_kept_by_a_second_run(
    cli: Any, artifact: Path, repository: Any, keys: Keys, tmp_path: Path
) -> None:
    (private, public), (_, stranger) = keys("mine"), keys("stranger")
    first = cli("publish", artifact, "me/model", "--sign", private, "--check")
    assert first.code == 0, first.stdout
    assert first.report["signed"]
    assert first.report["checked"]
    assert SIGNATURE_NAME in repository.files()
    again = cli("publish", artifact, "me/model", "--sign", private).report
    assert again["already_there"]
    assert again["commit"] == first.report["commit"]
    assert cli("publish", artifact, "me/model").report["already_there"]  # the signature is not removed
    done = cli("pull", "me/model", "-o", "pulled", "--public-key", public)
    assert done.code == 0, done.stdout
    assert done.report["signed_by"]
    manifest = (tmp_path / "pulled" / MANIFEST_NAME).read_bytes()
    check_signature(manifest, tmp_path / "pulled" / SIGNATURE_NAME, Trust(public_key=public))
    refused = cli("pull", "me/model", "-o", "other", "--public-key", stranger)
    assert refused.code == 3
    assert not (tmp_path / "other").exists()
    assert cli("publish", tmp_path / "pulled", "me/mirror").report["signed"]
    assert cli("pull", "me/mirror", "-o", "again", "--public-key", public).code == 0


def test_a_dry_run_says_that_a_keyless_signature_would_be_new(cli: Any, artifact: Path, keys: Keys) -> None:
    cli("publish", artifact, "me/model", "--sign", keys("mine")[0], "--tag", "v1")
    told = cli("publish", artifact, "me/model", "--sign-keyless", "--dry-run").report
    assert told["files_added"] == [SIGNATURE_NAME]
    assert told["files_deleted"] == []
    assert told["signed"]
    assert not told["already_there"]
    assert cli("publish", artifact, "me/model", "--sign-keyless", "--tag", "v1", "--dry-run").code == 8


def test_a_new_key_replaces_the_signature_and_a_new_artifact_removes_it(
    cli: Any, make_artifact: Make, repository: Any, keys: Keys
) -> None:
    artifact = make_artifact()
    cli("publish", artifact, "me/model", "--sign", keys("one")[0])
    second = cli("publish", artifact, "me/model", "--sign", keys("two")[0]).report
    assert second["files_added"] == [SIGNATURE_NAME]
    unsigned = cli("publish", make_artifact("next", seed=1), "me/model").report
    assert SIGNATURE_NAME in unsigned["files_deleted"]
    assert not unsigned["signed"]
    assert cli("pull", "me/model", "-o", "pulled", "--public-key", keys("one")[1]).code == 3


def test_a_signature_that_adding_a_card_would_invalidate_is_refused(cli: Any, artifact: Path, hub: LocalHub) -> None:
    (artifact / SIGNATURE_NAME).write_text("{}")
    done = cli("publish", artifact, "me/model")
    assert done.code == 2
    assert "--sign" in done.report["hint"]


def test_an_unusable_key_is_refused_before_anything_is_uploaded(
    cli: Any, artifact: Path, repository: Any, tmp_path: Path
) -> None:
    cli("publish", artifact, "me/model")
    state = repository.state
    (tmp_path / "key.pem").write_text("nonsense")
    assert cli("publish", artifact, "me/model", "--sign", tmp_path / "key.pem", "--tag", "v1").code == 2
    assert cli("publish", artifact, "me/model", "--sign", tmp_path / "absent.pem", "--tag", "v1").code == 2
    assert repository.state == state


# --- reports


def test_the_output_file_holds_what_json_prints(cli: Any, artifact: Path, tmp_path: Path) -> None:
    done = cli("publish", artifact, "me/model", "--tag", "v1", "--output-file", tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == done.report
    assert {"commit", "tag", "manifest_sha256"} <= set(written)
    again = cli("publish", artifact, "me/model", "--output-file", tmp_path / "report.json")
    assert (again.code, json.loads((tmp_path / "report.json").read_text())) == (0, again.report)


def test_a_dry_run_writes_no_output_file_and_a_bad_path_is_refused_first(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any, tmp_path: Path
) -> None:
    assert cli("publish", artifact, "me/model", "--dry-run", "--output-file", tmp_path / "r.json").code == 0
    assert not (tmp_path / "r.json").exists()
    hub.requests.clear()
    before = tree(artifact)
    inside = [artifact / name for name in ("adapter_config.json", MANIFEST_NAME, "report.json", ".cache")]
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "absent" / "r.json", tmp_path, tmp_path / "loop", tmp_path / ("r" * 300), *inside):
        assert cli("publish", artifact, "me/model", "--output-file", place).code == 2
    assert cli("publish", tmp_path / "loop", "me/model", "--output-file", tmp_path / "r.json").code == 2
    assert hub.requests == []
    assert tree(artifact) == before


# --- content that is never published


def place_in(artifact: Path, where: str) -> None:
    """Put a text that looks like a token into a file of an artifact, or its manifest, and update the manifest."""
    from adaptkit.checkpoint.manifest import FileRecord, Manifest
    from adaptkit.checkpoint.writer import write_file

    manifest = Manifest.from_bytes((artifact / MANIFEST_NAME).read_bytes())
    records = {record.path: record for record in manifest.files}
    if where == "operation":
        changed = Manifest(manifest.kind, {"name": "train", "options": {"x": SHAPED}}, manifest.files, manifest.tensors)
    else:
        content = (artifact / where).read_bytes() if where in records else b""
        if where == "adapter_config.json":
            content = json.dumps(json.loads(content) | {"note": f"https://{SHAPED}@example.org"}).encode()
        elif where == "adapter_model.safetensors":
            header_bytes = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + header_bytes]) | {"__metadata__": {"by": SHAPED}}
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + content[8 + header_bytes :]
        else:
            content = b"x" * ((1 << 20) - 20) + f" {SHAPED} ".encode()  # across two of the pieces that are read
        records[where] = write_file(artifact, where, content)
        files: tuple[FileRecord, ...] = tuple(records.values())
        changed = Manifest(manifest.kind, manifest.operation, files, manifest.tensors)
    (artifact / MANIFEST_NAME).write_bytes(changed.to_bytes())


@pytest.mark.parametrize("where", ["notes.txt", "adapter_config.json", "adapter_model.safetensors", "operation"])
def test_a_token_in_a_file_of_the_artifact_is_not_published(
    cli: Any, artifact: Path, repository: Any, where: str
) -> None:
    place_in(artifact, where)
    done = cli("publish", artifact, "me/model")
    assert done.code == 5, done.stdout
    assert (MANIFEST_NAME if where == "operation" else where) in done.report["message"]
    assert SHAPED not in done.stdout + done.stderr
    assert repository.hub.requests == []


def test_the_token_in_use_is_detected_in_any_format(cli: Any, make_artifact: Make, repository: Any) -> None:
    artifact = make_artifact(notes="the password is correcthorse")
    done = cli("publish", artifact, "me/model", token="correcthorse")
    assert done.code == 5
    assert "correcthorse" not in done.stdout + done.stderr
    assert repository.hub.requests == []


def test_a_hidden_file_is_not_published_even_if_the_manifest_lists_it(
    cli: Any, artifact: Path, repository: Any
) -> None:
    place_in(artifact, "sub/.netrc")
    done = cli("publish", artifact, "me/model")
    assert done.code == 5
    assert "sub/.netrc" in done.report["message"]
    assert repository.hub.requests == []


@pytest.mark.parametrize("repo", [f"me/{SHAPED}", f"https://user:{SHAPED}@example.org/me/model"])
def test_a_token_as_a_name_is_refused_and_not_repeated(cli: Any, artifact: Path, hub: LocalHub, repo: str) -> None:
    for command in (["publish", artifact, repo], ["pull", repo, "-o", "x"], ["inspect", repo]):
        done = cli(*command)
        assert done.code == 2, done.stdout
        assert SHAPED not in done.stdout + done.stderr
    assert hub.requests == []
