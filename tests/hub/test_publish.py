"""Publishing uploads exactly what the manifest lists, in one commit; after any failure it can be resumed."""

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub, Repo

from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, require_manifest
from adaptkit.errors import IntegrityError, UsageError
from adaptkit.hub.names import check_repo_id
from adaptkit.hub.publish import PublishOptions
from adaptkit.hub.staging import gather, stage

WEIGHTS = "adapter_model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_new_repository_holds_the_manifests_files_the_manifest_and_a_card(
    cli: Any, artifact: Path, repository: Any
) -> None:
    before = digests(artifact)
    done = cli("publish", artifact, "me/model", "--tag", "v1")
    assert done.code == 0, done.stdout
    report, there, here = done.report, repository.files(), digests(artifact)
    assert here == before
    assert set(there) == {*here, "README.md"}
    assert {name for name in here if there[name] != here[name]} == {MANIFEST_NAME}  # it also lists the card
    assert there[MANIFEST_NAME] == report["manifest_sha256"]
    assert repository.state["tags"] == {"v1": report["commit"]}
    assert report["commit"] == repository.head
    assert report["files_added"] == sorted(there)
    assert not report["already_there"]
    assert report["url"].endswith(f"/me/model/tree/{report['commit']}")
    assert repository.commits == 2  # the Hub's own, and ours
    assert not repository.state["private"]


def test_publishing_again_uploads_nothing(cli: Any, artifact: Path, repository: Any) -> None:
    first = cli("publish", artifact, "me/model", "--tag", "v1").report
    sent = len(repository.writes())
    again = cli("publish", artifact, "me/model", "--tag", "v1")
    assert again.code == 0
    assert again.report["already_there"]
    assert again.report["bytes_sent"] == 0
    assert again.report["commit"] == first["commit"]
    assert [path for path in repository.writes()[sent:] if "/tag/" not in path] == []
    assert repository.commits == 2


def test_stale_files_are_deleted_and_equal_ones_are_not_uploaded(
    cli: Any, make_artifact: Callable[..., Path], repository: Any
) -> None:
    cli("publish", make_artifact("old", old="x"), "me/model")
    done = cli("publish", make_artifact("new", seed=1, new="y"), "me/model")
    assert done.code == 0
    assert done.report["files_deleted"] == ["old.txt"]
    assert "adapter_config.json" not in done.report["files_added"]  # the same bytes in both
    assert "old.txt" not in repository.files()
    assert "new.txt" in repository.files()
    assert repository.commits == 3


@pytest.mark.parametrize("name", ["notes.txt", "sub/folder/.env"])
def test_a_stray_file_is_refused_before_anything_is_sent(cli: Any, artifact: Path, repository: Any, name: str) -> None:
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_text("SECRET=1")
    done = cli("publish", artifact, "me/model")
    assert done.code == 3
    assert name in done.report["message"]
    assert repository.hub.requests == []


def test_cache_folders_of_download_tools_are_never_published(cli: Any, artifact: Path, repository: Any) -> None:
    (artifact / ".cache").mkdir()
    (artifact / ".cache" / "token").write_text("SECRET=1")
    assert cli("publish", artifact, "me/model").code == 0
    assert not [name for name in repository.files() if "cache" in name]


def test_a_file_that_changes_after_the_check_is_not_staged(artifact: Path, tmp_path: Path) -> None:
    weights = artifact / "adapter_model.safetensors"
    checked = gather(artifact, require_manifest(artifact), "card")
    (tmp_path / "staging").mkdir()
    staged = {item.record.path: item.source for item in stage(tmp_path / "staging", checked, [weights.name])}
    copy = staged[weights.name]
    assert isinstance(copy, Path)
    assert copy.read_bytes() == weights.read_bytes()
    assert not copy.samefile(weights)
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(IntegrityError, match="while it was being published"):
        stage(tmp_path / "staging", checked, [weights.name])


def test_a_dry_run_changes_nothing_and_reports_what_would_be_sent(
    cli: Any, make_artifact: Callable[..., Path], repository: Any
) -> None:
    cli("publish", make_artifact("old", old="x"), "me/model")
    before, sent = repository.state, len(repository.writes())
    artifact = make_artifact("new", seed=1)
    planned = cli("publish", artifact, "me/model", "--tag", "v1", "--dry-run")
    assert planned.code == 0
    assert planned.report["commit"] is None
    assert repository.state == before
    assert len(repository.writes()) == sent
    done = cli("publish", artifact, "me/model", "--tag", "v1")
    same = ("files_added", "files_deleted", "bytes_sent", "manifest_sha256", "already_there")
    assert [planned.report[key] for key in same] == [done.report[key] for key in same]


def test_a_tag_on_another_commit_is_a_conflict_and_nothing_is_sent(
    cli: Any, make_artifact: Callable[..., Path], repository: Any
) -> None:
    first = cli("publish", make_artifact("old"), "me/model", "--tag", "v1").report
    done = cli("publish", make_artifact("new", seed=1), "me/model", "--tag", "v1")
    assert done.code == 8
    assert "v1" in done.report["message"]
    assert repository.state["tags"] == {"v1": first["commit"]}
    assert repository.head == first["commit"]


def test_a_branch_moved_by_a_concurrent_commit_is_a_conflict_and_keeps_that_commit(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, repository: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("publish", make_artifact("old"), "me/model")
    take_fault = hub.take_fault

    def commit_first(method: str, path: str) -> str | None:
        if "/commit/" in path:  # a different commit arrives after we checked the branch and before our own
            theirs = ("file", {"path": "theirs.txt", "content": "eA==", "encoding": "base64"})
            Repo(hub.store, "me/model").add_commit("main", {"summary": "theirs"}, [theirs], False)
        return take_fault(method, path)

    monkeypatch.setattr(hub, "take_fault", commit_first)
    done = cli("publish", make_artifact("new", seed=1), "me/model", "--tag", "v1")
    assert done.code == 8
    assert not done.report["retryable"]
    assert "theirs.txt" in repository.files()
    assert repository.state["tags"] == {}


@pytest.mark.parametrize("token", ["", "reader", "hf_wrongPlantedToken000"])
def test_publishing_without_a_write_token_is_an_authentication_error(
    cli: Any, artifact: Path, repository: Any, token: str
) -> None:
    done = cli("publish", artifact, "me/model", token=token)
    assert done.code == 6
    assert not repository.state
    assert token != "hf_wrongPlantedToken000" or token not in done.stdout + done.stderr


def test_a_new_branch_starts_from_main_and_leaves_it_alone(
    cli: Any, make_artifact: Callable[..., Path], repository: Any
) -> None:
    first = cli("publish", make_artifact("old"), "me/model").report
    second = cli("publish", make_artifact("new", seed=1), "me/model", "--branch", "release/2").report
    assert repository.state["heads"] == {"main": first["commit"], "release/2": second["commit"]}
    assert repository.files(second["commit"])[MANIFEST_NAME] == second["manifest_sha256"]


def test_private_makes_a_private_repository_and_refuses_a_public_one(cli: Any, artifact: Path, repository: Any) -> None:
    cli("publish", artifact, "me/model", "--private")
    assert repository.state["private"]
    cli("publish", artifact, "me/public")
    done = cli("publish", artifact, "me/public", "--private")
    assert done.code == 8
    assert "public" in done.report["message"]


def test_an_existing_card_is_published_unchanged(cli: Any, make_artifact: Callable[..., Path], repository: Any) -> None:
    artifact = make_artifact()
    assert cli("publish", artifact, "me/model").code == 0
    assert cli("pull", "me/model", "-o", "pulled").code == 0
    assert (artifact.parent / "pulled" / "README.md").is_file()
    refused = cli("publish", "pulled", "me/other", "--base-model", "org/base")
    assert (refused.code, "already has a model card" in refused.report["message"]) == (2, True)
    again = cli("publish", artifact.parent / "pulled", "me/other")
    assert again.code == 0
    manifest = Manifest.from_bytes((artifact.parent / "pulled" / MANIFEST_NAME).read_bytes())
    assert again.report["manifest_sha256"] == manifest.sha256


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "../model", "me/..", "me/a b", "-me/model", "me/m--n"])
def test_an_invalid_repository_name_is_a_usage_error(repo_id: str) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        check_repo_id(repo_id)


@pytest.mark.parametrize("name", ["", "a b", "-x", "refs/heads/main", "a..b", "a/", "x.lock", "0" * 40, "a\n"])
def test_names_that_git_rejects_or_reads_as_a_commit_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        PublishOptions(tag=name)
    with pytest.raises(UsageError):
        PublishOptions(branch=name)


def test_usual_tag_names_are_accepted() -> None:
    for name in ("v1", "v1.0", "release/2024-01", "a+b", "x@y"):
        assert PublishOptions(tag=name).tag == name


def test_an_unavailable_ci_identity_is_an_authentication_error(
    cli: Any, artifact: Path, hub: LocalHub, repository: Any
) -> None:
    code = f"""
import os, sys
os.environ["HF_OIDC_RESOURCE"] = "me/model"
sys.argv = ["adaptkit", "publish", {str(artifact)!r}, "me/model", "--json"]
main()
"""
    done = cli(code=code)
    assert done.code == 6, done.stdout
    assert not repository.state


def test_an_adapter_of_another_tool_can_be_published_after_adopt(
    cli: Any, llama: Path, adapter: Path, repository: Any
) -> None:
    assert cli("publish", adapter, "me/model").code == 3
    assert cli("adopt", adapter, "-o", "ours", "--base", llama).code == 0
    assert cli("publish", "ours", "me/model", "--tag", "v1").code == 0
    there, here = repository.files(), digests(adapter)
    assert {name: there[name] for name in here} == here
    assert cli("pull", "me/model@v1", "-o", "pulled").code == 0
    assert cli("merge", llama, "pulled", "-o", "merged").code == 0


def test_files_are_sent_from_a_private_temporary_folder_that_is_gone_afterwards(
    cli: Any, artifact: Path, hub: LocalHub, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    seen: list[tuple[str, int, bool]] = []

    class Requests(list[Any]):
        """Looks at the temporary folders when a commit is sent."""

        def append(self, request: Any) -> None:
            super().append(request)
            if "/commit/" in request[1]:
                seen.extend(
                    (path.name, stat.S_IMODE(path.stat().st_mode), (path / WEIGHTS).is_file())
                    for path in temporary.glob("adaptkit-*")
                )

    hub.requests = Requests()
    code = f"""
import tempfile
tempfile.tempdir = {str(temporary)!r}  # it is cached, so TMPDIR would have no effect in a forked process
sys.argv = ["adaptkit", "publish", {str(artifact)!r}, "me/model", "--json"]
main()
"""
    done = cli(code=code)
    assert done.code == 0, done.stdout
    assert seen
    for name, mode, has_weights in seen:
        assert (name.startswith("adaptkit-publish-"), mode, has_weights) == (True, 0o700, True)
    assert not list(temporary.glob("adaptkit-*"))
