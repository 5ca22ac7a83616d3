"""Safety rules, checked in the package's source code or by running commands."""

import ast
import functools
import hashlib
import os
import re
import stat
from pathlib import Path

import adaptkit

PACKAGE = Path(adaptkit.__file__).parent
FOLDERS = re.compile(r"(root|folder|path|final)$")
"""Ends of the names of variables that hold folders."""
JOINS = {
    "checkpoint/layout.py": {"root / name"},  # resolve_inside itself
    # our own names
    "checkpoint/foreign.py": {"root / name"},
    "operations/_diff/files.py": {"root / name"},
    "operations/_calibrate/gradients.py": {"self._folder / f'{index}-{batch}'"},
    "operations/_merge/compensating.py": {"folder / f'codes-{len(files)}.npy'"},
    "operations/_merge/merged_model.py": {"self.root / undo.ADAPTERS_PREFIX / str(number)"},
    "operations/_merge/merging.py": {"adapter.root / name"},
    "operations/targets/_adapter_files.py": {"root / name"},
    "training/loop.py": {"out.folder / adapter.name"},
    "training/resume.py": {
        "folder / f'checkpoint-{snapshot.step}'",
        "folder / f'checkpoint-{snapshot.step}.partial'",
        "path / name",
    },
    "training/run.py": {"folder / (PAGES_NAME if world.is_first else f'adaptkit-{secrets.token_hex(8)}.bin')"},
    # the kernel's names of control groups
    "machine.py": {
        "root / 'sys/fs/cgroup' / (controller if controllers else '')",
        "folder / name",
        "folder / ('memory.limit_in_bytes' if is_first_version else 'memory.max')",
    },
    # names of entries of a listed folder
    "operations/extract.py": {"plan.base.root / name"},
    "pipeline/sources.py": {"path / name", "folder / source.path"},  # the second is given in the user's recipe
    # names in a tree of the Hub, of which ``list_tree`` refuses those that leave the folder; nothing is read there
    "hub/download.py": {"folder / file.path"},
    # names of steps, which consist of letters and digits, and digests
    "pipeline/work.py": {
        "self.root / key[:_KEY_LETTERS]",
        "self.root / key[:_KEY_LETTERS] / name",
        "self.root / key[:_KEY_LETTERS] / f'{step.name}.json'",
    },
}
"""Reviewed places where a folder is joined with a value that is not a constant, without ``resolve_inside``."""


@functools.cache
def trees():
    """Return the syntax trees of the package's modules."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def is_constant(node):
    """Whether a node is a literal, or a name in capitals."""
    last = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return isinstance(node, ast.Constant) or (last.isupper() and last != "")


def joins(tree):
    """Return the expressions that join a folder with a value that is not a constant."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and not is_constant(node.right):
            leftmost = node.left
            while isinstance(leftmost, ast.BinOp):
                leftmost = leftmost.left
            if FOLDERS.search(ast.unparse(leftmost)):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".joinpath", "path.join")):
            found.add(ast.unparse(node))
    return found


def test_all_joins_of_folders_with_variables_are_reviewed():
    """Folders are recognized by their names; a new join must be reviewed and listed above."""
    assert {module: found for module, tree in trees().items() if (found := joins(tree))} == JOINS


def test_nothing_is_unpickled_or_executed():
    loaders = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    runners = {"torch.load", "torch.hub.load", "eval", "exec", "os.system"}
    runners |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}  # our own loader derives from yaml.SafeLoader
    for module, tree in trees().items():
        imported = {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        imported |= {alias.name.split(".")[0] for node in plain for alias in node.names}
        assert not imported & loaders, module
        for call in calls(tree):
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert ast.unparse(call.func) not in runners, module
            assert told.get("allow_pickle", "False") == told.get("shell", "False") == "False", module


def test_code_of_a_model_is_never_run():
    """Each ``from_pretrained`` call disables remote code and network access."""
    for module, tree in trees().items():
        for call in calls(tree):
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert told.get("trust_remote_code", "False") == "False", module
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                assert told.get("trust_remote_code") == "False", module
                assert told.get("local_files_only") == "True", module


def test_templates_are_rendered_in_one_place_which_file_tools_do_not_call():
    """Apart from training, only texts with conversations, of ``quantize`` and ``merge``, are rendered."""
    texts = {module: ast.unparse(tree) for module, tree in trees().items() if not module.startswith("cli/")}

    def users(wanted):
        return {module for module, text in texts.items() if wanted in text}

    assert users("apply_chat_template") == {"data/rendering.py"}
    parses = "data/chat_template.py"  # runs no template
    assert users("import jinja2") | users("from jinja2") == {"data/rendering.py", parses}
    assert users("call_template") == {"data/rendering.py"}
    renderers = users("data.rendering import render")
    assert {module for module in renderers if not module.startswith("training/")} == {
        "data/encoding.py",
        "data/ending.py",
        "data/windows.py",
    }
    readers = {module for module in users("data.windows import") if not module.startswith("training/")}
    assert readers == {"operations/_calibrate/text.py"}


def test_only_a_few_modules_remove_files():
    """These have tests with foreign files in their way; see ``bad_inputs.outputs`` and the tests of the journal."""
    removers = {"unlink", "rmdir", "rmtree", "removedirs"}
    found = set()
    for module, tree in trees().items():
        names = {ast.unparse(call.func) for call in calls(tree)}
        if "os.remove" in names or {name.rpartition(".")[2] for name in names} & removers:
            found.add(module)
    assert found == {
        "checkpoint/journal.py", "checkpoint/place.py", "checkpoint/writer.py", "hub/download.py", "hub/pull.py",
        "pipeline/work.py", "training/loop.py", "training/memory/paging.py", "training/resume.py",
    }  # fmt: skip


def test_temporary_files_are_made_only_in_temporary_folders():
    """``TemporaryDirectory`` makes private folders and removes them; see also the test of ``publish``'s folder."""
    for module, tree in trees().items():
        for call in calls(tree):
            name = ast.unparse(call.func).rpartition(".")[2]
            assert name not in {"mktemp", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"}, module


def test_outputs_hold_files_and_folders_only(run_cli, llama, copy_of, tmp_path):
    """Links in an input, as in the Hub's cache, become files in the output."""
    base = copy_of(llama, "snapshot")
    (tmp_path / "blobs").mkdir()
    for path in list(base.iterdir()):
        blob = tmp_path / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("..") / "blobs" / blob.name)
    assert run_cli("quantize", base, "-o", tmp_path / "out").code == 0
    found = list((tmp_path / "out").rglob("*"))
    assert len(found) > 4
    assert not any(path.is_symlink() for path in found)
    assert all(stat.S_ISREG(os.lstat(path).st_mode) for path in found)
