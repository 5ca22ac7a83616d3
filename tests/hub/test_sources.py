"""Repositories as inputs of commands: what is fetched into the cache, what is refused, and offline mode."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

from adaptkit.errors import UsageError
from adaptkit.hub.sources import resolve_source

TOKEN = "hf_plantedTokenForTests0123"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RESOLVE = """
from adaptkit.hub.sources import resolve_source
import json
print(json.dumps({"path": str(resolve_source(%r))}))
"""


def test_a_source_on_the_hub_becomes_a_folder_of_its_checkpoint_files(cli: Any, artifact: Path) -> None:
    commit = cli("publish", artifact, "me/model", "--tag", "v1").report["commit"]
    path = Path(cli(code=RESOLVE % "me/model@v1").report["path"])
    assert path.name == commit
    assert (path / WEIGHTS).read_bytes() == (artifact / WEIGHTS).read_bytes()
    assert cli("verify", path).code == 0


def test_of_repositories_without_a_manifest_only_files_that_operations_read_are_fetched(
    cli: Any, make_artifact: Callable[..., Path]
) -> None:
    read = ["modeling_x.py", "LICENSE-MODEL", "USE_POLICY.md", "additional_chat_templates/tool.jinja"]
    read += ["trainable_params.bin", "value_head.bin"]  # beside an adapter, operations refuse one and report the other
    unread = ["onnx/config.json", "onnx/x.py", "LICENSES/x", "pytorch_model.bin", "onnx/model.safetensors"]
    made = make_artifact(files=dict.fromkeys([*read, *unread], "{}"))
    code = (
        f"from huggingface_hub import HfApi\nHfApi().create_repo('me/model')\nprint('{{}}')\n"
        f"HfApi().upload_folder(repo_id='me/model', folder_path={str(made)!r}, ignore_patterns=['adaptkit-*'])"
    )
    assert cli(code=code).code == 0
    path = Path(cli(code=RESOLVE % "me/model").report["path"])
    assert {name for name in [*read, *unread] if (path / name).exists()} == set(read)


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        (["README.md", "config.json", "model-Q4.gguf"], 5, "weights are GGUF (model-Q4.gguf)"),
        (["pytorch_model.bin", "value_head.safetensors"], 5, "weights are pickles (pytorch_model.bin)"),
        (["fp16/model.safetensors", "value_head.safetensors"], 2, "weights only in subfolders, such as fp16/model"),
        ([], 2, "nothing that adaptkit reads"),
    ],
)
def test_errors_for_repositories_without_readable_weights_say_what_they_hold(
    cli: Any, tmp_path: Path, files: list[str], code: int, says: str
) -> None:
    make = "from huggingface_hub import HfApi, CommitOperationAdd as Add\napi = HfApi()\napi.create_repo('me/model')\n"
    make += f"adds = [Add(name, b'{{}}') for name in {files}]\nprint('{{}}')\n"
    make += "adds and api.create_commit('me/model', adds, commit_message='x')"
    assert cli(code=make).code == 0
    done = cli("quantize", "me/model", "-o", "out")
    assert done.code == code, done.stdout
    assert done.report["message"].startswith("me/model@")
    assert says in done.report["message"]
    assert ("from_pretrained" in done.report["hint"]) == ("pytorch_model.bin" in files)


@pytest.mark.parametrize("name", [WEIGHTS, "course.jsonl"])
def test_files_damaged_in_transit_are_removed_from_the_cache(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, tmp_path: Path, name: str
) -> None:
    """The client only compares sizes, and stores what it received under the expected hash."""
    cli("publish", make_artifact(files={"course.jsonl": "{}"}), "me/model")
    hub.faults.append(Fault("GET", f"/resolve/.*{name}", "corrupt"))
    done = cli("diff", "me/model", tmp_path / "artifact")
    assert done.code == 3
    assert re.fullmatch(rf"me/model@[0-9a-f]{{40}}: {name} was damaged in transit", done.report["message"])
    assert not list((tmp_path / "home").rglob(name))
    assert not hub.faults
    assert cli("diff", "me/model", tmp_path / "artifact").code == 0
    (cached,) = (path for path in (tmp_path / "home").rglob(name) if "snapshots" in path.parts)
    cached.write_bytes(bytes(cached.stat().st_size))
    assert cli("pull", "me/model", "-o", "pulled").code == 0  # not from that cache
    assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "artifact" / name).read_bytes()


def test_a_dry_run_with_a_partial_cache_fetches_no_weights(cli: Any, artifact: Path, tmp_path: Path) -> None:
    """`plan org/name` leaves such a cache."""
    commit = cli("publish", artifact, "me/model").report["commit"]
    code = (
        "from huggingface_hub import hf_hub_download\nprint('{}')\nhf_hub_download('me/model', 'adapter_config.json',"
    )
    assert cli(code=f"{code} revision={commit!r})").code == 0
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources: {lora: {repo: me/model}}\nsteps:\n  small: {resize: lora, rank: 1}\n"
    )
    done = cli("run", "r.yaml", "--dry-run")
    assert (done.code, [source["is_here"] for source in done.report["sources"]]) == (0, [False])
    assert not list((tmp_path / "home").rglob(WEIGHTS))
    assert cli("run", "r.yaml").code == 0
    assert [source["is_here"] for source in cli("run", "r.yaml", "--dry-run").report["sources"]] == [True]


PART = """
from huggingface_hub import hf_hub_download
hf_hub_download("me/model", "adapter_config.json")
print("{}")
"""


@pytest.mark.parametrize(
    ("whole", "how", "code"),
    [(True, "gone", 7), (False, "500", 7), (True, "403", 6)],
)
def test_the_cache_is_not_used_if_the_hub_fails_or_refuses(
    cli: Any, artifact: Path, hub: LocalHub, whole: bool, how: str, code: int
) -> None:
    """The branch may have moved, and the cache may hold only part of the checkpoint."""
    cli("publish", artifact, "me/model")
    assert cli(code=RESOLVE % "me/model" if whole else PART).code == 0
    if how != "gone":
        hub.faults.append(Fault("*", "/me/model", how, -1))
    done = cli("inspect", "me/model", url="http://127.0.0.1:9" if how == "gone" else "")
    assert done.code == code
    assert done.report["message"].startswith("me/model: no such local folder, and on the Hub: ")
    taken = "; or set HF_HUB_OFFLINE=1, if huggingface_hub's cache has a copy"
    assert done.report["hint"].endswith(taken) == (code == 7)


FALLS_SILENT = """
import json
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from adaptkit.errors import NetworkError
from adaptkit.hub.sources import resolve_source
listed = []
def until_listed(call):
    def answer(*args, **kwargs):
        if listed:
            raise OfflineModeIsEnabled("as if there were no network any more")
        listed.extend([True] * (call.__name__ == "list_repo_tree"))
        return call(*args, **kwargs)
    return answer
for name in ("repo_info", "list_repo_tree"):  # versions of the client differ in what they ask again
    setattr(HfApi, name, until_listed(getattr(HfApi, name)))
try:
    print(json.dumps({"path": str(resolve_source("me/model"))}))
except NetworkError as error:
    print(json.dumps({"said": error.message}))
"""


def test_the_cache_is_not_used_if_the_hub_stops_answering_midway(cli: Any, artifact: Path) -> None:
    cli("publish", artifact, "me/model")
    assert cli(code=PART).code == 0
    assert "the Hub stopped answering" in cli(code=FALLS_SILENT).report["said"]


def test_offline_a_complete_cache_is_used_without_requests(
    cli: Any, artifact: Path, hub: LocalHub, tmp_path: Path
) -> None:
    cli("publish", artifact, "me/model", "--tag", "v1")
    for name in ("me/model", "me/model@v1"):
        assert cli(code=RESOLVE % name).code == 0
        requests = len(hub.requests)
        for address in (hub.url, "localhost:9"):  # no request is sent, so an invalid address does not matter
            environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
            code, *_ = cli.run([], environment, RESOLVE % name)
            assert code == 0
        assert len(hub.requests) == requests


def test_offline_a_configuration_is_found_that_was_fetched_alone(cli: Any, artifact: Path, tmp_path: Path) -> None:
    (artifact / "config.json").write_text("{}")
    cli.upload(artifact)
    code = RESOLVE.replace("resolve_source", "resolve_config") % "me/model"
    path = cli(code=code).report["path"]
    environment = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done, stdout, _ = cli.run([], environment, code)
    assert (done, json.loads(stdout)["path"]) == (0, path)
    assert cli.run(["inspect", "me/model"], environment)[0] == 7  # the weights are not there


def test_offline_a_possibly_incomplete_cache_is_noted_once(cli: Any, artifact: Path, tmp_path: Path) -> None:
    code = f"""
import huggingface_hub as hub
hub.create_repo("me/model")
for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
    hub.upload_file(path_or_fileobj=b"{{}}" if "tok" in name else {str(artifact)!r} + "/" + name,
                    path_in_repo=name, repo_id="me/model")
for name in ("adapter_config.json", "adapter_model.safetensors"):
    hub.hf_hub_download("me/model", name)
print("{{}}")
"""
    assert cli(code=code).code == 0
    own = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "reader"}
    (tmp_path / "recipe.yaml").write_text(
        "{name: x, sources: {a: {repo: me/model, revision: main}}, steps: {s: {resize: a, rank: 1}}}"
    )
    for command, offline in ((["inspect", "me/model"], "1"), (["run", "recipe.yaml", "--offline"], "0")):
        done, _, stderr = cli.run(command, own | {"HF_HUB_OFFLINE": offline})
        assert done == 0, stderr
        assert stderr.count("the cache does not say whether it is complete") == 1
    assert cli(code=RESOLVE % "me/model").code == 0
    done, _, stderr = cli.run(["inspect", "me/model"], own | {"HF_HUB_OFFLINE": "1"})
    assert (done, stderr) == (0, "")


def _written(theirs: int, ours: int) -> str:
    """Return all that was written to one end of a terminal or pipe, read from the other; close both."""
    os.write(theirs, b"END\n")
    told = b""
    while b"END" not in told:
        told += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    return told.decode().partition("END")[0]


def test_run_shows_retries_and_a_progress_bar_while_it_fetches_sources(
    cli: Any, artifact: Path, tmp_path: Path
) -> None:
    """Run on a terminal, where the progress bar is shown."""
    cli("publish", artifact, "me/model")
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources: {lora: {repo: me/model}}\nsteps:\n  small: {resize: lora, rank: 1}\n"
    )
    cli.hub.faults.append(Fault("GET", "/api/models/me/model", "503"))
    ours, theirs = pty.openpty()
    own = {"HF_ENDPOINT": cli.hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "adaptkit", "run", "r.yaml"]
    subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, env=os.environ | own, check=True)
    said = _written(theirs, ours)
    assert "me/model: the Hub answered 503" in said
    assert "trying again" in said
    assert "lora: me/model@main " in said.partition("lora: me/model@main, commit")[0]  # the bar
    assert "100%" in said.partition("lora: me/model@main, commit")[0]


def test_a_hub_name_in_an_options_file_is_fetched(cli: Any, artifact: Path, tmp_path: Path) -> None:
    commit = cli("publish", artifact, "me/model").report["commit"]
    (tmp_path / "t.yaml").write_text("base: me/model\ndata: [d.jsonl]\n")
    done = cli("train", "--config", "t.yaml", "-o", "out")
    assert done.code == 5
    assert commit in done.report["message"] + done.report["hint"]


def test_all_files_of_the_manifest_are_fetched_in_any_folder(cli: Any, make_artifact: Callable[..., Path]) -> None:
    others = {"course.jsonl": "{}", "loss.svg": "<svg/>", "last/README.md": "as it ended", "odd [1]*.bin": "x"}
    made = make_artifact(files=others)
    assert cli("publish", made, "me/model", "--branch", "trained/by-hand").code == 0
    assert cli("verify", "me/model@trained/by-hand").code == 0
    path = Path(cli(code=RESOLVE % "me/model@trained/by-hand").report["path"])
    assert {name: (path / name).read_text() for name in others} == others


@pytest.mark.parametrize(("asked", "shown"), [((), True), (("--quiet",), False), (("--json",), False)])
def test_fetching_for_a_command_shows_progress_only_on_a_terminal(
    cli: Any, artifact: Path, tmp_path: Path, asked: tuple[str, ...], shown: bool
) -> None:
    """On a terminal, our own transient bar is shown, elsewhere nothing; the client's bars are never shown."""
    cli("publish", artifact, "me/model")
    command = [sys.executable, "-m", "adaptkit", "inspect", "me/model", *asked]
    own = {"HF_ENDPOINT": cli.hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | own
    for home, terminal in (("piped", False), ("seen", True)):
        ours, theirs = pty.openpty() if terminal else os.pipe()
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=theirs, env=environment | {"HF_HOME": str(tmp_path / home)},
            check=True,
        )  # fmt: skip
        said = _written(theirs, ours)
        assert ("fetch" in said) == (shown and terminal), said
        assert "Fetching" not in said
        assert "it/s" not in said
        assert shown or said == ""
        assert (run.stdout != b"") == ("--quiet" not in asked)


def test_in_offline_mode_a_missing_source_is_reported_as_offline(cli: Any, tmp_path: Path) -> None:
    for command in ("inspect", "plan"):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        words = [sys.executable, "-m", "adaptkit", command, "me/model"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 7
        assert done.stderr.splitlines() == [
            "error: me/model: no such local folder, and on the Hub: huggingface_hub is in offline mode",
            "hint: check the path if you mean a local folder; otherwise unset HF_HUB_OFFLINE",
        ]


def test_a_local_folder_takes_precedence_over_the_hub(cli: Any, artifact: Path, hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert cli(code=RESOLVE % "me/model").report["path"] == "me/model"
    assert hub.requests == []


def test_a_source_neither_local_nor_on_the_hub_is_a_usage_error(cli: Any, tmp_path: Path) -> None:
    for name in ("me/absent", "me/_absent", "me/absent@a/branch--of/mine"):
        done = cli("inspect", name)
        assert done.code == 2
        assert "no such local folder, and on the Hub" in done.report["message"]
    for text in ("", str(tmp_path / "absent"), "./me/model", "a/b/c", "me/../x", "me/model@"):
        with pytest.raises(UsageError, match="does not exist" if text else "the path is empty"):
            resolve_source(text)


TOLD = """
import json, os, sys
import adaptkit

sys.stderr = open(os.devnull, "w")  # hf_xet prints what it passes over

calls = []

def progress(done, total):
    calls.append(done)
    raise RuntimeError("stop here")

try:
    adaptkit.%s, progress=progress)
except Exception as error:
    print(json.dumps({"raised": repr(error), "calls": len(calls)}))
"""


@pytest.mark.parametrize(("call", "xet"), [("pull('me/model', 'pulled'", False), ("resolve_source('me/model'", True)])
def test_exceptions_of_a_callers_progress_function_are_passed_on_unchanged(
    cli: Any, artifact: Path, call: str, xet: bool
) -> None:
    cli("publish", artifact, "me/model", xet=xet)
    assert cli(code=TOLD % call, xet=xet).report == {"raised": repr(RuntimeError("stop here")), "calls": 1}


def test_repositories_are_named_as_they_were_typed_and_not_by_their_paths_in_the_cache(
    cli: Any, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_artifact()
    commit = cli("publish", folder, "me/model").report["commit"]
    own = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    cached = tmp_path / "home" / "hub" / "models--me--model" / "snapshots" / commit
    for typed, shown in (("me/model", "me/model"), ("me/model@main", "me/model@main"), (cached, cached)):
        code, stdout, _ = cli.run(["check", str(typed), "--target", "peft"], own)
        assert (code, stdout.splitlines()[0].split(None, 1)) == (0, ["checked", f"{shown}: adapter"])
        code, _, stderr = cli.run(["unmerge", str(typed), "-o", "out"], own)
        assert code == 3
        assert stderr.startswith(f"error: {shown}: ")
    two = ["stack", "me/model", "me/model@main", "-o", "out", "--dry-run"]
    assert f"me/model@{commit}: given 2 times" in cli.run(two, own)[1]
    assert cli("check", "me/model", "--target", "peft").report["path"] == str(cached)  # for programs
