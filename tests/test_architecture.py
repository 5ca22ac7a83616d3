"""Packages import only those below them, and large libraries are imported only when needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptkit
from adaptkit.cli import commands
from adaptkit.discovery import names

PACKAGE = Path(adaptkit.__file__).parent
GROUND = {
    *{
        "errors",
        "discovery",
        "lazy",
        "cache",
        "kernel_cache",
        "kernel_arguments",
        "compiled",
        "team",
        "child",
        "heap",
        "arguments",
    },
    *{"machine", "torch_compiler", "triton_needs"},
}
ON_THE_GROUND = {
    "arguments": {"errors"},
    "__init__": {"errors"},
    "errors": set(),
    "lazy": set(),
    "cache": set(),
    "child": set(),
    "heap": set(),
    "machine": set(),
    "torch_compiler": set(),
    "triton_needs": set(),
    "discovery": {"errors"},
    "kernel_cache": {"cache"},
    "kernel_arguments": {"kernel_cache"},
    "compiled": {"kernel_arguments", "kernel_cache", "compiler"},
    "compiler": {"compiled", "kernel_arguments", "kernel_cache", "errors"},
    "team": {"compiled", "kernel_cache"},
}
FILES = GROUND | {"numerics", "formats", "checkpoint"}
MAY_IMPORT = {
    "numerics": GROUND,
    "formats": GROUND | {"numerics"},
    "checkpoint": FILES - {"checkpoint"},
    "networks": FILES,
    "text": FILES | {"networks"},
    "operations": FILES | {"networks", "text"},
    "training": FILES | {"networks", "text"},
    "hub": FILES,
    "pipeline": FILES | {"operations", "training", "hub"},
    "__main__": {"cli"},
    "cli": FILES | {"networks", "text", "operations", "training", "hub", "pipeline"},
}
INSIDE_OPERATIONS = {
    "_calibrate": {"_quantize"},
    "_diff": set(),
    "_extract": set(),
    "_lineage": set(),
    "_merge": {"_quantize", "_lineage"},
    "_plan": set(),
    "_quantize": set(),
}
"""Folders of a single operation, and which of them each may import; modules outside of them are for all operations."""
BY_NAME = ("import_module", "lazy_module", "lazy_intrinsic", "__import__")
"""Functions that import a module by its name, some of them later."""
MODULES = sorted(PACKAGE.rglob("*.py"))
INSIDE_TRAINING = {
    "data": set(),
    "network": {"data"},
    "memory": {"data", "network"},
    "evaluation": {"data", "network"},
}
"""Packages of the trainer, and which of the others each may import; all may import ``FOR_ALL``."""
FOR_ALL = {"config", "settings", "device", "distributed", "dtype_errors", "out_of_memory"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports anywhere in it; relative imports fail the test."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_NAME):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def room_of(dotted: str) -> str:
    """``numerics`` for ``adaptkit.numerics.lora.delta``; empty for the package's own names, such as its version."""
    parts = dotted.split(".")
    if len(parts) < 2 or parts[1].startswith("__"):
        return ""
    return parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_import_only_from_the_packages_below_them(path):
    parts = path.relative_to(PACKAGE).parts
    room = parts[0].removesuffix(".py")
    if room in ON_THE_GROUND:
        allowed = ON_THE_GROUND[room]
    else:
        assert room in MAY_IMPORT, f"{room} is not a package of the design"
        allowed = MAY_IMPORT[room] | {room}
    ours = {name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "adaptkit"}
    rooms = {room_of(name) for name in ours} - {""}
    assert rooms <= allowed, f"{path.name} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize("room", INSIDE_TRAINING)
def test_packages_of_the_trainer_import_only_those_below_them(room):
    for path in sorted((PACKAGE / "training" / room).glob("*.py")):
        ours = [name.split(".")[2] for name in imported(ast.parse(path.read_text())) if ".training." in name]
        assert set(ours) <= INSIDE_TRAINING[room] | {room} | FOR_ALL, path.name


def test_folders_of_a_single_operation_are_imported_by_few_others():
    found = {path.name: path for path in (PACKAGE / "operations").glob("_*") if path.is_dir() and "__" not in path.name}
    assert set(found) == set(INSIDE_OPERATIONS)
    for room, allowed in INSIDE_OPERATIONS.items():
        for path in sorted(found[room].glob("*.py")):
            ours = [name.split(".")[2] for name in imported(ast.parse(path.read_text())) if ".operations._" in name]
            assert set(ours) & set(found) <= allowed | {room}, path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_hub_package_imports_huggingface_hub(path):
    names = imported(ast.parse(path.read_text()))
    if path.relative_to(PACKAGE).parts[0] != "hub":  # transformers raises its errors, too
        assert not [n for n in names if n.startswith("huggingface_hub") and not n.startswith("huggingface_hub.errors.")]


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


GOLDEN = PACKAGE.parent / "fixtures" / "golden" / "schema-1"


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_has_more_than_320_lines(path):
    assert len(path.read_text().splitlines()) <= 320


def test_numerics_imports_nothing_that_handles_files():
    for path in sorted((PACKAGE / "numerics").rglob("*.py")):
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & {"os", "pathlib", "json", "logging", "safetensors"}, path.name
