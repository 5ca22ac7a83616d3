"""Partial pulls, pinned manifests, ambiguous revisions, and folders inside an artifact."""

import fnmatch
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from folders import add_listed, tree
from local_hub import LocalHub, Repo

from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, require_manifest
from adaptkit.data.tokenizer_files import is_of_tokenizer
from adaptkit.errors import UsageError
from adaptkit.hub.parts import PARTS
from adaptkit.hub.pull import PullOptions, pull

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


FILES = ["modeling_x.py", "tokenization_x.py", "LICENSE-MODEL", "USE_POLICY.md", "other/x.py", COMPENSATION_NAME]
FILES += ["additional_chat_templates/tool.jinja"]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        # without the compensation, a merge would add it to weights that were never quantized
        (["adapter"], {CONFIG, WEIGHTS, COMPENSATION_NAME}),
        (["config"], {"modeling_x.py", "tokenization_x.py", CONFIG}),
        (["tokenizer"], {"tokenization_x.py", "additional_chat_templates/tool.jinja"}),
        (["card", "weights"], {"LICENSE-MODEL", "USE_POLICY.md", "README.md", WEIGHTS, COMPENSATION_NAME}),
    ],
)
def test_a_partial_pull_has_the_published_bytes_and_a_manifest_that_says_it_is_partial(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, tmp_path: Path, only: list[str], names: set[str]
) -> None:
    artifact = make_artifact(files=dict.fromkeys(FILES, "x"))
    sent = cli("publish", artifact, "me/model").report
    hub.requests.clear()
    done = cli("pull", "me/model", "-o", "part", *(word for part in only for word in ("--only", part)))
    assert done.code == 0, done.stdout
    pulled = tree(tmp_path / "part")
    assert set(pulled) == names | {MANIFEST_NAME}
    assert all(pulled[name] == (artifact / name).read_bytes() for name in names - {"README.md"})
    assert set(done.report["left_out"]) == {*FILES, "README.md", CONFIG, WEIGHTS} - names
    assert done.report["manifest_sha256"] == sent["manifest_sha256"]
    part = require_manifest(tmp_path / "part")
    assert part.sha256 != sent["manifest_sha256"]
    assert [(parent.role, parent.manifest_sha256) for parent in part.parents] == [("whole", sent["manifest_sha256"])]
    assert part.operation == {"name": "pull", "options": {"only": sorted(only)}}
    assert part.targets == require_manifest(artifact).targets
    schema = resources.files("adaptkit.checkpoint").joinpath("manifest.schema.json").read_text()
    jsonschema.validate(json.loads(part.to_bytes()), json.loads(schema))
    assert cli("verify", "part").code == 0
    assert cli("verify", "part", "--manifest-sha256", sent["manifest_sha256"]).code == 3
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == names | {MANIFEST_NAME}


def test_a_missing_part_is_a_usage_error(cli: Any, artifact: Path, tmp_path: Path) -> None:
    cli("publish", artifact, "me/model")
    done = cli("pull", "me/model", "-o", "part", "--only", "tokenizer")
    assert done.code == 2
    assert "adapter, config, weights, card" in done.report["hint"]
    assert not (tmp_path / "part").exists()
    assert cli("pull", "me/model", "-o", "part", "--only", "nonsense").code == 2


def test_a_partial_pull_checks_the_signature_but_does_not_keep_it(
    cli: Any, artifact: Path, tmp_path: Path, keys: Any
) -> None:
    private, public = keys("mine")
    cli("publish", artifact, "me/model", "--sign", private)
    done = cli("pull", "me/model", "-o", "part", "--only", "adapter", "--public-key", public)
    assert done.code == 0  # the whole manifest's signature was checked, and the part agrees with that manifest
    assert not (tmp_path / "part" / SIGNATURE_NAME).exists()


def test_a_wrong_signature_is_reported_with_its_repository(cli: Any, artifact: Path, keys: Any) -> None:
    commit = cli("publish", artifact, "me/model", "--sign", keys("mine")[0]).report["commit"]
    public = keys("other")[1]
    done = cli("pull", "me/model", "-o", "pulled", "--public-key", public)
    assert done.code == 3
    assert done.report["message"] == f"me/model@{commit}: {SIGNATURE_NAME}: not made by the key in {public}"


def test_an_empty_signer_identity_is_refused(cli: Any, artifact: Path, tmp_path: Path) -> None:
    """It may come from a shell variable that is not set."""
    cli("publish", artifact, "me/model")
    for command in (("pull", "me/model", "-o", "pulled"), ("verify", artifact)):
        done = cli(*command, "--identity", "", "--identity-provider", "")
        assert (done.code, "empty" in done.report["message"]) == (2, True)
    assert not (tmp_path / "pulled").exists()


def test_an_unexpected_manifest_is_refused_before_other_files_are_fetched(
    cli: Any, artifact: Path, hub: LocalHub, tmp_path: Path
) -> None:
    sent = cli("publish", artifact, "me/model").report
    assert cli("pull", "me/model", "-o", "pulled", "--manifest-sha256", sent["manifest_sha256"]).code == 0
    hub.requests.clear()
    done = cli("pull", "me/model", "-o", "other", "--manifest-sha256", "0" * 64)
    assert done.code == 3
    assert sent["manifest_sha256"] in done.report["message"]
    assert not any(WEIGHTS in path for _, path, _ in hub.requests)
    assert not list(tmp_path.glob("other*"))


def test_a_name_of_a_branch_and_a_tag_on_different_commits_is_refused(
    cli: Any, make_artifact: Callable[..., Path], hub: LocalHub, tmp_path: Path
) -> None:
    old = cli("publish", make_artifact("old"), "me/model").report["commit"]
    new = cli("publish", make_artifact("new", seed=1), "me/model").report["commit"]
    repo = Repo(hub.store, "me/model")
    state = repo.state
    repo.save(state | {"tags": {"next": old}, "heads": state["heads"] | {"next": new}})
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources: {lora: {repo: me/model, revision: next}}\nsteps:\n  small: {resize: lora, rank: 1}\n"
    )
    for command in (("pull", "me/model@next", "-o", "pulled"), ("inspect", "me/model@next"), ("run", "r.yaml")):
        done = cli(*command)
        assert done.code == 8, command
        assert old in done.report["hint"]
        assert new in done.report["hint"]
    repo.save(state | {"tags": {"next": new}, "heads": state["heads"] | {"next": new}})
    assert cli("pull", "me/model@next", "-o", "pulled").report["commit"] == new


def test_files_in_folders_are_published_and_pulled(cli: Any, artifact: Path, repository: Any, tmp_path: Path) -> None:
    """For example, the undo record of a merged model, and the last adapter of a run if it is not the best one."""
    for path in ("last/adapter_config.json", "undo/deep/er.bin"):
        add_listed(artifact, path, path)
    assert cli("publish", artifact, "me/model", "--check").code == 0
    assert "undo/deep/er.bin" in repository.files()
    done = cli("pull", "me/model", "-o", "pulled")
    assert done.code == 0, done.stdout
    assert (tmp_path / "pulled" / "last" / "adapter_config.json").read_text() == "last/adapter_config.json"
    assert cli("verify", "pulled").code == 0
    assert not list((tmp_path / "pulled").rglob(".*"))


@pytest.mark.parametrize("given", ["0" * 63, "G" * 64])
def test_a_malformed_sha256_is_a_usage_error(cli: Any, artifact: Path, hub: LocalHub, given: str) -> None:
    for command in (("verify", artifact), ("pull", "me/model", "-o", "pulled")):
        done = cli(*command, "--manifest-sha256", given)
        assert (done.code, done.report["code"]) == (2, "usage")
        assert f"{given!r} is not a sha256" in done.report["message"]
    assert hub.requests == []


def test_for_a_partial_pull_the_printed_sha256_is_labelled_as_the_whole_artifacts(cli: Any, artifact: Path) -> None:
    sent = cli("publish", artifact, "me/model").report
    own = {"HF_ENDPOINT": cli.hub.url, "HF_HOME": str(cli.folder / "home"), "HF_TOKEN": "reader"}
    for only, whose in (((), ""), (("--only", "config"), " of the whole artifact")):
        code, printed, _ = cli.run(["pull", "me/model", "-o", f"pulled{len(only)}", *only], own)
        assert code == 0
        assert f"manifest sha256  {sent['manifest_sha256']}{whose}\n" in printed


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.txt", "vocab-src.json"),
        *("special_tokens_map.json", "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "qwen.tiktoken"),
        *("chat_template.jinja", "chat_template.json", "config.json", "generation_config.json", "processor.json"),
    ],
)
def test_pull_parts_and_the_tokenizer_module_agree_on_tokenizer_files(name: str) -> None:
    assert any(fnmatch.fnmatch(name, pattern) for pattern in PARTS["tokenizer"]) == is_of_tokenizer(name)
    assert is_of_tokenizer(name) == (name not in ("config.json", "generation_config.json", "processor.json"))


def test_a_revision_is_given_after_the_name_or_in_the_options_but_not_in_both(tmp_path: Path) -> None:
    """Most other tests give it after the name, to the command, which passes it on as it is."""
    with pytest.raises(UsageError, match="me/model: two revisions are given"):
        pull("me/model@v1", tmp_path / "out", PullOptions(revision="v1"))
    with pytest.raises(UsageError, match="revision: is empty"):
        pull("me/model@", tmp_path / "out")
