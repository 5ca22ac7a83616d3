"""Packages import only those below them, and large libraries are imported only when needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft_adapters
import pytest

import adaptkit
from adaptkit.cli import commands
from adaptkit.discovery import names

PACKAGE = Path(adaptkit.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix().removesuffix(".py"): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = ("numerics", "formats", "checkpoint", "models", "data", "operations", "training", "hub", "pipeline", "cli")
"""Packages, from the lowest to the highest. The ground, modules beside them, imports none of them."""
APART = {
    "training": {"operations"},
    "hub": {"models", "data", "operations", "training"},
    "pipeline": {"models", "data"},
}
"""Packages that one does not import although they are below it."""
INSIDE = {
    "operations": {"_calibrate": {"_quantize"}, "_merge": {"_quantize", "_lineage"}},
    "training": {
        "network": set(),
        "memory": {"network"},
        "fast": {"network", "memory"},
        "methods": {"network"},
        "_plan": {"fast", "memory", "network"},
        "evaluation": {"fast", "network"},
    },
}
"""Folders of a package that import others of it."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports anywhere in it, also by its name; relative imports fail the test."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "lazy_module")):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def assigned(tree: ast.AST) -> Iterator[str]:
    """Every attribute that a file sets on an object, also by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def ours(name: str) -> list[tuple[str, str]]:
    """The package (or module beside the packages) and the next part of every module of ours that a module imports."""
    found = [f"{module}.".split(".") for module in imported(TREES[name]) if module.startswith("adaptkit.")]
    return [(parts[1], parts[2]) for parts in found]


def test_modules_import_only_from_the_packages_below_them():
    assert {name.split("/")[0] for name in TREES if "/" in name} == set(ROOMS)
    for name in TREES:
        room = name.split("/")[0]
        below = set(ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()) - APART.get(room, set())
        used = {other for other, _ in ours(name)} & set(ROOMS)
        assert used <= below or name == "__main__", f"{name} imports {sorted(used - below)}"


def test_folders_inside_a_package_import_few_others_of_it():
    for room, allowed in INSIDE.items():
        folders = {parts[1] for parts in (name.split("/") for name in TREES) if parts[0] == room and len(parts) > 2}
        folders -= {"targets"}
        for name in TREES:
            _, folder, *inside = [*name.split("/"), ""]
            if name.startswith(f"{room}/") and inside[:-1] and folder in folders:
                used = {part for other, part in ours(name) if other == room} & folders
                assert used <= allowed.get(folder, set()) | {folder}, name


def test_nothing_outside_of_the_fast_room_imports_its_modules():
    """What they replace works without them, so only the room's entrance is known."""
    for name, tree in TREES.items():
        used = {module for module in imported(tree) if module.startswith("adaptkit.training.fast.")}
        if not name.startswith("training/fast/"):
            assert used <= {"adaptkit.training.fast.accelerate", "adaptkit.training.fast.PARTS"}, name


def test_no_module_imports_itself_through_others():
    """Imports inside of functions, which run later, do not count."""
    found = {}
    for name, tree in TREES.items():
        body = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        used = {module.removeprefix("adaptkit.").replace(".", "/") for module in imported(body)}
        found[name] = {module if module in TREES else module.rpartition("/")[0] for module in used} & set(TREES)
    while leaves := {name for name, used in found.items() if not used & set(found)}:
        found = {name: used for name, used in found.items() if name not in leaves}
    assert not found


def test_only_known_modules_reach_into_other_libraries():
    for name, tree in TREES.items():
        used = {module.split(".")[0] for module in imported(tree)} & {"ctypes", "llvmlite"}
        used |= {"sys.modules"} & {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {"sys.modules"} & set(imported(tree))
        used |= {"forward", "__class__"} & set(assigned(tree))
        assert not used or name.startswith("training/fast/"), f"{name} uses {sorted(used)}"
        if not name.startswith("hub/"):  # transformers raises its errors, too
            used = {module for module in imported(tree) if module.startswith("huggingface_hub")}
            assert all(module.startswith("huggingface_hub.errors.") for module in used), name
        if name.startswith("numerics/"):
            used = {module.split(".")[0] for module in imported(tree)}
            assert not used & {"os", "pathlib", "json", "logging", "safetensors"}, name


def test_no_module_has_more_than_320_lines():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, path


def test_all_public_names_exist():
    """The lazy table in ``adaptkit/__init__.py`` contains imports that the parser does not see."""
    for name in adaptkit.__all__:
        assert name == "__version__" or callable(getattr(adaptkit, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adaptkit.nonsense


def test_every_command_is_also_a_public_function():
    """Its classes of options are public, too."""
    for name in names(commands):
        function = getattr(adaptkit, name)
        for annotation in function.__annotations__.values():
            for option in re.findall(r"\w+Options|TrainConfig", str(annotation)):
                assert hasattr(adaptkit, option), (name, option)


@pytest.mark.parametrize(
    "module",
    [
        "adaptkit", "adaptkit.errors", "adaptkit.discovery", "adaptkit.cli.main", "adaptkit.hub.publish",
        "adaptkit.hub.download", "adaptkit.operations.check",
    ],
)  # fmt: skip
def test_torch_is_not_imported_before_it_is_needed(module):
    code = f"import {module}, sys; print(sorted(set(sys.modules) & {{'torch', 'numba', 'transformers'}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


GOLDEN = PACKAGE.parent / "fixtures" / "golden" / "schema-1-undo-2"


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [("verify", "merged", 0), ("check", "adapter", 1)],
)
def test_verify_and_check_load_neither_torch_nor_numpy(command, name, expected):
    """Loading them takes longer than hashing a gigabyte. Some programs cannot load the adapter, hence exit code 1."""
    code = (
        f"import sys; sys.argv[1:] = {[command, str(GOLDEN / name)]!r}; from adaptkit.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, set(sys.modules) & {'torch', 'numpy'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == f"{expected} set()"


COMMANDS_WITHOUT_TORCH = """
import sys
from pathlib import Path
from adaptkit import dequantize, inspect, merge, quantize, unmerge, MergeOptions
base, adapter, out = map(Path, sys.argv[1:])
merge(base, [adapter], out / "merged")
merge(base, [adapter], out / "plain", MergeOptions(undo=False))
unmerge(out / "merged", [adapter], out / "back")
quantize(base, out / "nf4")
dequantize(out / "nf4", out / "again")
for folder in (base, adapter, *sorted(out.iterdir())):
    inspect(folder)
print(len(list(out.iterdir())), "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_merging_and_quantizing_do_not_load_torch(llama, adapter, tmp_path):
    """Loading it takes longer than work on an adapter; transformers, which loads it, runs in a separate process."""
    command = [sys.executable, "-c", COMMANDS_WITHOUT_TORCH, str(llama), str(adapter), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "5 False False\n"


@pytest.mark.parametrize("name", ["dora", "tokens", "lora_bias", "saved_norms"])
def test_merging_more_than_low_rank_changes_does_not_load_torch(tmp_path, name):
    case = peft_adapters.make(tmp_path, name)
    code = (
        "import sys; from pathlib import Path; from adaptkit import merge, unmerge\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "merge(base, [adapter], out / 'merged')\nunmerge(out / 'merged', [adapter], out / 'back')\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(case.base), str(case.adapter), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_help_of_every_command_works_without_torch():
    code = (
        "import sys; from click.testing import CliRunner; from adaptkit.cli.main import cli, commands, names\n"
        "for name in names(commands):\n"
        "    done = CliRunner().invoke(cli, [name, '--help'])\n"
        "    assert done.exit_code == 0 and name in done.output, (name, done.output)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "print(len(names(commands)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 8
