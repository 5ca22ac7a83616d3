"""The local Hub behaves like the Hub, as seen by the unmodified huggingface_hub client."""

import array
import base64
import hashlib
import http.client
import importlib.util
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

WRITER = {"Authorization": "Bearer secret"}
needs_xet = pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")
BATCH = "/me/model.git/info/lfs/objects/batch"


def some_files(folder: Path) -> dict[str, bytes]:
    """Write files of all kinds: text, floats (Xet groups their bytes), repetitions, noise, and an empty file."""
    chance = random.Random(11)
    floats = array.array("f", (chance.gauss(0, 1) for _ in range(100_000))).tobytes()
    files = {
        "README.md": b"---\nlicense: apache-2.0\n---\n# \xc3\xa9tude\n",
        "weights/model-00001.safetensors": floats + bytes(200_000) + b"tail",
        "weights/model-00002.safetensors": chance.randbytes(300_000) + b"again and again " * 20_000,
        "small.bin": b"\0\1\2",
        "empty.bin": b"",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def some_file(client: Any, name: str = "noise.bin", size: int = 100_000) -> bytes:
    """Write one file for a client to upload."""
    content = random.Random(name).randbytes(size)
    (client.folder / name).write_bytes(content)
    return content


def send(
    hub: LocalHub, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a raw request, such as no client would send."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rsplit(":", 1)[1]), timeout=20)
    try:
        connection.request(method, target.removeprefix(hub.url), body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def send_json(hub: LocalHub, target: str, value: Any) -> tuple[int, Any]:
    status, _, body = send(hub, "POST", target, json.dumps(value).encode(), WRITER)
    return status, json.loads(body or b"null")


def send_commit(hub: LocalHub, *lines: tuple[str, dict[str, Any]], **header: str) -> tuple[int, Any]:
    """Commit to main of me/model, bypassing the client's checks."""
    keyed = [("header", {"summary": "raw"} | header), *lines]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in keyed)
    status, _, answer = send(hub, "POST", "/api/models/me/model/commit/main", body, WRITER)
    return status, json.loads(answer)


def text_file(path: str, content: bytes = b"text") -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}


def head(hub: LocalHub, revision: str = "main") -> str:
    status, _, body = send(hub, "GET", f"/api/models/me/model/revision/{revision}", headers=WRITER)
    assert status == 200
    return str(json.loads(body)["sha"])


def count(hub: LocalHub, pattern: str) -> int:
    """Count the requests so far whose `METHOD path status` the pattern finds."""
    return sum(re.search(pattern, f"{method} {path} {status}") is not None for method, path, status in hub.requests)


@pytest.fixture
def repo(hub: LocalHub) -> str:
    """Create the repository me/model; return its first commit."""
    assert send_json(hub, "/api/repos/create", {"name": "model", "organization": "me"})[0] == 200
    return head(hub)


# --- uploads and downloads


@pytest.mark.parametrize("xet", [pytest.param(False, id="lfs"), pytest.param(True, id="xet", marks=needs_xet)])
def test_files_uploaded_by_lfs_or_xet_are_listed_alike_and_downloaded_as_they_were(
    hub: LocalHub, new_client: Any, repo: str, xet: bool
) -> None:
    uploader = new_client(hub.url)
    files = some_files(uploader.folder)
    done = uploader(
        f"""
        info = commit(add(*{sorted(files)}), parent_commit={repo!r})
        tree = {{e.path: e for e in api.list_repo_tree(repo, revision=info.oid, recursive=True) if hasattr(e, "size")}}
        answer({{
            "oid": info.oid,
            "sha256": {{path: entry.lfs.sha256 for path, entry in tree.items() if entry.lfs}},
            "git": {{path: entry.blob_id for path, entry in tree.items() if not entry.lfs}},
            "sizes": {{path: entry.size for path, entry in tree.items()}},
        }})
        """,
        xet=xet,
    )
    assert (count(hub, "GET .*/xet-write-token/.* 200") > 0) == xet
    assert (count(hub, "PUT /lfs/") > 0) == (not xet)
    large = {path for path in files if path.endswith((".safetensors", "small.bin"))}
    assert done["sha256"] == {path: hashlib.sha256(files[path]).hexdigest() for path in large}
    for path in set(files) - large:
        assert done["git"][path] == hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
    assert {path: done["sizes"][path] for path in files} == {path: len(content) for path, content in files.items()}
    assert set(done["sizes"]) == {*files, ".gitattributes"}

    for downloads_with_xet in (True,) if xet else (False, True):
        code = f"""
        answer([{{name: read(name, {done["oid"]!r}).hex() for name in {sorted(files)}}},
                len(api.verify_repo_checksums(repo, revision={done["oid"]!r}).mismatches)])
        """
        found, mismatches = new_client(hub.url)(code, xet=downloads_with_xet)
        assert {name: bytes.fromhex(content) for name, content in found.items()} == files
        assert mismatches == 0
    if xet:  # the server does not read what hf_xet stores
        assert new_client(hub.url)("answer(failure(read, 'small.bin', 'main'))") == [501, "HfHubHTTPError"]


def test_range_and_head_requests_return_what_they_ask_for(hub: LocalHub, client: Any, repo: str) -> None:
    content = some_file(client)
    oid = client("answer(commit(add('noise.bin')).oid)")
    target = f"/me/model/resolve/{oid}/noise.bin"
    ranges = {"0-9": content[:10], "99990-": content[-10:], "-7": content[-7:], "5-999999": content[5:]}
    for asked, wanted in ranges.items():
        status, headers, body = send(hub, "GET", target, headers={"Range": f"bytes={asked}"})
        assert (status, body) == (206, wanted)
        assert headers["Content-Range"].endswith("/100000")
    status, headers, _ = send(hub, "GET", target, headers={"Range": "bytes=100000-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */100000")
    status, headers, body = send(hub, "HEAD", "/me/model/resolve/main/noise.bin")
    assert (status, body, headers["X-Repo-Commit"], headers["X-Linked-Size"]) == (200, b"", oid, "100000")
    assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{hashlib.sha256(content).hexdigest()}"'


# --- commits


def test_a_commit_on_a_stale_parent_is_refused_and_changes_nothing(hub: LocalHub, client: Any, repo: str) -> None:
    some_file(client, "a.txt"), some_file(client, "b.txt")
    done = client(
        f"""
        first = commit(add("a.txt"), parent_commit={repo!r}).oid
        answer([first, failure(commit, add("b.txt"), parent_commit={repo!r}), api.list_repo_files(repo)])
        """
    )
    assert done == [head(hub), [412, "HfHubHTTPError"], [".gitattributes", "a.txt"]]


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", ".git/config", "a/.git/b", "", "a\0b", "README.md/x"])
def test_paths_that_git_cannot_check_out_are_refused(hub: LocalHub, repo: str, path: str) -> None:
    status, answer = send_commit(hub, text_file("README.md"), text_file(path))
    assert (status, head(hub)) == (400, repo)
    assert "error" in answer


def test_a_commit_refuses_content_that_was_not_uploaded(hub: LocalHub, repo: str) -> None:
    absent = {"path": "w.bin", "algo": "sha256", "oid": "ab" * 32, "size": 5}
    status, answer = send_commit(hub, ("lfsFile", absent))
    assert (status, head(hub)) == (400, repo)
    assert "ab" * 32 in answer["error"]


def test_an_lfs_upload_is_checked_on_arrival(hub: LocalHub, repo: str) -> None:
    content = b"the right bytes"
    oid = hashlib.sha256(content).hexdigest()
    asked = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}], "hash_algo": "sha256"}
    [described] = send_json(hub, BATCH, asked)[1]["objects"]
    href = described["actions"]["upload"]["href"]
    for wrong in (b"the wrong bytes", content[:-1], content + b"!"):
        assert send(hub, "PUT", href, wrong)[0] == 400
    assert send(hub, "PUT", href, content)[0] == 200
    assert send_json(hub, BATCH, asked)[1]["objects"] == [{"oid": oid, "size": len(content)}]


# --- tags, branches and pull requests


def test_creating_an_existing_tag_or_branch_conflicts_and_keeps_its_target(
    hub: LocalHub, client: Any, repo: str
) -> None:
    oid = send_commit(hub, text_file("a.txt"))[1]["commitOid"]
    done = client(
        f"""
        answer([
            api.create_tag(repo, tag="v1", revision={repo!r}),
            failure(api.create_tag, repo, tag="v1", revision="main"),
            api.create_tag(repo, tag="v1", revision="main", exist_ok=True),
            api.create_branch(repo, branch="release/1", revision="v1"),
            failure(api.create_branch, repo, branch="release/1"),
            api.create_branch(repo, branch="release/1", exist_ok=True),
            failure(api.create_tag, repo, tag="v2", revision="nowhere"),
            failure(api.create_tag, repo, tag="../v2"),
            head("v1"), head("release/1"), head(),
        ])
        """
    )
    conflict = [409, "HfHubHTTPError"]
    lost = [404, "RevisionNotFoundError"]
    assert done[:8] == [None, conflict, None, None, conflict, None, lost, [400, "BadRequestError"]]
    assert done[8:] == [repo, repo, oid]


def test_a_pull_request_holds_its_commits_and_leaves_main_alone(hub: LocalHub, client: Any, repo: str) -> None:
    some_file(client), some_file(client, "a.txt")
    done = client(
        """
        first = commit(add("noise.bin"), create_pr=True)
        second = commit(add("a.txt"), revision=first.pr_revision)
        answer([first.pr_revision, first.pr_num, api.list_repo_files(repo, revision="refs/pr/1"),
                head("refs/pr/1") == second.oid])
        """
    )
    assert done == ["refs/pr/1", 1, [".gitattributes", "a.txt", "noise.bin"], True]
    assert head(hub) == repo


# --- repositories and access


def test_creating_a_repository_twice_conflicts_unless_exist_ok_is_set(hub: LocalHub, client: Any, repo: str) -> None:
    done = client("answer([failure(api.create_repo, repo), api.create_repo(repo, exist_ok=True).repo_id])")
    assert done == [[409, "HfHubHTTPError"], "me/model"]
    assert head(hub) == repo


def test_missing_repositories_revisions_and_entries_have_specific_errors(client: Any, repo: str) -> None:
    done = client(
        """
        answer([failure(api.model_info, "me/nothing"), failure(head, "nowhere"), failure(read, "nothing.txt", "main")])
        """
    )
    assert done == [
        [404, "RepositoryNotFoundError"],
        [404, "RevisionNotFoundError"],
        [404, "RemoteEntryNotFoundError"],
    ]


def test_a_private_repository_needs_a_token_and_writing_needs_a_write_token(client: Any, new_client: Any) -> None:
    some_file(client, "a.txt")
    client("api.create_repo(repo, private=True); answer(commit(add('a.txt')).oid)")
    code = "answer([failure(read, 'a.txt', 'main'), failure(head), failure(commit, add('a.txt'))])"
    assert [status for status, _ in new_client(client.url)(code, token=None)] == [401, 401, 401]
    assert [status for status, _ in new_client(client.url)(code, token="stolen")] == [401, 401, 401]
    assert new_client(client.url)(code, token="reader") == [None, None, [403, "HfHubHTTPError"]]
    roles = "answer(failure(api.whoami) or api.whoami()['auth']['accessToken']['role'])"
    assert [client(roles, token=token) for token in ("secret", "reader", "stolen")][:2] == ["write", "read"]
    assert client(roles, token="stolen")[0] == 401


# --- faults


def test_drop_prevents_a_commit_and_lost_only_its_answer(hub: LocalHub, client: Any, repo: str) -> None:
    some_file(client, "a.txt")
    code = f"answer(failure(lambda: commit(add('a.txt'), parent_commit={repo!r})))"
    hub.faults.append(Fault("POST", "/commit/main", "drop"))
    assert client(code) == [0, "RemoteProtocolError"]
    assert head(hub) == repo
    hub.faults.append(Fault("POST", "/commit/main", "lost"))
    assert client(code) == [0, "RemoteProtocolError"]
    assert head(hub) != repo
    assert client(f"answer(commit(add('a.txt'), parent_commit={repo!r}).oid)") == head(hub)


def test_a_truncated_download_is_resumed_by_range(hub: LocalHub, client: Any, repo: str) -> None:
    content = some_file(client, size=24 << 20)  # the client saves what it received in steps of 10 MiB
    oid = client("answer(commit(add('noise.bin')).oid)")
    hub.faults.append(Fault("GET", r"/resolve/.*noise\.bin", "truncate"))
    code = f"import hashlib; answer(hashlib.sha256(read('noise.bin', {oid!r})).hexdigest())"
    assert client(code) == hashlib.sha256(content).hexdigest()
    assert [status for method, path, status in hub.requests if method == "GET" and "/resolve/" in path] == [200, 206]


def test_a_corrupt_download_has_the_right_size_and_one_wrong_bit(hub: LocalHub, client: Any, repo: str) -> None:
    content = some_file(client)
    oid = client("answer(commit(add('noise.bin')).oid)")
    hub.faults.append(Fault("GET", r"/resolve/.*noise\.bin", "corrupt"))
    code = f"""
    answer([read("noise.bin", {oid!r}).hex(), [m["path"] if isinstance(m, dict) else m.path
            for m in api.verify_repo_checksums(repo, revision={oid!r}).mismatches]])
    """
    found, mismatches = client(code)
    different = [(a, b) for a, b in zip(bytes.fromhex(found), content, strict=True) if a != b]
    assert [(a ^ b).bit_count() for a, b in different] == [1]
    assert mismatches == ["noise.bin"]


def test_faults_are_parsed_from_text_and_unknown_ones_are_refused() -> None:
    assert Fault.parse("GET:^/a:b(?:c):503:4") == Fault("GET", "^/a:b(?:c)", "503", 4)
    assert Fault.parse("*:.*:truncate") == Fault("*", ".*", "truncate", 1)
    assert Fault.parse("PUT:/x:lost:-1") == Fault("PUT", "/x", "lost", -1)
    assert Fault.parse("GET:/x:503+2:3") == Fault("GET", "/x", "503+2", 3)
    assert Fault.parse("GET:/x:nonsense") == Fault("GET", "/x", "nonsense", 1)
    for wrong in ("GET:/x", "GET:/x:explode", "GET:/x:999", "/x:drop"):
        with pytest.raises(ValueError, match="fault"):
            Fault.parse(wrong)


# --- the command


@contextmanager
def command(script: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the script; yield its process and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_a_server_restarted_after_a_kill_has_the_same_repositories(
    tmp_path: Path, new_client: Any, hub_script: Path
) -> None:
    arguments = [str(tmp_path / "hub"), "--token", "secret", "--fault", "POST:/tag/:409"]
    with command(hub_script, *arguments) as (process, line):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", line)
        client = new_client(line.strip())
        content = some_file(client)
        state = """
        refs = api.list_repo_refs(repo)
        answer([[[r.ref, r.target_commit] for r in refs.branches + refs.tags],
                [c.commit_id for c in api.list_repo_commits(repo)], read("noise.bin", "v1").hex()])
        """
        code = """
        api.create_repo(repo, private=True), commit(add("noise.bin"))
        assert failure(api.create_tag, repo, tag="v1") == [409, "HfHubHTTPError"]
        api.create_tag(repo, tag="v1")
        """
        before = client(code + state)
        process.send_signal(signal.SIGKILL)
        assert process.communicate() == ("", "")
    with command(hub_script, *arguments) as (process, line):
        restarted = new_client(line.strip())
        after = restarted(state)
        assert restarted("answer(failure(head))", token=None)[0] == 401
        process.send_signal(signal.SIGTERM)
        assert process.communicate() == ("", "")
        assert process.returncode == 0
    assert before == after
    assert bytes.fromhex(after[2]) == content


def test_a_stopped_hub_closes_open_connections(tmp_path: Path) -> None:
    with LocalHub(tmp_path) as hub:
        connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rsplit(":", 1)[1]), timeout=20)
        connection.request("GET", "/api/models/me/nothing")
        assert connection.getresponse().read() != b""
    assert connection.sock is not None
    connection.auto_open = 0
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.request("GET", "/api/models/me/nothing"), connection.getresponse()
    connection.close()
