"""A local Hugging Face Hub on the loopback interface, for the unmodified `huggingface_hub` client.

    python scripts/local_hub.py FOLDER [--port 0] [--token TOKEN]... [--read-token TOKEN]... [--fault SPEC]...
    HF_ENDPOINT=http://127.0.0.1:PORT python -c "from huggingface_hub import create_repo; create_repo('me/model')"

or, in a test, `with LocalHub(folder, tokens={"secret"}) as hub: ... hub.url ... hub.requests`.

How it works. A commit is an immutable JSON document (title, author, date, parent, and path -> file for the whole tree)
named by the sha1 of its canonical bytes; a file is named by the sha256 of its content; branches, tags and pull requests
point to commits. Every change is written to a temporary file, which is then renamed, so a killed server leaves the old
or the new state, and a server started on the same folder serves the same repositories. Run one server per folder.

    FOLDER/blobs/<sha256>                            content, regular and LFS alike
    FOLDER/repos/<owner>/<name>/state.json           visibility, branches, tags, discussions
    FOLDER/repos/<owner>/<name>/commits/<sha1>.json
    FOLDER/cas/                                      what hf_xet stores
    FOLDER/tmp/                                      unfinished uploads; emptied at start

Files are uploaded by LFS or Xet. LFS: batch -> PUT; sha256 and size are checked on arrival. Xet: the client
is told to store content in the folder `cas` itself (`local://`), where the server finds the Xet hash of a sha256; such
a file is served to Xet clients only. Both give the same tree.

Access. Without tokens the hub is open to everyone. With tokens, writes and reads of private repositories need
`Authorization: Bearer TOKEN`: 401 without a known token, 403 for a write with a read token.

Faults. `METHOD:PATH_REGEX:KIND[:COUNT]` applies to the next COUNT (default 1, -1 for all) requests in whose raw path
and query the regex matches; METHOD may be `*`. KIND is an HTTP status, one with seconds to wait (`503+2` in
Retry-After, `429+2` in RateLimit), `drop` (close the connection before acting), `lost` (act, then close it),
`truncate` (announce the whole body, send half), `corrupt` (flip a bit of the middle byte) or `nonsense` (act, then
answer with meaningless JSON).

Not implemented: datasets and spaces, merging or closing pull requests, diffs, deleting and moving repositories,
branches and tags, folders and pages of trees, LFS in parts, LFS download through the batch API, checks of metadata.
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PIECE_BYTES = 1 << 20
LFS_MIN_BYTES = 10 << 20
LFS_SUFFIXES = (".bin", ".ckpt", ".gguf", ".h5", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors")
PREUPLOAD_MAX_FILES = 256
USER = "local"
HEX40, HEX64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
REPO_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")
REF_NAME = re.compile(r"(?!/|refs/)(?!.*(//|\.\.|@\{))[\w./+@-]+(?<![/.])")

Headers = dict[str, str]
Json = dict[str, Any]


class RefusalError(Exception):
    """A request answered with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        one_line = message.replace("\n", " ").encode("ascii", "backslashreplace").decode()
        self.headers = {"X-Error-Message": one_line} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass
class Fault:
    """A fault that occurs `count` times; see the module docstring."""

    method: str
    pattern: str
    kind: str
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        if not re.fullmatch(r"[3-5]\d\d(\+\d+)?|drop|lost|truncate|corrupt|nonsense", self.kind):
            kinds = "an HTTP status, drop, lost, truncate, corrupt or nonsense"
            raise ValueError(f"unknown fault kind {self.kind!r}: {kinds}")

    @classmethod
    def parse(cls, spec: str) -> "Fault":
        """Read `METHOD:PATH_REGEX:KIND[:COUNT]`; the regex may hold colons."""
        match = re.fullmatch(r"([A-Z]+|\*):(.*?):(\d{3}(?:\+\d+)?|[a-z]+)(?::(-?\d+))?", spec)
        if match is None:
            raise ValueError(f"fault {spec!r} is not METHOD:PATH_REGEX:KIND[:COUNT]")
        return cls(match[1], match[2], match[3], int(match[4] or 1))


# --- storage ---------------------------------------------------------------------------------------------------------


def xet_hashes(shard: bytes) -> dict[str, str]:
    """Return sha256 -> Xet hash of the files in a shard of hf_xet: 48-byte records after a 48-byte header."""
    position, hashes = 48, {}

    def record() -> tuple[Any, ...]:
        nonlocal position
        position += 48
        *words, flags, entries, _, _ = struct.unpack_from("<4Q4I", shard, position - 48)
        return "".join(f"{word:016x}" for word in words), flags, entries

    while (head := record())[0] != "f" * 64:
        file_hash, flags, entries = head
        position += 48 * entries * (2 if flags & 0x80000000 else 1)  # chunks of the file, and hashes of their ranges
        if flags & 0x40000000:
            hashes[record()[0]] = file_hash
    return hashes


@dataclass(frozen=True)
class File:
    """A file of a tree. `oid` is git's hash of what the tree holds: the content, or the pointer to it if LFS."""

    oid: str
    size: int
    sha256: str
    pointer_bytes: int = 0

    @classmethod
    def regular(cls, content: bytes) -> "File":
        """Describe a file kept in git."""
        return cls(git_blob_oid(content), len(content), hashlib.sha256(content).hexdigest())

    @classmethod
    def lfs(cls, sha256: str, size: int) -> "File":
        """Describe a file kept outside git, which holds a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_blob_oid(pointer), size, sha256, len(pointer))


Tree = dict[str, File]


def git_blob_oid(content: bytes) -> str:
    """Hash content as git does."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialize in a unique form: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def now() -> str:
    """Return the current time in the Hub's format."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Store:
    """The folder: blobs, data of Xet clients, and repositories. `lock` guards every change of a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        for name in ("blobs", "repos", "tmp", "cas"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / "tmp").iterdir():
            leftover.unlink()

    def receive(self, pieces: Iterable[bytes]) -> tuple[Path, str, int]:
        """Write a stream to a temporary file; return its path, sha256 and size."""
        digest, size, complete = hashlib.sha256(), 0, False
        with tempfile.NamedTemporaryFile(dir=self.folder / "tmp", delete=False) as file:
            try:
                for piece in pieces:
                    digest.update(piece)
                    size += file.write(piece)
                complete = True
            finally:
                if not complete:
                    Path(file.name).unlink()
        return Path(file.name), digest.hexdigest(), size

    def write(self, path: Path, content: bytes) -> None:
        """Write a file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.receive([content])[0], path)

    def blob(self, sha256: str) -> Path:
        """Return the path of a blob, which may not exist."""
        return self.folder / "blobs" / sha256

    def keep(self, pieces: Iterable[bytes], sha256: str, size: int | None = None) -> None:
        """Store a stream as a blob if its hash and size are as announced."""
        path, found, found_size = self.receive(pieces)
        if found != sha256 or size not in (None, found_size):
            path.unlink()
            raise RefusalError(400, f"got {found_size} bytes of sha256 {found}, expected {size} of {sha256}")
        os.replace(path, self.blob(sha256))

    def xet_hash(self, sha256: str) -> str | None:
        """Return the Xet hash of a file, if it was uploaded through Xet."""
        shards = (path.read_bytes() for path in (self.folder / "cas").rglob("*.mdb"))
        return next((hashes[sha256] for hashes in map(xet_hashes, shards) if sha256 in hashes), None)

    def describe(self, tree: Tree) -> Json:
        """Read what the Hub shows of a model's files: the front matter of its card, and its configuration's classes."""
        texts = {
            name: self.blob(tree[name].sha256).read_text() for name in ("README.md", "config.json") if name in tree
        }
        front = re.match(r"---\n(.*?)\n---\n", texts.get("README.md", ""), re.DOTALL)
        try:
            config = json.loads(texts.get("config.json", "{}"))
        except ValueError:
            config = {}
        shown = {key: config[key] for key in ("architectures", "auto_map", "model_type") if key in config}
        return {"cardData": yaml.safe_load(front[1]) if front else {}, "config": shown}

    def require_blob(self, path: str, sha256: str, size: int) -> File:
        """Describe an LFS file of a commit."""
        if not HEX64.fullmatch(sha256):
            raise RefusalError(400, f"{path}: {sha256!r} is not a sha256")
        if not self.blob(sha256).exists() and self.xet_hash(sha256) is None:
            raise RefusalError(400, f"{path}: LFS object {sha256} was never uploaded")
        if self.blob(sha256).exists() and self.blob(sha256).stat().st_size != size:
            raise RefusalError(400, f"{path}: LFS object {sha256} does not have {size} bytes, as the commit says")
        return File.lfs(sha256, size)

    def create_repo(self, name: str, private: bool) -> None:
        """Create a repository like the Hub, with a commit that holds .gitattributes."""
        repo = Repo(self, name)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        with self.lock:
            if repo.exists:
                raise RefusalError(409, f"You already created this repository: {name}")
            self.write(self.blob(hashlib.sha256(rules).hexdigest()), rules)
            head = repo.write_commit({".gitattributes": File.regular(rules)}, "initial commit", "", None)
            state = {"private": private, "created": now(), "heads": {"main": head}, "tags": {}, "discussions": []}
            repo.save(state)


class Repo:
    """One repository. Its state is read from disk at each access."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.folder = store.folder / "repos" / name

    @property
    def exists(self) -> bool:
        """Whether the repository exists."""
        return (self.folder / "state.json").exists()

    @property
    def state(self) -> Json:
        """Visibility, heads, tags (name -> commit) and discussions; the one at index n has number n + 1."""
        state: Json = json.loads((self.folder / "state.json").read_bytes())
        return state

    def save(self, state: Json) -> None:
        """Replace the state."""
        self.store.write(self.folder / "state.json", canonical_json(state))

    def write_commit(self, tree: Tree, title: str, message: str, parent: str | None) -> str:
        """Store a commit and return its hash; no branch is moved."""
        commit = {"author": USER, "date": now(), "title": title, "message": message, "parent": parent}
        content = canonical_json(commit | {"files": {path: asdict(file) for path, file in tree.items()}})
        oid = hashlib.sha1(content).hexdigest()
        self.store.write(self.folder / "commits" / f"{oid}.json", content)
        return oid

    def commit(self, oid: str) -> Json:
        """Read a commit; `files` becomes a Tree."""
        commit: Json = json.loads((self.folder / "commits" / f"{oid}.json").read_bytes())
        return commit | {"files": {path: File(**file) for path, file in commit["files"].items()}}

    def history(self, oid: str | None) -> Iterator[tuple[str, Json]]:
        """Yield (hash, commit) from a commit back to the first."""
        while oid is not None:
            commit = self.commit(oid)
            yield oid, commit
            oid = commit["parent"]

    def refs(self) -> dict[str, str]:
        """List every full ref name with its commit."""
        state = self.state
        refs = {f"refs/heads/{name}": oid for name, oid in state["heads"].items()}
        refs |= {f"refs/tags/{name}": oid for name, oid in state["tags"].items()}
        return refs | {f"refs/pr/{d['num']}": d["head"] for d in state["discussions"]}

    def resolve(self, revision: str) -> str:
        """Find the commit of a revision: a commit, a full ref, a tag or a branch, in this order, as git does."""
        if HEX40.fullmatch(revision) and (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        refs = self.refs()
        for name in (revision, f"refs/tags/{revision}", f"refs/heads/{revision}"):
            if name in refs:
                return refs[name]
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def head(self, revision: str) -> tuple[str, str]:
        """Find the full ref and the commit of a branch or pull request, to which commits can be added."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref.startswith("refs/tags/") or ref not in (refs := self.refs()):
            raise RefusalError(404, f"Invalid rev id: {revision} is no branch", "RevisionNotFound")
        return ref, refs[ref]

    def add_commit(self, revision: str, header: Json, operations: list[tuple[str, Json]], create_pr: bool) -> Json:
        """Apply all operations, or none, to the head of a branch or pull request, or to a new pull request."""
        with self.store.lock:
            ref, head = self.head(revision)
            parent = header.get("parentCommit")
            if parent is not None and parent != head and not create_pr:
                raise RefusalError(412, f"A commit has happened since {parent}: {revision} is at {head}")
            base = self.resolve(parent) if parent is not None and create_pr else head
            before = self.commit(base)["files"]
            after = apply_operations(self.store, before, operations)
            title, message = header["summary"], header.get("description", "")
            oid = base if after == before else self.write_commit(after, title, message, base)
            if create_pr:
                return {"oid": oid, "pull": self.open_pull_request(oid)}
            self.move(ref, oid)
            return {"oid": oid}

    def move(self, ref: str, oid: str) -> None:
        """Point a branch or a pull request at a commit."""
        state, name = self.state, ref.removeprefix("refs/heads/")
        if ref.startswith("refs/pr/"):
            state["discussions"][int(ref.removeprefix("refs/pr/")) - 1]["head"] = oid
        else:
            state["heads"][name] = oid
        self.save(state)

    def open_pull_request(self, head: str) -> int:
        """Open a pull request; return its number."""
        with self.store.lock:
            state = self.state
            state["discussions"].append({"num": len(state["discussions"]) + 1, "head": head})
            self.save(state)
        return len(state["discussions"])

    def entries(self, oid: str) -> list[Json]:
        """List a commit's files as the API describes them; folders are left out."""
        entries: list[Json] = []
        for path, file in sorted(self.commit(oid)["files"].items()):
            entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
            if file.pointer_bytes:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
                if xet_hash := self.store.xet_hash(file.sha256):
                    entry["xetHash"] = xet_hash
            entries.append(entry)
        return entries


def apply_operations(store: Store, tree: Tree, operations: list[tuple[str, Json]]) -> Tree:
    """Apply a commit's operations in order; raise RefusalError for the first that cannot be applied."""
    tree = dict(tree)
    for key, value in operations:
        path = check_path(value["path"])
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise RefusalError(400, f"{path}: the content is not base64") from error
            tree[path] = File.regular(content)
            store.keep([content], tree[path].sha256)
        elif key == "lfsFile":
            tree[path] = store.require_blob(path, value["oid"], value["size"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if name == path or (key == "deletedFolder" and name.startswith(path + "/"))]
            if not gone:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise RefusalError(400, f"unknown operation {key!r}")
    for path in tree:
        if any(parent.as_posix() in tree for parent in Path(path).parents):
            raise RefusalError(400, f"{path}: a file has the name of one of its folders")
    return tree


def check_path(path: str) -> str:
    """Refuse a path that git could not check out; a trailing slash is dropped."""
    path = path.removesuffix("/")
    if "\0" in path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise RefusalError(400, f"invalid path {path!r}")
    return path


# --- HTTP ------------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Part of a file, used as a body."""

    path: Path
    start: int
    length: int

    def __len__(self) -> int:
        return self.length


_API = r"/api/models/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?P<name>[^/]+/[^/]+)"
ROUTES = tuple(
    (method, re.compile(pattern), endpoint)
    for method, pattern, endpoint in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", "repo_info"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", "list_tree"),
        ("GET", rf"{_API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", rf"{_API}/refs", "list_refs"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "list_commits"),
        ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", "create_tag"),
        ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("GET", rf"{_API}/xet-(?P<scope>read|write)-token/(?P<revision>[^/]+)", "xet_token"),
        ("GET", rf"{_GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
        ("POST", rf"{_GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    )
)


class Handler(BaseHTTPRequestHandler):
    """One connection. `answer` calls the endpoint, which replies once or raises RefusalError."""

    protocol_version = "HTTP/1.1"
    server_version = "local-hub"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: "_Server"

    # Per request, set by `answer`.
    fault: str | None
    body: Iterator[bytes]
    path_only: str
    query: dict[str, list[str]]

    @property
    def hub(self) -> "LocalHub":
        """The hub this connection belongs to."""
        return self.server.hub

    def answer(self) -> None:
        """Serve one request."""
        parts = urlsplit(self.path)
        self.path_only, self.query = parts.path, parse_qs(parts.query, keep_blank_values=True)
        self.body = self._read_body()
        self.fault = self.hub.take_fault(self.command, self.path)
        try:
            try:
                self._call_endpoint()
            except RefusalError as refusal:
                self.reply(refusal.status, canonical_json({"error": refusal.message}), refusal.headers)
            except KeyError as error:
                self.reply(400, canonical_json({"error": f"the request lacks {error}"}))
            for _ in self.body:  # an unread rest would be taken for the next request
                pass
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - http.server's names

    def _call_endpoint(self) -> None:
        if self.fault == "drop":
            self.hub.record(self.command, self.path, 0)
            self.close_connection = True
            return
        if self.fault and self.fault[0].isdigit():
            status, _, wait_s = self.fault.partition("+")
            header = {"RateLimit": f'"api";r=0;t={wait_s}'} if status == "429" else {"Retry-After": wait_s}
            raise RefusalError(int(status), "injected fault", headers=header if wait_s else None)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, endpoint in ROUTES:
            if wanted == method and (match := pattern.fullmatch(self.path_only)):
                given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                getattr(self, endpoint)(**given)
                return
        raise RefusalError(404, f"no such endpoint: {self.command} {self.path_only}")

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                self.hub.count(length)
                yield self.rfile.read(length)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, PIECE_BYTES))
            if not piece:
                raise ConnectionResetError("the client hung up in the middle of a body")
            left -= len(piece)
            self.hub.count(len(piece))
            yield piece

    def json_body(self) -> Json:
        """Read the body as a JSON object."""
        try:
            value = json.loads(b"".join(self.body) or b"{}")
        except ValueError as error:
            raise RefusalError(400, f"the body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RefusalError(400, "the body is not a JSON object")
        return value

    def argument(self, key: str, default: str = "") -> str:
        """Return one value of the query."""
        return self.query.get(key, [default])[0]

    def reply(self, status: int, body: "bytes | Span" = b"", headers: Headers | None = None) -> None:
        """Send a response, with the chosen fault."""
        self.hub.record(self.command, self.path, status)
        if self.fault == "lost":
            self.close_connection = True
            return
        if self.fault == "nonsense":
            body = b'[{"nonsense":true}]'
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json; charset=utf-8"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(body)

    def _send_body(self, body: "bytes | Span") -> None:
        half, sent = len(body) // 2, 0
        for piece in [body] if isinstance(body, bytes) else read_span(body):
            if self.fault == "corrupt" and sent <= half < sent + len(piece):
                at = half - sent
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            self.wfile.write(piece[: half - sent] if self.fault == "truncate" else piece)
            sent = min(sent + len(piece), half) if self.fault == "truncate" else sent + len(piece)
        if self.fault == "truncate":
            self.close_connection = True

    def reply_json(self, value: Any, headers: Headers | None = None) -> None:
        """Send a JSON document with status 200."""
        self.reply(200, canonical_json(value), headers)

    def reply_span(self, path: Path, headers: Headers) -> None:
        """Send a file, or the requested range of it."""
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or not (match[1] or match[2]):
            return self.reply(200, Span(path, 0, size), headers)
        start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
        end = min(int(match[2]) + 1, size) if match[1] and match[2] else size
        if start >= end:
            raise RefusalError(416, "range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return self.reply(206, Span(path, start, end - start), headers)

    # --- access

    def role(self) -> str | None:
        """Return what the request may do: "write", "read", or None if it is anonymous."""
        if not (self.hub.tokens or self.hub.read_tokens):
            return "write"
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token in self.hub.tokens:
            return "write"
        if token in self.hub.read_tokens:
            return "read"
        raise RefusalError(401, "Invalid credentials in Authorization header")

    def require_write(self) -> None:
        """Refuse a request that may not write."""
        if (role := self.role()) != "write":
            raise RefusalError(*((403, "this token is read-only") if role else (401, "Invalid username or password.")))

    def repo(self, name: str, write: bool = False) -> Repo:
        """Open a repository, if the request is allowed to."""
        if write:
            self.require_write()
        role, repo = self.role(), Repo(self.hub.store, name)
        if not REPO_ID.fullmatch(name) or not repo.exists:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        if repo.state["private"] and role is None:
            raise RefusalError(401, "Invalid username or password.")
        return repo

    # --- account and repositories

    def whoami(self) -> None:
        """GET /api/whoami-v2."""
        role = self.role()
        if role is None:
            raise RefusalError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": role}}
        self.reply_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def auth_check(self, name: str, write: str | None) -> None:
        """GET M/auth-check[/write]: an empty answer, if the request may read or write."""
        self.repo(name, write=write is not None)
        self.reply_json({})

    def create_repo(self) -> None:
        """POST /api/repos/create; the answer has the repository's URL even if it already exists."""
        self.require_write()
        asked = self.json_body()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if asked.get("type") not in (None, "model") or not REPO_ID.fullmatch(name):
            raise RefusalError(400, f"cannot create {asked.get('type')} {name!r}: only models are served here")
        answer = {"url": self.web_url(name), "name": name}
        try:
            self.hub.store.create_repo(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        except RefusalError as refusal:
            return self.reply(refusal.status, canonical_json(answer | {"error": refusal.message}), refusal.headers)
        return self.reply_json(answer)

    def web_url(self, name: str) -> str:
        """Return the URL of a repository's page."""
        return f"{self.hub.url}/{name}"

    def validate_yaml(self) -> None:
        """POST /api/validate-yaml: accepts everything."""
        self.json_body()
        self.reply_json({"errors": [], "warnings": []})

    def repo_info(self, name: str, revision: str = "main") -> None:
        """GET M[/revision/{rev}][?blobs=true]."""
        repo = self.repo(name)
        oid = repo.resolve(revision)
        commit, state, siblings = repo.commit(oid), repo.state, []
        for path, file in sorted(commit["files"].items()):
            sibling: Json = {"rfilename": path}
            if self.argument("blobs").lower() == "true":
                sibling |= {"size": file.size, "blobId": file.oid}
                if file.pointer_bytes:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
            siblings.append(sibling)
        info: Json = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": oid, "siblings": siblings}
        info |= {"private": state["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        info |= {"createdAt": state["created"], "lastModified": commit["date"]}
        self.reply_json(info | self.hub.store.describe(commit["files"]))

    # --- uploading

    def preupload(self, name: str, revision: str) -> None:
        """POST M/preupload/{rev}: how each file is to be uploaded, and the hash of the file it would replace."""
        repo = self.repo(name, write=True)
        files, tree = self.json_body()["files"], repo.commit(repo.head(revision)[1])["files"]
        if len(files) > PREUPLOAD_MAX_FILES:
            raise RefusalError(400, f"{len(files)} files, at most {PREUPLOAD_MAX_FILES}")
        answers = []
        for asked in files:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            large = path.endswith(LFS_SUFFIXES) or asked["size"] > LFS_MIN_BYTES or b"\0" in sample
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if old := tree.get(path):
                answer["oid"] = old.sha256 if old.pointer_bytes else old.oid
            answers.append(answer)
        self.reply_json({"files": answers})

    def lfs_batch(self, name: str) -> None:
        """POST /{id}.git/info/lfs/objects/batch, for uploads."""
        self.repo(name, write=True)
        asked = self.json_body()
        if asked["operation"] != "upload" or asked.get("hash_algo", "sha256") != "sha256":
            raise RefusalError(400, "only uploads named by sha256 are served")
        objects = [self._lfs_object(item["oid"], item["size"]) for item in asked["objects"]]
        self.reply_json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str, size: int) -> Json:
        if self.hub.store.blob(oid).exists():
            return {"oid": oid, "size": size}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}?size={size}"}}}

    def lfs_put(self, oid: str) -> None:
        """PUT a whole LFS object."""
        self.hub.store.keep(self.body, oid, int(self.argument("size")))
        self.reply(200)

    def commit(self, name: str, revision: str) -> None:
        """POST M/commit/{rev}[?create_pr=1]: lines of {key, value}."""
        repo = self.repo(name, write=True)
        try:
            lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line.strip()]
        except ValueError as error:
            raise RefusalError(400, f"the body is not ndjson: {error}") from error
        operations = [(line["key"], line["value"]) for line in lines]
        header = next((value for key, value in operations if key == "header"), None)
        if header is None:
            raise RefusalError(400, "the commit has no header")
        operations = [(key, value) for key, value in operations if key != "header"]
        done = repo.add_commit(revision, header, operations, self.argument("create_pr") in ("1", "true"))
        url = self.web_url(name)
        answer = {"success": True, "commitOid": done["oid"], "commitUrl": f"{url}/commit/{done['oid']}"}
        self.reply_json(answer | ({"pullRequestUrl": f"{url}/discussions/{done['pull']}"} if "pull" in done else {}))

    # --- reading

    def list_tree(self, name: str, revision: str) -> None:
        """GET M/tree/{rev}?recursive=true: all files, on one page."""
        repo = self.repo(name)
        self.reply_json(repo.entries(repo.resolve(revision)))

    def download(self, name: str, revision: str, path: str) -> None:
        """GET or HEAD /{id}/resolve/{rev}/{path}; LFS content is sent directly, without a redirect."""
        repo = self.repo(name)
        oid = repo.resolve(revision)
        headers = {"X-Repo-Commit": oid}
        file = repo.commit(oid)["files"].get(path)
        if file is None:
            raise RefusalError(404, f"{path} does not exist on {revision}", "EntryNotFound", headers)
        headers["ETag"] = f'"{file.sha256 if file.pointer_bytes else file.oid}"'
        if file.pointer_bytes:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
            if xet_hash := self.hub.store.xet_hash(file.sha256):
                token_url = f"{self.hub.url}/api/models/{name}/xet-read-token/{oid}"
                headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        blob = self.hub.store.blob(file.sha256)
        if blob.exists():
            self.reply_span(blob, headers)
        elif self.command == "HEAD":
            self.reply(200, headers=headers)
        else:
            raise RefusalError(501, f"{path} was uploaded through Xet, and is served only through it")

    def list_refs(self, name: str) -> None:
        """GET M/refs."""
        lists: Json = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in sorted(self.repo(name).refs().items()):
            _, space, short = ref.split("/", 2)
            target = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[space]
            lists[target].append({"name": short, "ref": ref, "targetCommit": oid})
        self.reply_json(lists)

    def list_commits(self, name: str, revision: str) -> None:
        """GET M/commits/{rev}, the newest first."""
        repo, items = self.repo(name), []
        for oid, commit in repo.history(repo.resolve(revision)):
            item: Json = {"id": oid, "authors": [{"user": commit["author"]}]}
            item |= {key: commit[key] for key in ("title", "message", "date")}
            items.append(item)
        self.reply_json(items)

    # --- tags and branches

    def create_tag(self, name: str, revision: str) -> None:
        """POST M/tag/{rev} {tag}."""
        self._create_ref(self.repo(name, write=True), "tags", self.json_body()["tag"], revision)

    def create_branch(self, name: str, branch: str) -> None:
        """POST M/branch/{name} {startingPoint?}."""
        repo, asked = self.repo(name, write=True), self.json_body()
        self._create_ref(repo, "heads", branch, asked.get("startingPoint", "main"))

    def _create_ref(self, repo: Repo, space: str, ref: str, revision: str) -> None:
        if not REF_NAME.fullmatch(ref):
            raise RefusalError(400, f"invalid reference name {ref!r}")
        with self.hub.store.lock:
            oid, state = repo.resolve(revision), repo.state
            if ref in state[space]:
                raise RefusalError(409, f"Reference already exists: {ref} at {state[space][ref]}")
            state[space][ref] = oid
            repo.save(state)
        self.reply_json({})

    # --- Xet

    def xet_token(self, name: str, scope: str, revision: str) -> None:
        """GET M/xet-{write,read}-token/{rev}; the revision is ignored, since it is "None" for a new pull request."""
        self.repo(name, write=scope == "write")
        url, token, expiration = f"local://{self.hub.store.folder.resolve() / 'cas'}", scope, int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiration)}
        self.reply_json({"casUrl": url, "accessToken": token, "exp": expiration}, headers)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; ``LocalHub.requests`` has them."""


def read_span(span: Span) -> Iterator[bytes]:
    """Yield the bytes of a part of a file."""
    left = span.length
    with span.path.open("rb") as file:
        file.seek(span.start)
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece


# --- the hub ---------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """The threaded HTTP server; keeps track of open connections, so that it can close them immediately."""

    request_queue_size = 128

    def __init__(self, hub: "LocalHub", port: int) -> None:
        self.hub, self.connections = hub, set[socket.socket]()
        super().__init__(("127.0.0.1", port), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and stop tracking it."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless the client only closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Close everything; must be called from a thread other than the serving one."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class LocalHub:
    """A Hub that serves a folder during its `with` block; see the module docstring.

    Args:
        folder: the folder to serve; made if absent.
        tokens: tokens that may write. Without tokens of either kind, everyone may do everything.
        read_tokens: tokens that may only read.
        port: port to listen on; 0 for any free one.
        faults: the faults. The list may be changed while serving; a fault that is used up is removed.

    Attributes:
        url: URL for HF_ENDPOINT.
        requests: (method, raw path and query, status) of each request so far; status 0 for a dropped one.
        bytes_received: number of bytes in the bodies of all requests so far.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokens: Iterable[str] = (),
        read_tokens: Iterable[str] = (),
        port: int = 0,
        faults: Iterable[Fault] = (),
    ) -> None:
        self.store = Store(Path(folder))
        self.tokens, self.read_tokens, self.faults = frozenset(tokens), frozenset(read_tokens), list(faults)
        self.requests: list[tuple[str, str, int]] = []
        self.bytes_received = 0
        self._lock = threading.Lock()
        self._server = _Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        """Start serving."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving and close all connections."""
        self._server.stop()

    def record(self, method: str, path: str, status: int) -> None:
        """Add a request to the record."""
        with self._lock:
            self.requests.append((method, path, status))

    def count(self, received_bytes: int) -> None:
        """Count received bytes of a body."""
        with self._lock:
            self.bytes_received += received_bytes

    def take_fault(self, method: str, path: str) -> str | None:
        """Return the kind of the first fault that applies to a request, and decrement its count."""
        with self._lock:
            for fault in self.faults:
                if fault.method in ("*", method) and re.search(fault.pattern, path):
                    fault.count -= 1
                    if fault.count == 0:
                        self.faults.remove(fault)
                    return fault.kind
        return None


def main() -> None:
    """Serve until interrupted or terminated."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on the loopback interface.")
    parser.add_argument("folder", type=Path, help="what to serve; made if absent")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--token", action="append", default=[], help="a token that may write (repeatable)")
    parser.add_argument("--read-token", action="append", default=[], help="a token that may only read (repeatable)")
    parser.add_argument("--fault", action="append", default=[], type=Fault.parse, help="METHOD:PATH_REGEX:KIND[:COUNT]")
    options = vars(parser.parse_args())
    tokens, read_tokens, faults = (options.pop(name) for name in ("token", "read_token", "fault"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        contextlib.suppress(KeyboardInterrupt),
        LocalHub(**options, tokens=tokens, read_tokens=read_tokens, faults=faults) as hub,
    ):
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
