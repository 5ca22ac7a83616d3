"""Artifacts are kept while their inputs are unchanged, and the lock records sources and artifacts."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import released
import tiny
from folders import flip, tree

import adaptkit
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.manifest import MANIFEST_NAME, require_manifest
from adaptkit.checkpoint.signing import Signer
from adaptkit.checkpoint.writer import DiskError
from adaptkit.errors import (
    AdapterError,
    AdaptkitError,
    ConfigError,
    ConflictError,
    DriftError,
    GateError,
    IntegrityError,
    UsageError,
)
from adaptkit.operations.adopt import adopt
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize
from adaptkit.operations.resize import ResizeOptions, resize
from adaptkit.operations.verify import verify
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.run import InputReport, Listener, RunOptions, run

ROOT = Path(__file__).resolve().parents[2]
ALL = ["small", "plain", "lighter", "merged", "loads"]


def states(report):
    return {step.name: step.state for step in report.steps}


def done(report):
    return [step.name for step in report.steps if step.state == "done"]


def lock_of(folder):
    return json.loads((folder / "recipe.lock").read_bytes())


def outputs(report):
    return {output.name: output for step in report.steps for output in step.outputs}


@pytest.fixture
def recipe(release):
    return release / "recipe.yaml"


def test_a_key_is_the_hash_of_this_document(recipe):
    """If it were another, every release would be made again."""
    report = run(recipe, RunOptions(until="plain"))
    document = {
        "schema": 3,
        "adaptkit": adaptkit.__version__,
        "kind": "dequantize",
        "options": {"dtype": None, "max_shard_bytes": 5_000_000_000},
        "inputs": [["dequantize", "small", outputs(report)["small"].manifest_sha256]],
        "makes": ["plain"],
    }
    expected = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    assert report.steps[-1].key == expected


def test_a_release_has_the_same_files_as_its_operations_run_one_by_one(release, recipe, tmp_path):
    made = outputs(run(recipe))
    resize(release / "lora", tmp_path / "lighter", ResizeOptions(rank=2))
    merge(release / "model", [tmp_path / "lighter"], tmp_path / "merged", MergeOptions())
    for name in ("lighter", "merged"):
        assert tree(tmp_path / name) == tree(release / made[name].path)
    for output in made.values():
        assert verify(release / output.path).manifest_sha256 == output.manifest_sha256


def test_a_second_run_keeps_everything_and_writes_nothing(release, recipe):
    """So a finished release can also be checked on a read-only disk."""
    time.sleep(2.1)  # hashes of files that changed more recently are not cached
    first = run(recipe)
    assert (done(first), first.lock_state) == (ALL, "written")
    os.utime(release / "recipe.lock", ns=(1, 1))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in release.rglob("*")}
    again = run(recipe)
    assert (states(again), again.lock_state) == (dict.fromkeys(ALL, "kept"), "unchanged")
    assert states(run(recipe, RunOptions(locked=True, verify=True))) == states(again)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in release.rglob("*")} == before
    assert outputs(again) == outputs(first)


def test_the_lock_identifies_sources_and_artifacts_by_hash(release, recipe):
    made = outputs(run(recipe))
    lock = lock_of(release)
    base = lock["sources"]["base"]
    assert base["files"]["model.safetensors"] == file_sha256(release / "model" / "model.safetensors")
    assert set(base["files"]) == {p.name for p in (release / "model").iterdir()}
    assert lock["steps"]["merged"]["outputs"] == {"merged": file_sha256(release / made["merged"].path / MANIFEST_NAME)}
    assert lock["steps"]["lighter"]["recipe"] == {"resize": "lora", "rank": 2}
    assert lock["steps"]["loads"].keys() == {"recipe", "key"}


def test_the_lock_does_not_depend_on_where_it_is_written(release, recipe, tmp_path):
    run(recipe)
    elsewhere = tmp_path / "elsewhere" / "release"
    shutil.copytree(release, elsewhere, ignore=shutil.ignore_patterns(".adaptkit", "recipe.lock"))
    code = "from pathlib import Path; from adaptkit import run, RunOptions\n"
    code += "run(Path('recipe.yaml'), RunOptions(work=Path('../work')))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, check=True)
    content = (release / "recipe.lock").read_bytes()
    assert (elsewhere / "recipe.lock").read_bytes() == content
    assert str(tmp_path).encode() not in content
    assert content == json.dumps(json.loads(content), indent=2, sort_keys=True).encode() + b"\n"


def test_a_source_may_be_a_link_to_a_folder_of_a_different_name(release, recipe, tmp_path):
    run(recipe)
    content = (release / "recipe.lock").read_bytes()
    for name in ("model", "lora"):
        (release / name).rename(tmp_path / f"its own {name}")
        (release / name).symlink_to(tmp_path / f"its own {name}")
    assert done(run(recipe, RunOptions(locked=True))) == []
    assert (release / "recipe.lock").read_bytes() == content


def test_a_lock_that_is_a_link_stays_one(release, recipe, tmp_path):
    run(recipe)
    lock, kept = release / "recipe.lock", tmp_path / "kept.lock"
    content = lock.read_bytes()
    lock.rename(kept)
    lock.symlink_to(kept)
    kept.write_bytes(content + b"\n")
    assert run(recipe).lock_state == "written"
    assert lock.is_symlink()
    assert kept.read_bytes() == content


def test_a_source_that_changes_before_its_step_runs_is_an_error(release, recipe):
    def write(step):
        if step.name == "merged":
            flip(release / "model" / "model.safetensors")

    with pytest.raises(IntegrityError, match=r"merged: the source base changed during the run"):
        run(recipe, listener=Listener(on_start=write))
    assert not (release / "recipe.lock").exists()
    assert "merged" not in {path.stem for path in (release / ".adaptkit").glob("*/*.json")}


def test_an_artifact_made_from_a_changed_source_is_not_kept_once_the_source_is_restored(release, recipe):
    template, until = release / "model" / "chat_template.jinja", RunOptions(until="small")
    before = template.read_bytes()
    with pytest.raises(IntegrityError, match="small: the source base changed during the run"):
        run(recipe, until, listener=Listener(progress=lambda done, total: template.write_bytes(before + b" ")))
    template.write_bytes(before)
    report = run(recipe, until)
    assert "small" in done(report)
    assert (Path(report.steps[-1].outputs[0].path) / template.name).read_bytes() == before


def test_only_steps_that_depend_on_a_change_run_again(recipe, edit):
    run(recipe)
    edit("rank: 2", "rank: 3")
    assert done(run(recipe)) == ["lighter", "merged", "loads"]
    edit("rank: 3", "rank: 2")
    assert done(run(recipe)) == [], "what was made before is still there"
    edit("{dequantize: small}", "{dequantize: small, dtype: float32}")
    assert done(run(recipe)) == ["plain"]


def test_options_that_do_not_affect_the_output_run_no_step_again(recipe, edit):
    run(recipe)
    edit("{quantize: base}", "{quantize: base, threads: 1, double_quant: true}")
    edit("target: [peft]", "target: [peft], needs: [plain]")
    assert done(run(recipe)) == []


def test_dependents_are_kept_if_a_step_that_ran_again_made_the_same_bytes(release, recipe):
    """A file was added to a source that no output copies: steps get different keys, but make the same bytes."""
    first = outputs(run(recipe))
    index = release / "model" / "adaptkit-note.json"  # part of the source, but not copied into outputs
    index.write_text("{}")
    report = run(recipe)
    assert done(report) == ["small", "merged"]
    assert {n: o.manifest_sha256 for n, o in outputs(report).items()} == {
        name: output.manifest_sha256 for name, output in first.items()
    }


def test_a_source_that_changed_with_the_same_size_and_time_is_noticed(release, recipe):
    path = release / "lora" / "adapter_model.safetensors"
    time.sleep(2.1)  # hashes of files that changed more recently are not cached
    run(recipe)
    assert str(path.resolve()) in json.loads((release / ".adaptkit" / "hashes.json").read_text())
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert done(run(recipe)) == ["lighter", "merged", "loads"]


# Damaged artifacts


@pytest.mark.parametrize("how", ["gone", "cut", "extra", "changed manifest", "a link", "another"])
def test_a_damaged_artifact_is_noticed_and_made_again(release, recipe, how):
    first = run(recipe)
    folder = release / outputs(first)["lighter"].path
    expected, weights, manifest = tree(folder), folder / "adapter_model.safetensors", folder / MANIFEST_NAME
    if how in ("gone", "a link"):
        shutil.move(folder, release / "aside")
        if how == "a link":
            folder.symlink_to("/nowhere")
    elif how == "another":  # whole, but not what this step made
        shutil.rmtree(folder)
        shutil.copytree(release / outputs(first)["merged"].path, folder)
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "extra":
        (folder / "extra").write_text("x")
    else:
        manifest.write_bytes(manifest.read_bytes()[:-2] + b" \n")
    notes = []
    report = run(recipe, listener=Listener(note=notes.append))
    assert done(report) == ["lighter"]
    assert len(notes) == 1
    assert notes[0].startswith("lighter: ")
    assert tree(folder) == expected


def test_notes_of_a_step_begin_with_its_name_and_name_its_keys(recipe):
    notes = []
    said = "in/a--threads: give --max-shard-bytes or --embed-adapter, or run: adaptkit merge A B -o C --embed-adapter"
    listener = Listener(
        on_start=lambda part: isinstance(part, Step) and listener.note_of(part)(said), note=notes.append
    )
    run(recipe, listener=listener)
    own = dict.fromkeys(("small", "plain"), said.replace("--max-shard-bytes", "max_shard_bytes"))
    own |= {"merged": said.replace("--embed-adapter", "embed_adapter", 1)}
    assert notes == [f"{name}: {own.get(name, said)}" for name in ALL], "options of a step are named by their keys"


def test_a_foreign_artifact_is_not_kept_after_an_interrupted_run(release, recipe):
    first = outputs(run(recipe))
    folder = release / first["merged"].path
    expected = tree(folder)
    shutil.rmtree(folder)
    shutil.copytree(release / first["plain"].path, folder)  # whole, but not what this step made

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, listener=Listener(progress=interrupt))
    assert done(run(recipe)) == ["merged"]
    assert tree(folder) == expected


def test_a_flipped_bit_is_noticed_only_if_verify_is_set(release, recipe):
    first = run(recipe)
    path = release / outputs(first)["lighter"].path / "adapter_model.safetensors"
    expected = path.read_bytes()
    path.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert done(run(recipe)) == [], "names and sizes are as they were"
    assert done(run(recipe, RunOptions(verify=True))) == ["lighter"]
    assert path.read_bytes() == expected


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", {"outputs": 3}, {"facts": {"effect": 1.5}}], ids=repr)
def test_a_damaged_record_makes_only_its_own_step_run_again(release, recipe, content):
    first = run(recipe)
    record = (release / outputs(first)["lighter"].path).with_suffix(".json")
    if isinstance(content, dict):
        content = json.dumps(json.loads(record.read_bytes()) | content).encode()
    record.write_bytes(content)
    (release / ".adaptkit" / "hashes.json").write_bytes(content)
    notes = []
    assert done(run(recipe, listener=Listener(note=notes.append))) == ["lighter"]
    assert notes == ["lighter: the record of an earlier run is damaged; it has to be made again"]
    assert done(run(recipe)) == []


def test_progress_of_reading_sources_is_reported(recipe):
    told = []
    listener = Listener(
        on_start=lambda part: told.append([part.name]),
        source_progress=lambda done, total: told[-1].append((done, total)),
        on_end=lambda report: isinstance(report, InputReport) and told[-1].append(report.bytes),
    )
    run(recipe, RunOptions(until="lighter"), listener=listener)
    assert [name for name, *_ in told] == ["base", "lora", "lighter"]
    for _, *read, nbytes in told[:2]:
        assert (nbytes, nbytes) in read
        assert all(0 < done <= total for done, total in read)


# The lock


def test_a_locked_run_succeeds_if_everything_matches_the_lock(recipe, release):
    run(recipe)
    before = (release / "recipe.lock").read_bytes()
    shutil.rmtree(release / ".adaptkit")
    report = run(recipe, RunOptions(locked=True))
    assert (done(report), report.lock_state) == (ALL, "kept")
    assert (release / "recipe.lock").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rank: 2", "rank: 3", "steps.lighter.rank is 3, but 2 in the lock"),
        ("{quantize: base}", "{quantize: base, block_size: 32}", "steps.small.block_size is not in the lock"),
        ("  loads: {check: merged, target: [peft]}\n", "", "steps.loads is in the lock, but not here"),
        ("{path: lora}", "{path: ./other}", "sources.lora.path is other, but lora in the lock"),
    ],
)
def test_a_recipe_that_differs_from_the_lock_is_refused_before_sources_are_read(recipe, release, edit, old, new, named):
    run(recipe)
    edit(old, new)
    shutil.rmtree(release / "model")
    with pytest.raises(DriftError) as caught:
        run(recipe, RunOptions(locked=True))
    assert named in caught.value.message
    assert caught.value.exit_code == 3


def test_files_of_sources_that_differ_from_the_lock_are_named_in_the_error(recipe, release):
    run(recipe)
    config = release / "lora" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        DriftError, match=r"sources\.lora\.files\.adapter_config\.json is \w{12}…, but \w{12}… in the lock"
    ):
        run(recipe, RunOptions(locked=True))
    (release / "lora" / "vocab.txt").write_text("x")
    with pytest.raises(DriftError, match=r"sources\.lora\.files\.vocab\.txt is not in the lock"):
        run(recipe, RunOptions(locked=True))


def change_lock(release, *keys, value):
    lock = lock_of(release)
    place = lock
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (release / "recipe.lock").write_text(json.dumps(lock))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema":1}', b"<<<<<<< HEAD\n"])
def test_a_missing_or_invalid_lock_is_refused_and_can_be_written_again(recipe, release, content):
    with pytest.raises(UsageError, match=r"recipe\.lock: lock not found"):
        run(recipe, RunOptions(locked=True, until="small"))
    (release / "recipe.lock").write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.lock: "):
        run(recipe, RunOptions(locked=True, until="small"))
    assert run(recipe, RunOptions(until="small")).lock_state == "written"


def test_steps_that_until_excludes_are_locked_if_their_inputs_are_known(recipe, release):
    run(recipe, RunOptions(until="merged"))
    lock = lock_of(release)["steps"]
    assert set(lock) == {"lighter", "merged", "loads", "small"}, "plain is made from what is not there"
    assert "outputs" not in lock["small"]
    with pytest.raises(DriftError, match=r"steps\.plain is not in the lock"):
        run(recipe, RunOptions(locked=True))


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("steps", "loads", "outputs"), {"evil": "0" * 64}, "steps.loads.outputs is in the lock, but not here"),
        (("more",), 1, "more is in the lock, but not here"),
        (("tool", "version"), "0.0.1", "tool.version is 0.1.0, but 0.0.1 in the lock"),
        (("steps", "lighter", "outputs", "lighter"), "0" * 64, "…, but 000000000000… in the lock"),
    ],
)
def test_a_lock_with_other_or_additional_entries_is_refused(recipe, release, keys, value, named):
    run(recipe)
    change_lock(release, *keys, value=value)
    with pytest.raises(DriftError, match=re.escape(named)):
        run(recipe, RunOptions(locked=True))


@pytest.mark.parametrize("content", ["# poetry\n[[package]]\n", '{"_meta": {}, "default": {}}', '["a"]'])
def test_the_lock_of_a_different_program_is_not_replaced(recipe, release, content):
    (release / "recipe.lock").write_text(content)
    with pytest.raises(UsageError, match=r"recipe\.lock: is not a lock of adaptkit"):
        run(recipe)
    assert (release / "recipe.lock").read_text() == content


def test_a_pipe_in_place_of_the_recipe_is_refused(run_cli, release):
    os.mkfifo(release / "pipe.yaml")  # reading it would block forever
    done = run_cli("run", release / "pipe.yaml", timeout=60)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {release / 'pipe.yaml'}: is not a regular file\nhint: ")


@pytest.mark.parametrize(("make", "locked"), [(os.mkfifo, True), (Path.mkdir, False)], ids=["pipe", "folder"])
def test_a_pipe_or_folder_in_place_of_the_lock_is_refused(recipe, release, make, locked):
    make(release / "recipe.lock")  # reading the pipe would block forever
    with pytest.raises(UsageError, match=r"recipe\.lock: is not a lock of adaptkit") as caught:
        run(recipe, RunOptions(locked=locked))
    assert "move" in caught.value.hint
    assert not (release / ".adaptkit").exists()


def test_a_recipe_is_not_replaced_by_its_lock(recipe, release):
    text = recipe.read_text()
    other = recipe.rename(release / "recipe.lock")
    with pytest.raises(UsageError, match="its lock would have the same name"):
        run(other)
    assert other.read_text() == text


# Gates, dry runs and errors


def test_a_failed_gate_stops_the_steps_that_need_it(recipe, release, edit):
    edit("{check: merged, target: [peft]}", "{check: small, target: [gguf]}")
    edit("  loads:", "  after: {check: lighter, needs: [loads]}\n  loads:")
    seen = []
    with pytest.raises(GateError) as caught:
        run(recipe, listener=Listener(on_end=seen.append))
    assert caught.value.message.startswith(f"{recipe}: the gate loads failed: gguf does not load it correctly: ")
    assert caught.value.exit_code == 9
    assert (seen[-1].name, seen[-1].state) == ("loads", "failed")
    assert "after" not in {report.name for report in seen}
    assert not (release / "recipe.lock").exists()
    with pytest.raises(GateError):
        run(recipe)


def test_a_source_that_adopt_would_refuse_is_refused_before_any_step_runs(recipe, release, edit):
    adopt(release / "lora", release / "ours")
    edit("lora: {path: lora}", "lora: {path: ours}")
    edit("lighter: {resize: lora, rank: 2}", "again: {adopt: lora}\n  lighter: {resize: again, rank: 2}")
    started = []
    with pytest.raises(UsageError, match=r"^again: .*ours: already has a manifest, made by adopt"):
        run(recipe, listener=Listener(on_start=started.append))
    assert started == []


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(recipe, release, edit):
    report = run(recipe, dry_run=True)
    assert states(report) == dict.fromkeys(ALL, "to do")
    assert {p.name for p in release.iterdir()} == {"recipe.yaml", "model", "lora"}
    run(recipe)
    edit("rank: 2", "rank: 3")
    before = tree(release)
    report = run(recipe, dry_run=True)
    assert states(report) == {
        "small": "kept", "plain": "kept", "lighter": "to do", "merged": "may follow", "loads": "may follow"
    }  # fmt: skip
    assert tree(release) == before


@pytest.mark.parametrize("path", ["loop", "a" * 300], ids=["links in a circle", "too long"])
def test_a_path_that_cannot_exist_is_an_error_at_its_place(release, recipe, edit, path):
    (release / "loop").symlink_to("loop")
    edit("{path: lora}", f"{{path: {path}}}")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 4: sources\.lora\.path: does not exist"):
        run(recipe)


def test_a_source_that_is_missing_or_of_the_wrong_kind_is_named_with_its_line(recipe, release, edit):
    shutil.rmtree(release / "lora")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 4: sources\.lora\.path: does not exist"):
        run(recipe)
    (release / "lora").write_text("a file")
    with pytest.raises(ConfigError, match=r"line 8: steps\.lighter\.resize: 'lora' is a file; expected a folder"):
        run(recipe)


def test_a_source_of_a_kind_that_a_step_does_not_take_is_an_error_before_any_is_hashed(recipe, release, edit):
    begun = Listener(on_start=lambda part: pytest.fail(part.name))
    shutil.rmtree(release / "lora")
    quantize(release / "model", release / "lora")
    with pytest.raises(ConfigError, match=r"line 8: steps\.lighter\.resize: 'lora' is a quantized checkpoint; exp"):
        run(recipe, listener=begun)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("train: small, data: [rows], method: full", "late.train: 'small' is a quantized checkpoint; expected an"),
        ("train: small, data: [model]", "late.data: 'model' is a folder; expected a file"),
    ],
)
def test_a_source_that_training_does_not_take_is_an_error_before_any_is_hashed(release, step, message):
    quantize(release / "model", release / "small")
    (release / "rows").write_text("a text")
    names = [name for name in ("model", "small", "rows") if name in step]
    sources = ", ".join(f"{name}: {{path: {name}}}" for name in ("lora", *names))
    steps = f"  first: {{resize: lora, rank: 2}}\n  late: {{{step}}}\n"
    (release / "other.yaml").write_text(f"name: full\nsources: {{{sources}}}\nsteps:\n{steps}")
    begun = Listener(on_start=lambda part: pytest.fail(part.name))
    with pytest.raises(ConfigError, match=message):
        run(release / "other.yaml", listener=begun)


def test_an_adopted_artifact_is_of_the_kind_of_its_source(recipe, edit):
    edit("steps:", "steps:\n  ours: {adopt: base}")
    edit("resize: lora", "resize: ours")
    edit("adapters: [lighter]", "adapters: [lighter, lora]")
    with pytest.raises(ConfigError, match=r"line 9: steps\.lighter\.resize: 'ours' is an unquantized checkp"):
        run(recipe, dry_run=True)


def test_a_folder_that_holds_both_an_adapter_and_a_checkpoint_is_taken_as_either(recipe, release, edit):
    """Some trainers save an adapter beside the weights of the whole model."""
    for path in (release / "lora").glob("adapter_*"):
        shutil.copy(path, release / "model")
    edit("  lora: {path: lora}\nsteps:", "steps:\n  ours: {adopt: base}")
    edit("resize: lora", "resize: ours")
    edit("adapters: [lighter]", "adapters: [lighter, base]")
    assert set(done(run(recipe))) == {"ours", *ALL}


def test_an_adapter_config_beside_a_checkpoint_matters_only_to_a_step_that_takes_the_adapter(
    recipe, release, edit, llama_sharded
):
    shutil.rmtree(release / "model")
    shutil.copytree(llama_sharded, release / "model")
    shutil.copy(release / "lora" / "adapter_config.json", release / "model")
    assert done(run(recipe)) == ALL
    edit("resize: lora", "resize: base")
    edit("  lora: {path: lora}\n", "")
    message = r"model: adapter_model\.safetensors not found beside adapter_config\.json"
    with pytest.raises(AdapterError, match=message) as caught:
        run(recipe)
    assert caught.value.hint.startswith("if the folder holds a checkpoint only, remove adapter_config.json; otherwise ")


def test_a_source_with_a_manifest_is_compared_with_it(recipe, release, tmp_path):
    resize(release / "lora", tmp_path / "made", ResizeOptions(rank=3))
    shutil.rmtree(release / "lora")
    shutil.copytree(tmp_path / "made", release / "lora")
    run(recipe)
    locked = lock_of(release)["sources"]["lora"]
    assert locked["manifest_sha256"] == require_manifest(release / "lora").sha256
    assert "files" not in locked
    path = release / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors does not match adaptkit-manifest\.json"):
        run(recipe)


def test_an_error_of_an_operation_names_the_step(recipe, edit):
    edit("{quantize: base}", "{quantize: base, skip: [nothing.of.this.name]}")
    with pytest.raises(UsageError, match=r"^small: ") as caught:
        run(recipe)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("step", "message", "hint"),
    [
        ("{merge: fp8, adapters: [lora]}", "'fp8' is a released checkpoint", "add a dequantize step"),
        ("{publish: fp8, repo: a/b}", "late: .*: has no manifest", "add an adopt step"),
    ],
)
def test_a_source_that_a_later_step_cannot_use_is_refused_before_the_first_step(
    recipe, release, edit, step, message, hint
):
    released.write_fp8(release / "released")
    tiny.write_instructions(release / "rows.jsonl")
    rows = "  rows: {path: rows.jsonl}\n" if "rows" in step else ""
    edit("  lora:", f"  fp8: {{path: released}}\n{rows}  lora:")
    edit("  loads:", f"  late: {step}\n  loads:")
    with pytest.raises(AdaptkitError, match=message) as caught:
        run(recipe)
    assert hint in caught.value.hint
    assert "adaptkit " not in caught.value.hint
    assert not list(release.glob(".adaptkit/*/small"))


def test_a_release_in_fp8_is_dequantized_by_a_step(recipe, release, edit):
    released.write_fp8(release / "released", block=None, input_scales=True)
    edit("  lora:", "  fp8: {path: released}\n  lora:")
    edit("  loads:", "  whole: {dequantize: fp8}\n  again: {quantize: whole}\n  straight: {quantize: fp8}\n  loads:")
    steps = {step.name: step for step in run(recipe).steps}
    assert steps["whole"].figure.endswith("; left out 14 scales of 8-bit inputs")
    again, straight = (require_manifest(Path(steps[name].outputs[0].path)) for name in ("again", "straight"))
    assert straight.tensors == again.tensors


def test_the_hint_for_a_damaged_output_of_a_step_repairs_it(recipe, release, edit):
    steps = {step.name: step for step in run(recipe).steps}
    (made,) = steps["lighter"].outputs
    flip(Path(made.path) / "adapter_model.safetensors")
    edit("{merge: base", "{merge: base, undo: false")  # must run again
    with pytest.raises(IntegrityError, match="merged: ") as caught:
        run(recipe)
    assert caught.value.hint.startswith("run it again with --verify")
    assert {step.name: step.state for step in run(recipe, RunOptions(verify=True)).steps}["merged"] == "done"


def test_the_hint_for_a_foreign_folder_in_the_work_folder_is_to_change_work(recipe, release):
    (key,) = {step.key[:12] for step in run(recipe, dry_run=True).steps if step.name == "small"}
    aside = release / ".adaptkit" / key / "small.partial"
    aside.mkdir(parents=True)
    (aside / "theirs.txt").write_text("not adaptkit's")
    with pytest.raises(ConflictError, match=r"^small: ") as caught:
        run(recipe)
    assert caught.value.hint.endswith("choose another --work")


def test_a_work_folder_in_a_source_is_refused_before_anything_is_written_there(recipe, release):
    before = sorted((release / "model").rglob("*"))
    with pytest.raises(ConfigError, match=r"sources\.\w+\.path: contains the work folder") as caught:
        run(recipe, RunOptions(work=release / "model" / "work"))
    assert caught.value.hint == "choose another --work"
    assert sorted((release / "model").rglob("*")) == before


def test_a_file_of_hashes_that_cannot_be_written_is_named_in_the_error(recipe, release):
    (release / ".adaptkit" / "hashes.json").mkdir(parents=True)
    with pytest.raises(DiskError, match=rf"^{release}/\.adaptkit/hashes\.json: cannot write: "):
        run(recipe)
    assert [path.name for path in (release / ".adaptkit").iterdir()] == ["hashes.json"]


def test_a_model_card_counts_where_it_is_copied_and_only_there(release, recipe, edit):
    """What reads only weights, configuration and tokenizer is not made again for an edited card."""
    edit("lighter: {resize: lora, rank: 2}", "ours: {adopt: lora}\n  lighter: {resize: ours, rank: 2}")
    for folder in ("model", "lora"):
        (release / folder / "README.md").write_text("first")
    run(recipe)
    assert set(lock_of(release)["sources"]["lora"]["files"]) >= {"README.md"}
    assert "README.md" not in lock_of(release)["sources"]["base"]["files"]
    (release / "model" / "README.md").write_text("second")
    assert done(run(recipe)) == []
    (release / "lora" / "README.md").write_text("second")
    with pytest.raises(DriftError, match="README"):
        run(recipe, RunOptions(locked=True))
    again = run(recipe)
    assert "ours" in done(again)
    assert (release / outputs(again)["ours"].path / "README.md").read_text() == "second"


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("absent")], ids=["file", "broken link"])
def test_a_work_folder_that_is_no_folder_is_a_usage_error(recipe, release, make):
    make(release / ".adaptkit")
    with pytest.raises(UsageError, match=r"\.adaptkit: is not a folder") as caught:
        run(recipe)
    assert "--work" in caught.value.hint


def test_two_runs_do_not_share_a_work_folder(recipe, release):
    def start_another(step):
        if step.name == "plain":
            with pytest.raises(ConflictError, match="another run is using this work folder"):
                run(recipe)

    run(recipe, listener=Listener(on_start=start_another))


def test_a_disk_without_locks_is_reported(recipe, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UsageError, match="its disk does not support locks") as caught:
        run(recipe)
    assert "--work" in caught.value.hint


def test_a_key_that_no_step_of_this_run_needs_is_refused(recipe, edit, tmp_path):
    edit("  loads:", "  out: {publish: merged, repo: a/b}\n  loads:")
    options = {"signer": Signer(private_key=tmp_path / "key.pem"), "until": "loads"}
    for sign in ("repo: a/b", "repo: a/b, sign: true"):
        edit("repo: a/b", sign)
        with pytest.raises(UsageError, match="no step that runs signs anything") as caught:
            run(recipe, RunOptions(**options))
        assert caught.value.hint == "leave out --sign, or add sign: true"


def test_offline_refuses_to_publish_before_anything_is_done(recipe, release, edit):
    edit("  loads:", "  out: {publish: merged, repo: a/b}\n  loads:")
    with pytest.raises(UsageError, match=r"line 10: steps\.out: publish needs the network"):
        run(recipe, RunOptions(offline=True))
    assert not (release / ".adaptkit").exists()
    run(recipe, RunOptions(offline=True, until="loads"))
