"""Refusals by the Hub are reported with their status, and a cached copy of unknown age is used only offline."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from adaptkit.data.rows import read_rows
from adaptkit.errors import NetworkError

ROOT = Path(__file__).resolve().parents[2]
READ = (
    "import sys\n"
    "from adaptkit.errors import AdaptkitError\n"
    "from adaptkit.data.rows import read_rows\n"
    "try: print([dict(row) for _, row in read_rows('org/data')])\n"
    "except AdaptkitError as error: print(error.exit_code, error.message)\n"
)
CACHED = (
    "import sys, datasets\n"
    "found = datasets.load_dataset('json', data_files=sys.argv[1], split='train', cache_dir=sys.argv[2])\n"
    "print(found.cache_files[0]['filename'])\n"
)


def python(code, *arguments, **environment):
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with the same status."""

    def do_HEAD(self):
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD  # noqa: N815 - the server's names

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing():
    """A Hub that refuses every request."""
    pytest.importorskip("datasets")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "code"), [(401, 6), (403, 6), (400, 2)])
def test_a_refusal_by_the_hub_is_reported(status, code, refusing, tmp_path):
    """After other statuses, the client retries for half a minute."""
    refusing.status = status
    address = f"http://127.0.0.1:{refusing.server_port}"
    done = python(READ, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    assert done.stdout == f"{code} org/data: the Hub answered {status}\n", done.stderr


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_temporary_failure_of_the_hub_is_a_network_error(status, monkeypatch):
    datasets = pytest.importorskip("datasets")

    class Answered(OSError):  # noqa: N818 - says what it is
        """Like the client's own error."""

        class response:  # noqa: N801 - an attribute
            status_code = status

    def fail(*_, **__):
        try:
            raise Answered if status else OSError
        except OSError:
            raise FileNotFoundError("no data file, and not on the Hub either") from None

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(NetworkError, match=f"the Hub answered {status}" if status else "no usable answer"):
        list(read_rows("org/data"))


def test_a_cached_copy_of_unknown_age_is_used_only_offline(refusing, tmp_path):
    refusing.status = 401
    home, rows = tmp_path / "home", tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "an old one"}) + "\n")
    made = python(CACHED, rows, tmp_path / "made", HF_HOME=str(home))
    assert made.returncode == 0, made.stderr
    folder = Path(made.stdout.strip()).parent
    cached = shutil.copytree(folder, home / "datasets" / "org___data" / "default" / "0.0.0" / folder.name)
    for file in cached.glob("json-*"):
        file.rename(cached / file.name.replace("json-", "data-"))
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{refusing.server_port}"}
    done = python(READ, HF_HUB_OFFLINE="0", **environment)
    assert done.stdout == "7 org/data: the Hub does not provide it, and the cached copy may be another version\n"
    done = python(READ, HF_HUB_OFFLINE="1", **environment)
    assert done.stdout == "[{'text': 'an old one'}]\n", done.stderr
