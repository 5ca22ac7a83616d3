"""Imports point down, names are unique, files and functions are short, and large libraries are imported late."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import peft_adapters
import pytest

import adaptkit
from adaptkit.cli import commands
from adaptkit.discovery import names

pytestmark = pytest.mark.quick

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


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports anywhere in it, also by its name; a relative import has none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level or node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "lazy_module")):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def assigned(tree: ast.AST) -> Iterator[str]:
    """Every attribute that a file sets on an object, also by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


IMPORTED = {name: set(imports(tree)) for name, tree in TREES.items()}


def used_files(name: str) -> set[str]:
    """The files of the package that a file imports."""
    paths = [module.split(".")[1:] for module in IMPORTED[name] if module.startswith("adaptkit.")]
    places = [(path, path[:-1], [*path, "__init__"], [*path[:-1], "__init__"]) for path in paths]
    return {next((found for end in ends if (found := "/".join(end)) in TREES), name) for ends in places} - {name}


def test_modules_import_only_from_the_packages_below_them():
    assert {name.split("/")[0] for name in TREES if "/" in name} == set(ROOMS)
    wrong = []
    for name, modules in IMPORTED.items():
        room = name.split("/")[0]
        below = set(ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()) - APART.get(room, set())
        used = {module.split(".")[1] for module in modules if module.startswith("adaptkit.")} & set(ROOMS)
        wrong += [f"{name} imports {other}" for other in used - below if name != "__main__"]
        wrong += [f"{name} has a relative import" for module in modules if module.startswith(".")]
    assert not wrong


def test_no_file_imports_itself_through_others():
    """Not within a function either."""
    reached = {name: used_files(name) for name in TREES}
    for between, further in reached.items():
        for used in reached.values():
            used |= further if between in used else set()
    circles = {frozenset(other for other in used if name in reached[other]) for name, used in reached.items()}
    assert [sorted(circle) for circle in circles if circle] == []


def test_class_names_are_unique():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {kind: files for kind, files in places.items() if len(files) > 1} == {}


def test_no_module_has_more_than_320_lines_and_few_functions_more_than_60():
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [path for path, length in lengths.items() if length > 320] == []
    long = [
        (name, node.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert len(long) <= 12, long  # to become 10


def test_only_known_modules_reach_into_other_libraries():
    """What the modules of ``training/fast`` replace works without them, so others know the room's entrance only."""
    wrong = []
    for name, tree in TREES.items():
        modules, attributes = IMPORTED[name], {n for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        used = {module for module in modules if module.split(".")[0] in ("ctypes", "llvmlite")}
        used |= {"sys.modules"} & ({ast.unparse(node) for node in attributes} | modules)
        used |= {"forward", "__class__"} & set(assigned(tree))
        used |= {module for module in modules if module.startswith("adaptkit.training.fast.")} - {
            "adaptkit.training.fast.accelerate", "adaptkit.training.fast.PARTS"
        }  # fmt: skip
        used = set() if name.startswith("training/fast/") else used
        if not name.startswith("hub/"):  # transformers raises its errors, too
            hub = {module for module in modules if module.startswith("huggingface_hub")}
            used |= {module for module in hub if not module.startswith("huggingface_hub.errors.")}
        if name.startswith("numerics/"):
            forbidden = "os", "pathlib", "json", "logging", "safetensors"
            used |= {module for module in modules if module.split(".")[0] in forbidden}
        wrong += [f"{name} uses {sorted(used)}"] if used else []
    assert not wrong


def test_all_public_names_exist():
    """The lazy table in ``adaptkit/__init__.py`` contains imports that the parser does not see."""
    assert [name for name in adaptkit.__all__ if not callable(getattr(adaptkit, name))] == ["__version__"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adaptkit.nonsense


def test_every_command_is_also_a_public_function():
    """Its classes of options are public, too."""
    for name in names(commands):
        for annotation in getattr(adaptkit, name).__annotations__.values():
            for option in re.findall(r"\w+Options|TrainConfig", str(annotation)):
                assert hasattr(adaptkit, option), (name, option)


def printed(code: str, *arguments: object) -> str:
    """The last line that a new process prints, in which ``heavy()`` names the large libraries that are loaded."""
    begin = "import sys\ndef heavy(*names): return sorted(set(sys.modules) & {'torch', 'transformers', *names})\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_no_help_needs_torch_and_no_import_of_the_interface_a_large_library():
    code = """
from importlib import import_module
from click.testing import CliRunner
for name in "", ".errors", ".discovery", ".cli.main", ".hub.publish", ".hub.pull", ".operations.check":
    import_module("adaptkit" + name)
    assert not heavy("numba"), name
from adaptkit.cli.main import cli, commands, names
for name in names(commands):
    done = CliRunner().invoke(cli, [name, '--help'])
    assert done.exit_code == 0 and name in done.output and not heavy(), (name, done.output)
print(len(names(commands)))
"""
    assert int(printed(code)) >= 8


def test_verify_and_check_do_not_load_torch():
    """Loading it takes longer than hashing a gigabyte. Some programs cannot load the adapter, hence exit code 1."""
    code = """
from adaptkit.cli.main import main
codes = []
for command, name in ("verify", "merged"), ("check", "adapter"):
    sys.argv[1:] = [command, f"{root}/{name}"]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
print(codes, heavy())
"""
    golden = PACKAGE.parent / "fixtures" / "golden" / "schema-1-undo-2"
    assert printed(f"root = {str(golden)!r}\n{code}") == "[0, 1] []"


def test_merging_and_quantizing_do_not_load_torch(llama, adapter, tmp_path):
    """Loading it takes longer than work on an adapter; transformers, which loads it, runs in a separate process."""
    pairs = [(llama, adapter)]
    pairs += [
        (case.base, case.adapter)
        for case in (peft_adapters.make(tmp_path, name) for name in ("dora", "tokens", "lora_bias", "saved_norms"))
    ]
    code = """
from pathlib import Path
from adaptkit import dequantize, inspect, merge, quantize, unmerge, MergeOptions
base, adapter, *others, out = map(Path, sys.argv[1:])
merge(base, [adapter], out / "plain", MergeOptions(undo=False))
quantize(base, out / "nf4")
dequantize(out / "nf4", out / "again")
for number, (base, adapter) in enumerate(zip([base, *others[::2]], [adapter, *others[1::2]])):
    merge(base, [adapter], out / f"merged{number}")
    unmerge(out / f"merged{number}", [adapter], out / f"back{number}")
made = sorted(out.glob("*/config.json"))
for folder in (base, adapter, *(path.parent for path in made)):
    inspect(folder)
print(len(made), heavy())
"""
    (tmp_path / "out").mkdir()
    assert printed(code, *(path for pair in pairs for path in pair), tmp_path / "out") == "13 []"
