"""``adaptkit run`` as a process: the recipe of docs/ with a tiny model, from a local Hub and back to it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from folders import edit_json

from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.manifest import MANIFEST_NAME
from adaptkit.cli.commands.run import _failure_added, _Watch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from local_hub import LocalHub  # noqa: E402 - it is a script, found through the path above

TOKEN = "hf_plantedTokenForTests0123"
BASE, RELEASE = "HuggingFaceTB/SmolLM2-135M-Instruct", "demo/smollm2-trivia"
SEED = "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo(sys.argv[1], exist_ok=True)\n"
SEED += "print(api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2]).oid)"
REFS = "import sys; from huggingface_hub import HfApi; api = HfApi(); at = dict(exist_ok=True)\n"
REFS += (
    "first = api.list_repo_commits(sys.argv[1])[-1].commit_id; api.create_branch(sys.argv[1], branch='other', **at)\n"
)
REFS += "api.create_tag(sys.argv[1], tag='v0', revision=first, **at)"
STEPS = ["base-nf4", "adapter", "judged", "merged", "loads", "release"]


def write_recipe(folder):
    """Write the recipe of docs/, reduced to a few steps, and its data."""
    text = (ROOT / "docs" / "recipe.yaml").read_text()
    for old, new in (
        ("steps: 60", "steps: 4\n    batch_size: 4\n    learning_rate: 5e-3\n    device: cpu"),
        ("data: [unseen]\n", "data: [unseen]\n    device: cpu\n"),
        ("max: 3.2", "max: 6.5"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    (folder / "data").mkdir()
    tiny.write_instructions(folder / "data" / "train.jsonl")
    tiny.write_instructions(folder / "data" / "test.jsonl", rows=8, seed=5)


class World:
    """A Hub with the base, a folder with the recipe, and the command line in that folder."""

    def __init__(self, root, hub, model, run_cli):
        self.root, self.hub, self._run_cli = root, hub, run_cli
        self.folder = root / "release"
        self.folder.mkdir()
        write_recipe(self.folder)
        self.environment = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        self.commit = self.seed(model)

    def seed(self, model):
        command = [sys.executable, "-c", SEED, BASE, str(model)]
        done = subprocess.run(command, env=os.environ | self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    def run(self, *options, **environment):
        return self._run_cli("run", "recipe.yaml", *options, cwd=self.folder, **self.environment | environment)

    def state(self, repo=RELEASE):
        path = self.hub.store.folder / "repos" / repo / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def lock(self):
        return json.loads((self.folder / "recipe.lock").read_bytes())


@pytest.fixture(scope="module")
def released(tmp_path_factory, llama, run_cli):
    """The world after a first run."""
    root = tmp_path_factory.mktemp("run")
    with LocalHub(root / "hub", tokens={TOKEN}, read_tokens={"reader"}) as hub:
        world = World(root, hub, llama, run_cli)
        world.first = world.run(GITHUB_STEP_SUMMARY=str(root / "summary.md"))
        assert world.first.code == 0, world.first.stderr
        yield world


@pytest.fixture
def copied(released, tmp_path):
    """A copy of the released folder that a test may change, with the same Hub."""
    world = object.__new__(World)
    world.__dict__.update(released.__dict__)
    world.folder = shutil.copytree(released.folder, tmp_path / "release")
    return world


def table(text):
    found = re.findall(r"^(\S+) +(quantize|train|evaluate|merge|check|publish) +(\w+) +(?:[\d.]+ +)?(.*)$", text, re.M)
    return {name: (kind, state, result) for name, kind, state, result in found}


def test_a_release_is_made_from_a_base_on_the_hub_and_published(released):
    rows = table(released.first.stdout)
    assert list(rows) == STEPS
    assert {state for _, state, _ in rows.values()} == {"done"}
    assert re.search(r"held-out loss \d\.\d{4} -> \d\.\d{4}", rows["adapter"][2])
    commit = released.state()["heads"]["main"]
    assert released.state()["tags"] == {"v1": commit}
    assert f"{RELEASE}@v1, commit {commit[:12]}: " in rows["release"][2]
    for name in STEPS[:-1]:
        assert f"{name}: " in released.first.stderr
    assert TOKEN not in released.first.stdout + released.first.stderr


def test_published_files_equal_the_merged_ones(released, run_cli):
    done = run_cli("pull", f"{RELEASE}@v1", "-o", released.root / "pulled", "--json", **released.environment)
    assert done.code == 0, done.stderr
    made = next(released.folder.glob(".adaptkit/*/merged"))
    assert file_sha256(made / MANIFEST_NAME) == released.lock["steps"]["merged"]["outputs"]["merged"]
    for path in made.rglob("*"):
        if path.is_file() and path.name != MANIFEST_NAME:  # the published manifest also lists the model card
            assert file_sha256(path) == file_sha256(released.root / "pulled" / path.relative_to(made))


def test_the_lock_has_the_commit_and_no_local_paths_or_urls(released):
    source = released.lock["sources"]["base"]
    assert (source["repo"], source["revision"], source["commit"]) == (BASE, "main", released.commit)
    assert "model.safetensors" in source["files"]
    text = (released.folder / "recipe.lock").read_text()
    assert str(released.root) not in text
    assert released.hub.url not in text


def test_the_summary_has_a_table_and_the_hashes(released):
    page = (released.root / "summary.md").read_text()
    assert page.startswith("## smollm2-trivia\n\nAll steps are done.\n\n| step | kind | state | seconds | result |\n")
    for name in STEPS:
        assert f"\n| {name} | " in page
    assert f"| `{released.lock['steps']['merged']['outputs']['merged']}` |" in page
    assert released.commit[:12] in page
    assert f"\n| {RELEASE} | `{released.state()['heads']['main']}` | `" in page
    assert TOKEN not in page


def test_a_second_run_repeats_no_step_and_uploads_nothing(copied):
    before, requests = copied.state(), len(copied.hub.requests)
    lock = (copied.folder / "recipe.lock").read_bytes()
    done = copied.run("--locked", "--verify", HF_TOKEN="")  # neither does it need a right to write
    assert done.code == 0, done.stderr
    rows = table(done.stdout)
    assert [state for _, state, _ in rows.values()] == ["kept"] * 5 + ["done"]
    assert rows["release"][2].endswith(": already there")
    assert copied.state() == before
    assert (copied.folder / "recipe.lock").read_bytes() == lock
    changing = [path for method, path, _ in copied.hub.requests[requests:] if method not in ("GET", "HEAD")]
    assert [path for path in changing if "/commit/" in path or "/lfs/" in path] == []


def test_a_release_made_again_from_scratch_has_the_same_bytes(copied):
    shutil.rmtree(copied.folder / ".adaptkit")
    done = copied.run("--locked", "--json")
    assert done.code == 0, done.stdout
    report = json.loads(done.stdout)
    assert [step["state"] for step in report["steps"]] == ["done"] * 6
    assert report["lock_state"] == "kept"
    assert {o["name"]: o["manifest_sha256"] for step in report["steps"] for o in step["outputs"]} == {
        name: digest for step in copied.lock["steps"].values() for name, digest in step.get("outputs", {}).items()
    }
    assert report["steps"][-1]["facts"]["already_there"]


def test_in_the_clients_offline_mode_the_hint_names_the_option(copied):
    done = copied.run("--until", "loads", HF_HUB_OFFLINE="1")
    assert done.code == 7
    hint = "hint: unset HF_HUB_OFFLINE; or use --offline, if huggingface_hub's cache has a copy"
    assert done.stderr.splitlines() == [f"error: {BASE}: huggingface_hub is in offline mode", hint]
    assert copied.run("--until", "loads", "--offline", HF_HUB_OFFLINE="1").code == 0


def test_offline_runs_send_no_requests(copied):
    requests = len(copied.hub.requests)
    for options in (("--until", "loads"), ("--until", "loads", "--locked"), ("--until", "loads", "--dry-run")):
        done = copied.run("--offline", *options)
        assert done.code == 0, done.stderr
    refused = copied.run("--offline")
    assert refused.code == 2
    assert "recipe.yaml, line 28: steps.release: publish needs the network" in refused.stderr
    absent = copied.run("--offline", "--until", "loads", HF_HOME=str(copied.folder / "other"))
    assert absent.code == 2
    assert absent.stderr.splitlines()[-2:] == [
        f"error: recipe.yaml, line 5: sources.base: {BASE}@main is not in huggingface_hub's cache",
        "hint: run it once without --offline",
    ]
    home = shutil.copytree(copied.environment["HF_HOME"], copied.folder / "part", symlinks=True)
    for path in (*home.rglob("tokenizer.json"), *home.rglob("trees")):  # as after an interrupted download
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    part = copied.run("--offline", "--until", "loads", HF_HOME=str(home))
    assert part.code == 2
    assert f"cache has only a part of {BASE}@main: tokenizer.json is missing" in part.stderr
    assert len(copied.hub.requests) == requests


@pytest.mark.parametrize(("option", "name"), [("--output-file", "recipe.yaml"), ("--summary", "data/../recipe.lock")])
def test_a_report_does_not_replace_the_recipe_or_the_lock(copied, option, name):
    before = {path.name: path.read_bytes() for path in copied.folder.glob("recipe.*")}
    done = copied.run(option, name)
    assert done.code == 2
    assert f"{name}: is the recipe or its lock" in done.stderr
    assert {path.name: path.read_bytes() for path in copied.folder.glob("recipe.*")} == before


def test_a_report_that_cannot_be_written_is_refused_first(copied):
    requests = len(copied.hub.requests)
    for option in ("--output-file", "--summary", "$GITHUB_STEP_SUMMARY"):
        given = {option[1:]: "absent/x"} if option.startswith("$") else {}
        done = copied.run(*([] if given else [option, "absent/x"]), **given)
        assert (done.code, done.stderr.splitlines()[0]) == (2, f"error: {option} absent/x: cannot write a file there")
    assert len(copied.hub.requests) == requests


def test_report_and_summary_cannot_be_the_same_file(copied):
    done = copied.run("--output-file", "both.md", "--summary", "data/../both.md")
    assert (done.code, done.stderr.splitlines()[0]) == (
        2,
        "error: both.md: cannot hold both the report and the summary",
    )
    assert not (copied.folder / "both.md").exists()


def publishing(world, new):
    """Change how the recipe publishes, and discard all finished steps."""
    text = (world.folder / "recipe.yaml").read_text()
    old = f"    repo: {RELEASE}\n    tag: v1\n"
    assert text.count(old) == 1
    (world.folder / "recipe.yaml").write_text(text.replace(old, f"    {new}\n".replace(", ", "\n    ")))
    shutil.rmtree(world.folder / ".adaptkit")


@pytest.mark.parametrize(
    ("new", "token", "code", "said"),
    [
        (f"repo: {RELEASE}, tag: v2", "reader", 6, f"release: {RELEASE}: the token is read-only\n"),
        ("repo: demo/absent", "", 6, "release: demo/absent: "),
        (f"repo: {RELEASE}, sign: true", TOKEN, 2, "release: nokey.pem: key not found, or not readable\n"),
    ],
)
def test_a_token_or_key_that_cannot_publish_is_refused_before_any_step_runs(copied, new, token, code, said):
    publishing(copied, new)
    done = copied.run(*(["--sign", "nokey.pem"] if "sign" in new else []), HF_TOKEN=token)
    assert done.code == code
    assert f"error: {said}" in done.stderr
    assert "--" not in done.stderr.rpartition("hint: ")[2]  # a recipe has keys instead of options
    assert [path.name for path in copied.folder.glob(".adaptkit/*")] in (["hashes.json"], [])


def test_a_dry_run_warns_of_a_rejected_publication_and_shows_the_tree(copied):
    publishing(copied, "repo: demo/absent")
    done = copied.run("--dry-run", HF_TOKEN="reader")
    assert done.code == 0
    assert "warning: this would be rejected: release: demo/absent: the token is read-only\n" in done.stderr
    assert "merge: would run" in done.stdout


def test_a_dry_run_with_finished_steps_says_what_would_be_uploaded(copied):
    done = copied.run("--dry-run", HF_TOKEN="")
    assert f"publish: would run, {RELEASE}@v1: already there" in done.stdout
    recipe = copied.folder / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("tag: v1", "tag: v2").replace(RELEASE, "demo/new"))
    assert re.search(r"publish: would run, demo/new@v2: \d+ files, [\d.]+ kB sent", copied.run("--dry-run").stdout)
    subprocess.run([sys.executable, "-c", REFS, RELEASE], env=os.environ | copied.environment, check=True)
    recipe.write_text(text.replace("tag: v1", "tag: other"))
    done = copied.run("--dry-run")
    assert done.code == 0
    assert f"warning: this would be rejected: release: {RELEASE}: other already names a branch" in done.stderr


def test_what_publishing_deletes_is_counted_and_a_pull_request_or_branch_is_named(copied):
    recipe = copied.folder / "recipe.yaml"
    text = recipe.read_text().replace(RELEASE, "demo/counted")
    recipe.write_text(text)
    assert copied.run().code == 0
    more = "import sys; from huggingface_hub import HfApi; api = HfApi()\n"
    more += "[api.upload_file(repo_id=sys.argv[1], path_or_fileobj=b'x', path_in_repo=n) for n in ('a.bin', 'b/c.bin')]"
    subprocess.run([sys.executable, "-c", more, "demo/counted"], env=os.environ | copied.environment, check=True)
    steps = "  asked: {publish: adapter, repo: demo/counted, pull_request: true}\n"
    steps += "  aside: {publish: adapter, repo: demo/counted, branch: aside}\n"
    recipe.write_text(text.replace("tag: v1", "tag: v3") + steps)
    assert "sent, 2 deletions" in copied.run("--dry-run").stdout
    done = copied.run("--output-file", "report.json")
    assert done.code == 0, done.stderr
    rows = table(done.stdout)
    assert rows["release"][2].startswith("demo/counted@v3, commit ")
    assert rows["release"][2].endswith(" sent, 2 deletions")
    assert re.search(r", pull request \d+, commit [0-9a-f]{12}: \d+ files", rows["asked"][2])
    assert rows["aside"][2].startswith("demo/counted@aside, commit ")
    facts = {step["name"]: step["facts"] for step in json.loads((copied.folder / "report.json").read_text())["steps"]}
    assert facts["release"]["deletions"] == 2


def test_nothing_is_published_if_a_later_step_would_be_refused(copied):
    subprocess.run([sys.executable, "-c", REFS, RELEASE], env=os.environ | copied.environment, check=True)
    more = "  first: {publish: adapter, repo: demo/first}\n"
    more += f"  second: {{publish: adapter, repo: {RELEASE}, branch: other, tag: v0}}\n"
    recipe = copied.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + more)
    done = copied.run()
    assert done.code == 8
    assert f"error: second: {RELEASE}: the tag v0 is on " in done.stderr
    assert copied.state("demo/first") == {}


def test_what_is_made_after_a_publication_can_be_published_too(copied):
    """The rehearsal before the first publication leaves it out, since it does not exist yet."""
    more = "  early: {publish: adapter, repo: demo/early}\n  light: {resize: adapter, rank: 2, needs: [early]}\n"
    recipe = copied.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + more + "  late: {publish: light, repo: demo/late}\n")
    done = copied.run()
    assert done.code == 0, done.stderr
    assert copied.state("demo/late") != {}


def test_a_failed_gate_prevents_publishing(copied):
    path = copied.folder / "recipe.yaml"
    path.write_text(path.read_text().replace("max: 6.5", "max: 0.5").replace("tag: v1", "tag: v2"))
    before, page = copied.state(), copied.folder / "summary.md"
    done = copied.run("--summary", "summary.md")
    assert done.code == 9
    error, hint = done.stderr.splitlines()[-2:]
    assert re.fullmatch(
        r"error: recipe\.yaml: the gate judged failed: loss is \d\.\d{4}; required: at most 0\.5", error
    )
    assert hint.startswith("hint: change the model or the limits, then run it again; finished steps are kept")
    assert copied.state() == before
    assert "\nStopped: recipe.yaml: the gate judged failed" in page.read_text()
    assert "\n| judged | evaluate | failed | " in page.read_text()
    document = json.loads(copied.run("--json").stdout)
    assert document["error"]["code"] == "gate"


def test_an_unwritable_summary_hides_neither_the_report_nor_another_error(copied):
    """A file on a full disk can be opened, so the failure comes late."""
    done = copied.run("--summary", "/dev/full", "--output-file", "report.json", "--until", "base-nf4")
    assert done.code == 1
    assert "/dev/full: the summary cannot be written: No space left" in done.stderr
    assert table(done.stdout)["base-nf4"][1] == "kept"
    assert json.loads((copied.folder / "report.json").read_text())["name"] in done.stdout
    path = copied.folder / "recipe.yaml"
    path.write_text(path.read_text().replace("max: 6.5", "max: 0.5"))
    done = copied.run("--quiet", "--summary", "/dev/full")
    assert done.code == 9
    warning, error, _ = done.stderr.splitlines()
    assert warning == "warning: /dev/full: the summary cannot be written: No space left on device"
    assert "the gate judged failed" in error


@pytest.mark.parametrize("raised", [OSError("a plain one"), KeyboardInterrupt()])
def test_the_summary_records_any_error_that_stopped_the_run(raised, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("of other steps\n")
    with pytest.raises(type(raised)), _failure_added(Path("recipe.yaml"), page, _Watch(hidden=True, quiet=True)):
        raise raised
    assert page.read_text().startswith(
        f"of other steps\n## recipe.yaml\n\nStopped{f': {raised}' if str(raised) else '.'}"
    )


def test_a_dry_run_shows_the_steps_as_a_tree(copied):
    path = copied.folder / "recipe.yaml"
    path.write_text(path.read_text().replace("steps: 4", "steps: 5"))
    done = copied.run("--dry-run")
    assert done.code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    shape = [re.split(r" {2,}(?=\w|\()", line) for line in lines[: lines.index("")]]
    assert [(name, text.partition(",")[0]) for name, text in shape] == [
        ("release", "publish: would run if its inputs change"),
        ("├── merged", "merge: would run if its inputs change"),
        ("│   ├── base", f"{BASE}@main"),
        ("│   └── adapter", "train: would run"),
        ("│       ├── base-nf4", "quantize: kept"),
        ("│       │   └── base", f"{BASE}@main"),
        ("│       └── questions", "data/train.jsonl"),
        ("├── judged", "evaluate: would run if its inputs change"),
        ("│   ├── base-nf4", "(above)"),
        ("│   ├── adapter", "(above)"),
        ("│   └── unseen", "data/test.jsonl"),
        ("└── loads", "check: would run if its inputs change"),
        ("    └── merged", "(above)"),
    ]
    assert lines[-1] == "smollm2-trivia  5 of 6 steps would run"


def test_the_scripts_of_the_action_run_a_release(copied, tmp_path):
    action = yaml.safe_load((ROOT / ".github" / "actions" / "adaptkit-run" / "action.yml").read_text())
    default = {name: entry.get("default", "") for name, entry in action["inputs"].items()}
    program = tmp_path / "bin" / "adaptkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m adaptkit "$@"\n')
    program.chmod(0o755)
    environment = os.environ | copied.environment | {
        "PYTHONPATH": str(ROOT), "PATH": f"{program.parent}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md"),
        "RECIPE": default["recipe"], "OPTIONS": default["options"], "SYSTEM": "Linux-X64",
    }  # fmt: skip
    for step in action["runs"]["steps"]:
        if "run" in step and "pip" not in step["run"]:
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            subprocess.run(command, cwd=copied.folder, env=environment, check=True, capture_output=True)
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert outputs["work"] == "./.adaptkit"
    assert outputs["key"] == f"adaptkit-Linux-X64-{file_sha256(copied.folder / 'recipe.lock')[:16]}"
    assert json.loads(Path(outputs["report"]).read_text())["name"] == "smollm2-trivia"
    assert (tmp_path / "page.md").read_text().startswith("## smollm2-trivia\n")


def test_the_docs_show_the_recipe_that_is_tested():
    shown = re.search(r"```yaml\n(.*?)\n```", (ROOT / "docs" / "release.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] + "\n" == (ROOT / "docs" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (None, "error: recipe.yaml: No such file or directory", None),
        ("a: [", "error: recipe.yaml, line 1: malformed", None),
        ("name: x\nsources: {a: {path: b}}\nsteps:\n  s: {quantise: a}\n",
         "error: recipe.yaml, line 4: steps.s.quantise: 'quantise' is not a kind of step", "did you mean 'quantize'?"),
    ],
)  # fmt: skip
def test_bad_recipes_end_in_one_line_a_hint_and_exit_code_2(run_cli, tmp_path, text, message, hint):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    done = run_cli("run", "recipe.yaml", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert hint is None or hint in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_moved_branch_is_drift_if_locked_and_is_followed_otherwise(copied, llama, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    edit_json(other / "generation_config.json", temperature=0.5)
    moved = copied.seed(other)
    done = copied.run("--locked")
    assert done.code == 3
    assert f"sources.base.commit is {moved[:12]}…, but {copied.commit[:12]}… in the lock" in done.stderr
    plan = copied.run("--dry-run")
    assert plan.code == 0
    assert "not downloaded yet" in plan.stdout
    taken = copied.run("--until", "base-nf4", "--json")
    assert json.loads(taken.stdout)["sources"][0]["commit"] == moved
    assert copied.lock["sources"]["base"]["commit"] == moved
