"""An output appears whole or not at all, and never replaces something that adaptkit did not make."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from folders import tree
from safetensors.numpy import load_file

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import JOURNAL_NAME
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorRecord, read_manifest
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.writer import DiskError, write_file
from adaptkit.errors import ConflictError, OutputExistsError, UsageError

PLAN = ["source", {"option": 1}]
NOBODY = 65534
"""A user and group other than root."""


def add(output: Output, name: str, content: bytes) -> None:
    tensor = TensorRecord(f"tensor of {name}", name, "U8", (len(content),), "0" * 32)
    output.add(write_file(output.folder, name, content), [tensor], {name: {"digest": content.decode()}})


def publish(output: Output) -> Manifest:
    manifest = Manifest("checkpoint", {"name": "test"}, tuple(output.files), tuple(output.tensors))
    output.publish(manifest)
    return manifest


def make(final: Path, force: bool = False, plan: object = PLAN, content: bytes = b"first") -> None:
    with Output(final, plan, force) as output:
        add(output, "a", content)
        output.write_json("x.json", {"b": 1})
        publish(output)


def test_nothing_is_visible_before_it_is_published_and_then_only_what_was_added(tmp_path):
    final = tmp_path / "deeper" / "out"
    with Output(final, PLAN) as output:
        add(output, "a", b"first")
        (output.folder / "checkpoint-1").mkdir()
        for stray in ("stray", "checkpoint-1/state"):
            (output.folder / stray).write_text("")
        assert not final.exists()
        manifest = publish(output)
    assert tree(final) == {"a": b"first", MANIFEST_NAME: manifest.to_bytes()}
    assert [path.name for path in final.parent.iterdir()] == ["out"]
    assert read_manifest(final) == manifest


def test_after_an_error_nothing_is_published_and_finished_files_are_reused(tmp_path):
    def fail():
        with Output(tmp_path / "out", PLAN) as output:
            add(output, "a", b"first")
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        fail()
    assert not (tmp_path / "out").exists()
    with Output(tmp_path / "out", PLAN) as output:
        assert not output.finished("a", "b")  # a group is finished only if each of them is
        assert output.files == []
        assert output.finished("a")
        assert not output.finished("b")
        assert [record.path for record in output.files] == ["a"]
        assert [tensor.shape for tensor in output.tensors] == [(5,)]
        assert output.notes == {"a": {"digest": "first"}}
        add(output, "b", b"second")
        publish(output)
    assert set(tree(tmp_path / "out")) == {"a", "b", MANIFEST_NAME}


@pytest.mark.parametrize("listed", [True, False])
def test_written_tensors_are_aligned_and_in_the_manifest_only_if_listed(tmp_path, listed):
    tensors = {"a": np.arange(3, dtype=np.uint8), "b": np.ones(1), "c": np.ones((1, 3), np.float32)}
    with Output(tmp_path / "out", PLAN) as output:
        output.write_tensors("x.safetensors", tensors, listed=listed, notes={"x": 1})
        assert [tensor.name for tensor in output.tensors] == (["b", "c", "a"] if listed else [])
        publish(output)
    found = load_file(tmp_path / "out" / "x.safetensors")
    assert {name: found[name].tolist() for name in found} == {name: tensors[name].tolist() for name in tensors}
    content = (tmp_path / "out" / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {name: header[name]["data_offsets"] for name in tensors} == {"b": [0, 8], "c": [8, 20], "a": [20, 23]}


@pytest.mark.parametrize("damage", ["shorter", "changed", "absent", "a folder"])
def test_a_finished_file_that_was_changed_or_removed_counts_as_unfinished(tmp_path, damage):
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
    path = tmp_path / "out.partial" / "a"
    path.unlink()
    if damage == "shorter":
        path.write_bytes(b"fir")
    elif damage == "changed":
        path.write_bytes(b"First")
    elif damage == "a folder":
        path.mkdir()
    with Output(tmp_path / "out", PLAN) as output:
        assert not output.finished("a")


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_truncated_journal_loses_only_its_last_line(tmp_path, cut):
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
        add(output, "b", b"second")
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-cut])
    with Output(tmp_path / "out", PLAN) as output:
        assert output.finished("a")
        assert not output.finished("b")
        add(output, "b", b"second")
    with Output(tmp_path / "out", PLAN) as output:
        assert output.finished("a", "b")
    assert [len(json.loads(line)) for line in journal.read_text().splitlines()] == [2, 3, 3]
    journal.write_bytes(journal.read_bytes()[:20])  # in its first line: work starts over
    make(tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"a", "x.json", MANIFEST_NAME}


@pytest.mark.parametrize("damage", [bytes(50), b"[" * 100_000, b"[]", b"{}"])
def test_a_damaged_journal_is_named_in_the_error_and_no_file_is_lost(tmp_path, damage):
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    journal.write_bytes(damage + b"\n" + journal.read_bytes())
    before = tree(tmp_path)
    with pytest.raises(ConflictError, match=JOURNAL_NAME):
        make(tmp_path / "out")
    assert tree(tmp_path) == before


def test_work_starts_over_if_the_plan_changed(tmp_path):
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
        add(output, "of the old plan", b"")
    with Output(tmp_path / "out", [*PLAN, "more"]) as output:
        assert not output.finished("a")
        assert set(tree(output.folder)) == {JOURNAL_NAME}


def test_work_that_must_be_kept_is_deleted_for_a_different_plan_only_with_force(tmp_path):
    seen = []

    def keeps(folder):
        with pytest.raises(ConflictError, match="another process"), Output(tmp_path / "out", PLAN):
            pass  # no process can add to the folder while keeps() reads it
        seen.append(sorted(path.name for path in folder.iterdir()))
        return "a" in seen[-1]

    with Output(tmp_path / "out", PLAN, keeps=keeps) as output:
        add(output, "a", b"first")
    with pytest.raises(ConflictError, match="unfinished work"), Output(tmp_path / "out", ["other"], keeps=keeps):
        pass
    with Output(tmp_path / "out", PLAN, keeps=keeps) as output:
        assert output.finished("a")
    with Output(tmp_path / "out", ["other"], force=True, keeps=keeps) as output:
        assert not output.finished("a")
    with Output(tmp_path / "out", PLAN, keeps=keeps) as output:
        assert set(tree(output.folder)) == {JOURNAL_NAME}
    assert seen == [["a", JOURNAL_NAME], [JOURNAL_NAME]]


def test_an_existing_output_is_replaced_only_with_force(tmp_path):
    final = tmp_path / "out"
    make(final)
    (final / "a").write_bytes(b"older")
    with pytest.raises(OutputExistsError, match="already exists") as caught:
        make(final)
    assert caught.value.hint == "choose another -o, or replace it with --force"
    assert (final / "a").read_bytes() == b"older"
    make(final, force=True)
    assert (final / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("folder", "adaptkit did not make this"),
        ("link to an empty folder", "adaptkit did not make this"),
        ("file", "adaptkit did not make this"),
        ("link to an artifact", "adaptkit did not make this"),
        ("dangling link", "adaptkit did not make this"),
        ("artifact whose manifest cannot be read", "cannot tell which files"),  # are the user's
    ],
)
def test_force_replaces_nothing_that_adaptkit_did_not_make(tmp_path, kind, error):
    final = tmp_path / "out"
    make(tmp_path / "artifact")
    (tmp_path / "empty folder").mkdir()
    if kind == "file":
        final.write_text("mine")
    elif kind == "dangling link":
        final.symlink_to(tmp_path / "nowhere")
    elif kind.startswith("link to "):
        final.symlink_to(tmp_path / kind.removeprefix("link to an "))
    elif kind == "folder":
        final.mkdir()
        (final / "thesis.txt").write_text("mine")
    else:
        make(final)
        (final / MANIFEST_NAME).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=error):
        make(final, force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", ".gitattributes", "deeper/notes.txt", "link"])
def test_force_removes_no_file_that_a_user_put_into_an_output(tmp_path, name):
    final = tmp_path / "out"
    make(final)
    own = final / name
    own.parent.mkdir(exist_ok=True)
    if name == "link":
        own.symlink_to(tmp_path)
    else:
        own.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=f"(?m)so --force does not replace it: {re.escape(name)}$"):
        make(final, force=True, plan=["other"])
    assert tree(tmp_path) == before
    own.unlink()
    make(final, force=True, plan=["other"])
    assert set(tree(tmp_path)) == {"out/a", "out/x.json", f"out/{MANIFEST_NAME}"}


def test_a_file_that_a_user_puts_into_an_output_meanwhile_is_left_alone(tmp_path):
    final = tmp_path / "out"
    make(final)

    def race():
        with Output(final, ["other"], force=True) as output:
            add(output, "a", b"second")
            (final / "notes.txt").write_text("mine")
            publish(output)

    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        race()
    assert (final / "notes.txt").read_text() == "mine"
    assert (final / "a").read_bytes() == b"first"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("suffix", "kind"), [(".partial", "folder"), (".replaced", "folder"), (".partial", "file"), (".partial", "link")]
)
def test_what_is_in_the_way_of_unfinished_work_is_left_alone(tmp_path, suffix, kind, force):
    foreign, other = tmp_path / f"out{suffix}", tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    if kind == "file":
        foreign.write_text("mine")
    elif kind == "link":
        foreign.symlink_to("other")
    else:
        other.rename(foreign)
    before = tree(tmp_path)
    with pytest.raises(ConflictError, match="in the way"):
        make(tmp_path / "out", force)
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()
    foreign.rename(tmp_path / "elsewhere")
    make(tmp_path / "out")  # no lock is left


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_that_appears_meanwhile_is_left_alone(tmp_path, force):
    def race():
        with Output(tmp_path / "out", PLAN, force) as output:
            add(output, "a", b"first")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("mine")
            publish(output)

    with pytest.raises(OutputExistsError, match="adaptkit did not make this" if force else "already exists"):
        race()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_replaced_and_its_permissions_and_group_are_kept(tmp_path, force):
    final = tmp_path / "out"
    final.mkdir()
    group = 4321 if os.geteuid() == 0 else os.getegid()
    os.chown(final, -1, group)
    final.chmod(0o2550)
    with Output(final, PLAN, force) as output:
        add(output, "a", b"first")
        begun = output.folder.stat()
        assert (stat.S_IMODE(begun.st_mode), begun.st_gid) == (0o2750, group)  # as private as the output, but writable
        assert list(final.iterdir()) == []
        publish(output)
    assert set(tree(final)) == {"a", MANIFEST_NAME}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    state = final.stat()
    assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o2550, group)


def test_a_file_that_appears_in_an_empty_folder_just_before_the_rename_is_left_alone(tmp_path):
    final = tmp_path / "out"
    final.mkdir()

    def race(event, arguments):
        if event == "os.rename":
            (final / "thesis.txt").write_text("mine")

    def work():
        sys.addaudithook(race)
        with pytest.raises(OutputExistsError, match="already exists"):
            make(final)

    assert in_child(work) == 0
    assert tree(final) == {"thesis.txt": b"mine"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "owner", "group", "refusal"),
    [
        (0o1777, 0, NOBODY, "belongs to another user, and .* lets only that user replace it"),
        (0o777, NOBODY, 0, "cannot have its group and permissions: Operation not permitted"),
        (0o755, NOBODY, NOBODY, "cannot be written: .* is not a folder that you may write to"),
        (0o777, 0, NOBODY, ""),
        (0o1777, NOBODY, NOBODY, ""),
    ],
)
def test_an_empty_folder_that_the_user_may_not_replace_is_refused_before_the_work(mode, owner, group, refusal):
    with tempfile.TemporaryDirectory() as place:  # pytest's folders are closed to other users
        parent, final = Path(place), Path(place, "out")
        parent.chmod(mode)
        final.mkdir()
        os.chown(final, owner, group)

        def work():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            if not refusal:
                make(final)
                return
            with pytest.raises((OutputExistsError, UsageError), match=refusal), Output(final, PLAN):
                pass

        assert in_child(work) == 0
        assert sorted(path.name for path in parent.iterdir()) == ["out"]
        assert bool(tree(final)) != bool(refusal)


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    """The shell would be left in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        make(tmp_path)


def test_an_output_inside_an_artifact_is_refused(tmp_path):
    make(tmp_path / "artifact")
    (tmp_path / "link").symlink_to(tmp_path / "artifact")
    for name in ("artifact/out", "artifact/deeper/out", "link/out"):
        for force in (False, True):
            with pytest.raises(UsageError, match=r"is inside the artifact .*artifact, which would no longer match"):
                check_output(tmp_path / name, force)
    make(tmp_path / "artifact", force=True)


@pytest.mark.parametrize("name", ["x.partial", "x.replaced"])
def test_an_output_may_not_be_named_like_unfinished_work(tmp_path, name):
    """Making ``x`` would delete it."""
    with pytest.raises(UsageError, match="unfinished work"):
        make(tmp_path / name)


HOLDER = """
import sys
from pathlib import Path
from adaptkit.checkpoint.journal import Output
with Output(Path(sys.argv[1]), ["source"]) as output:
    output.write("a", b"mine")
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_fails_and_changes_nothing(tmp_path):
    final = tmp_path / "out"
    arguments = [sys.executable, "-c", HOLDER, str(final)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holding\n"
        before = tree(tmp_path)
        for force in (False, True):
            with pytest.raises(ConflictError, match="another process is writing it"):
                make(final, force)
        assert tree(tmp_path) == before
        holder.kill()
    make(final)  # a dead process holds no lock


def test_an_output_that_another_machine_is_writing_is_left_alone(tmp_path):
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
    path = tmp_path / "out.partial" / JOURNAL_NAME
    before = tree(tmp_path)
    with path.open("r+b") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        for force in (False, True):
            with (
                pytest.raises(ConflictError, match="another process is writing it"),
                Output(tmp_path / "out", PLAN, force),
            ):
                pass
        assert tree(tmp_path) == before
    with Output(tmp_path / "out", PLAN):  # the other machine is done
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks_is_reported_and_left_unchanged(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UsageError, match="files cannot be locked on its disk") as caught:
        make(tmp_path / "out")
    assert "another disk" in caught.value.hint
    assert tree(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


CHANGES = {"open", "os.chmod", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Python's audit events before the file system is changed; ``open`` counts only for writing."""


def in_child(work):
    """Run ``work`` in a fork, and return its exit code."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_killed(number, work):
    """Run ``work`` in a fork that is killed before its change of this number; return whether it has so many."""
    left = iter(range(number))

    def count(event, arguments):
        changes = event in CHANGES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted():
        sys.addaudithook(count)
        work()

    status = in_child(counted)
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("replaces", [None, False, True])
def test_a_kill_at_any_moment_leaves_whole_artifacts_and_the_next_run_only_the_output(tmp_path, replaces):
    def make_new(final):
        make(final, force=bool(replaces), plan=["other"], content=b"second")

    make(tmp_path / "old")
    make_new(tmp_path / "new")
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new")
    states = set()
    for number in itertools.count():
        place = tmp_path / str(number)
        place.mkdir()
        final, aside = place / "out", place / "out.replaced"
        if replaces:
            make(final)
        elif replaces is None:
            final.mkdir(mode=0o700)
        killed = is_killed(number, lambda final=final: make_new(final))
        found = {path.name for path in place.iterdir()}
        states.add(tuple(sorted(found)))
        if final.exists():
            assert tree(final) in {None: ({}, new), False: (new,), True: (old, new)}[replaces]
        elif replaces:
            assert tree(aside) == old
            assert tree(place / "out.partial") == new
        if replaces or not final.exists() or not tree(final):
            make_new(final)
        assert tree(place) == {f"out/{name}": content for name, content in new.items()}
        assert [path.name for path in place.iterdir()] == ["out"]
        if not killed:
            break
    finished = {("out",), ("out", "out.partial"), ("out.partial", "out.replaced"), ("out", "out.replaced")}
    assert (
        states
        == {
            None: {("out",), ("out", "out.partial")},
            False: {(), ("out.partial",), ("out",)},
            True: finished,
        }[replaces]
    )


def test_an_output_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "stale").symlink_to("gone")
    before = sorted(tmp_path.iterdir())
    for name in ("file", "circle", "stale", "stale/folder"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_output(tmp_path / name / "out", force=False)  # all that a dry run does
    check_output(tmp_path / "deeper" / "out", force=True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_an_input_is_never_taken_for_unfinished_work(tmp_path, suffix, force):
    make(tmp_path / "source")
    source = (tmp_path / "source").rename(tmp_path / f"out{suffix}")
    before = tree(source)
    with pytest.raises(UsageError, match="unfinished work would overwrite the input"):
        check_output(tmp_path / "out", force, [source])
    assert tree(source) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_artifact_in_place_of_the_replaced_output_is_deleted_only_with_force(tmp_path, force):
    make(tmp_path / "old")
    aside = (tmp_path / "old").rename(tmp_path / "out.replaced")
    before = tree(aside)
    make(tmp_path / "out", force)
    assert tree(aside) == ({} if force else before)
    assert aside.exists() != force


def test_the_space_of_an_unfinished_file_counts_as_free(tmp_path):
    """It is overwritten; otherwise a disk with just enough room for the output would stay too small."""
    half = 128 << 20
    with Output(tmp_path / "out", PLAN) as output:
        add(output, "a", b"first")
        with (output.folder / "b").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * half)
    with Output(tmp_path / "out", PLAN) as output:
        free = shutil.disk_usage(tmp_path).free
        output.require_space(free + half)
        with pytest.raises(DiskError, match="more bytes"):
            output.require_space(free + 3 * half)


@pytest.mark.parametrize("has", ["nothing", "temporary data", "a file"])
def test_a_folder_without_room_for_the_output_is_removed_unless_something_is_written(tmp_path, has):
    with Output(tmp_path / "out", PLAN) as output, contextlib.ExitStack() as stack:
        if has == "a file":
            output.write("a", b"done")
        elif has == "temporary data":
            (stack.enter_context(output.scratch_folder()) / "data").write_bytes(b"temporary")
        with pytest.raises(DiskError, match="more bytes"):
            output.require_space(shutil.disk_usage(tmp_path).free + (1 << 40))
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if has == "a file" else [])


def test_a_scratch_folder_starts_empty_and_is_removed_even_after_an_interrupt(tmp_path):
    with Output(tmp_path / "out", PLAN) as output:
        left = output.folder / "adaptkit-scratch"
        left.mkdir()
        with (left / "by a kill").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 256 << 20)
        output.require_space(shutil.disk_usage(tmp_path).free + (128 << 20))  # the scratch folder's space will be free
        with contextlib.suppress(KeyboardInterrupt), output.scratch_folder() as folder:
            assert (folder, list(folder.iterdir())) == (left, [])
            raise KeyboardInterrupt
        assert not left.exists()


def test_a_name_that_is_too_long_for_the_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the name is too long"), Output(tmp_path / ("x" * 247), PLAN):
        pass
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / ("x" * 246))
    make(tmp_path / ("x" * 246), force=True)


@pytest.mark.parametrize("keeps", [False, True])
def test_discard_deletes_no_work_that_must_be_kept(tmp_path, keeps):
    with Output(tmp_path / "out", PLAN, keeps=lambda folder: keeps) as output:
        add(output, "a", b"first")
        output.discard()
    assert (tmp_path / "out.partial" / "a").exists() == keeps
    assert (tmp_path / "out.partial").exists() == keeps


def test_what_a_killed_run_had_not_yet_renamed_can_be_written_on(tmp_path):
    """A run may be killed after its manifest is written, and writes folders in the unfinished one when it resumes."""
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / MANIFEST_NAME).write_text("{}")
    check_output(tmp_path / "run.partial" / "last", False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UsageError, match="inside the artifact"):
        check_output(tmp_path / "run" / "last", False)
