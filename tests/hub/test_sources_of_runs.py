"""Repositories that a recipe's steps cannot take are refused before any step runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_hub import Fault, LocalHub

from adaptkit.operations.adopt import adopt
from adaptkit.operations.quantize import quantize

COMMIT = """
import json
from pathlib import Path
from huggingface_hub import HfApi
api = HfApi()
for folder in sorted(Path(%r).iterdir()):
    api.create_repo(f"org/{folder.name}")
    api.upload_folder(repo_id=f"org/{folder.name}", folder_path=folder)
print(json.dumps({}))
"""


@pytest.fixture
def repositories(cli: Any, tmp_path: Path, llama: Path, adapter: Path) -> None:
    """Repositories in the namespace org, one of each kind; the steps of a recipe name them as they are called here."""
    folder = tmp_path / "repositories"
    shutil.copytree(llama, folder / "plain")
    quantize(llama, folder / "small")
    shutil.copytree(adapter, folder / "lora")
    adopt(adapter, folder / "ours")
    (folder / "neither").mkdir()
    shutil.copy(llama / "config.json", folder / "neither")
    assert cli(code=COMMIT % str(folder)).code == 0


@pytest.fixture
def recipe(tmp_path: Path, repositories: None) -> Callable[[str, str], Path]:
    """Write a recipe whose first step quantizes org/plain, and whose second one uses a repository."""

    def write(step: str, name: str) -> Path:
        path = tmp_path / "recipe.yaml"
        sources = f"sources:\n  plain: {{repo: org/plain}}\n  {name}: {{repo: org/{name}}}\n"
        path.write_text(f"name: wrong\n{sources}steps:\n  first: {{quantize: plain}}\n  second: {step}\n")
        return path

    return write


@pytest.mark.parametrize(
    ("step", "name", "message"),
    [
        (
            "{quantize: lora}",
            "lora",
            "steps.second.quantize: 'lora' is an adapter; expected an unquantized or released checkpoint",
        ),
        ("{resize: small, rank: 2}", "small", "steps.second.resize: 'small' is a quantized checkpoint; exp"),
        ("{adopt: ours}", "ours", "already has a manifest, made by adopt"),
    ],
)
def test_a_repository_of_the_wrong_kind_is_refused_before_the_first_step(
    cli: Any, recipe: Callable[[str, str], Path], step: str, name: str, message: str
) -> None:
    path = recipe(step, name)
    done = cli("run", path)
    assert done.code == 2
    assert message in done.report["message"]
    assert not list(path.parent.glob("recipe.lock*"))
    assert not list((path.parent / ".adaptkit").rglob("adaptkit-manifest.json")), "a step ran"


def test_local_folders_are_checked_before_the_hub_is_asked(
    cli: Any, hub: LocalHub, recipe: Callable[[str, str], Path], adapter: Path
) -> None:
    path = recipe("{quantize: here}", "lora")
    path.write_text(path.read_text().replace("lora: {repo: org/lora}", "here: {path: here}"))
    shutil.copytree(adapter, path.parent / "here")
    hub.requests.clear()
    done = cli("run", path)
    assert (done.code, hub.requests) == (2, [])
    assert (
        "steps.second.quantize: 'here' is an adapter; expected an unquantized or released checkpoint"
        in done.report["message"]
    )


def test_a_repository_with_neither_an_adapter_nor_a_checkpoint_is_refused(
    cli: Any, recipe: Callable[[str, str], Path]
) -> None:
    done = cli("run", recipe("{resize: neither, rank: 2}", "neither"))
    assert done.code == 5
    assert done.report["message"].startswith("second: ")
    assert "not a checkpoint: neither model.safetensors nor model.safetensors.index.json" in done.report["message"]


def test_a_cached_commit_is_used_even_if_the_hub_denies_its_files(
    cli: Any, hub: LocalHub, recipe: Callable[[str, str], Path]
) -> None:
    """As it does for a gated repository without the right token."""
    path = recipe("{resize: lora, rank: 2}", "lora")
    assert cli("run", path).code == 0
    hub.faults.append(Fault("*", "/resolve/", "403", -1))
    assert cli("run", path).code == 0


def test_a_commit_that_a_repository_lacks_is_named(cli: Any, recipe: Callable[[str, str], Path]) -> None:
    path, commit = recipe("{resize: lora, rank: 2}", "lora"), "0" * 40
    path.write_text(path.read_text().replace("repo: org/lora}", f"repo: org/lora, revision: '{commit}'}}"))
    done = cli("run", path)
    assert done.code == 2
    assert done.report["message"].startswith(f"org/lora@{commit}: the Hub answered 404")


def test_a_cached_commit_is_used_in_the_clients_offline_mode(
    cli: Any, hub: LocalHub, recipe: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = recipe("{resize: lora, rank: 2}", "lora")
    assert cli("run", path).code == 0
    for name in ("plain", "lora"):
        commit = json.loads((hub.store.folder / "repos" / "org" / name / "state.json").read_text())["heads"]["main"]
        path.write_text(path.read_text().replace(f"repo: org/{name}}}", f"repo: org/{name}, revision: {commit}}}"))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    hub.requests.clear()
    for arguments in ([], ["--dry-run"]):
        code, _, stderr = cli.run(["run", str(path), *arguments], environment)
        assert (code, hub.requests) == (0, []), stderr


def test_a_dry_run_asks_once_for_the_files_of_a_repository(
    cli: Any, hub: LocalHub, recipe: Callable[[str, str], Path]
) -> None:
    path = recipe("{resize: lora, rank: 2}", "lora")
    sizes = []
    for is_cached in (False, True):
        hub.requests.clear()
        done = cli("run", path, "--dry-run")
        assert done.code == 0
        asked = [asked.partition("/tree/")[0] for _, asked, _ in hub.requests if "/tree/" in asked]
        assert asked == ["/api/models/org/plain", "/api/models/org/lora"]
        assert {source["is_here"] for source in done.report["sources"]} == {is_cached}
        sizes.append([source["bytes"] for source in done.report["sources"]])
        assert cli("run", path).code == 0
    assert all(listed >= read > 0 for listed, read in zip(*sizes, strict=True))
