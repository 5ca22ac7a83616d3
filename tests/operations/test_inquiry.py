"""A child process asks transformers, which is not imported here; the answer is the same as in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from folders import edit_json, edited_tensors
from forks import Forks

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._inquiry import Inquiry, _cache_key
from adaptkit.operations._roles import determine_roles

IMPORTS = """
import torch, adaptkit.checkpoint.reader, adaptkit.operations._inquiry
from hidden import hide_transformers

hide_transformers()
"""
ASK = """
import json, sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._inquiry import Inquiry

inquiries = [Inquiry(Checkpoint(Path(folder))) for folder in sys.argv[1:]]  # at the same time
answers = []
for inquiry in inquiries:
    with inquiry:
        try:
            roles = inquiry.answer()
            of = {name: [role.kind, role.is_linear, list(role.paths)] for name, role in roles.of.items()}
            answers.append([of, roles.read_from, roles.head, roles.tied])
        except UsageError as error:
            answers.append(error.message)
print(json.dumps([answers, "transformers" in sys.modules]))
"""
LEAVE = """
import sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._inquiry import Inquiry

with Inquiry(Checkpoint(Path(sys.argv[1]))) as inquiry:
    print(inquiry._process.pid)
"""


@pytest.fixture(scope="module")
def run():
    """Run code in a forked process in which transformers is not imported yet, but importing it takes no time."""
    with Forks(IMPORTS) as forks:
        yield lambda *words: _succeeded(forks(*words)).stdout


def _succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


def test_the_child_process_gives_the_same_answer_as_this_process(llama, copy_of, tmp_path):
    mixtral, broken = tiny.write_family(tmp_path / "mixtral", "mixtral"), copy_of(llama)
    edit_json(broken / "config.json", num_hidden_layers="2")
    command = [sys.executable, "-c", ASK, llama, mixtral, broken]
    done = _succeeded(subprocess.run(command, capture_output=True, text=True))
    (found, *others), loaded = json.loads(done.stdout)
    for folder, answer in zip((llama, mixtral), (found, others[0]), strict=True):
        roles = determine_roles(Checkpoint(folder))
        of = {name: [role.kind, role.is_linear, list(role.paths)] for name, role in roles.of.items()}
        assert answer == [of, roles.read_from, roles.head, roles.tied]
    with pytest.raises(UsageError) as caught:
        determine_roles(Checkpoint(broken))
    assert others[1] == caught.value.message
    assert not loaded


def test_leaving_the_context_before_the_answer_ends_the_process(run, llama):
    number = int(run(LEAVE, llama))
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_no_process_is_started_if_transformers_is_imported_already(llama):
    import transformers

    with Inquiry(Checkpoint(llama)) as inquiry:
        assert inquiry._process is None
        assert transformers.__version__ in inquiry.answer().read_from


KNOW = """
import json, sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._inquiry import Inquiry

with Inquiry(Checkpoint(Path(sys.argv[1]))) as inquiry:
    takes_long, roles = inquiry.takes_long, inquiry.answer()
    of = {name: [role.kind, role.is_linear, list(role.paths)] for name, role in roles.of.items()}
    print(json.dumps([takes_long, [of, roles.read_from, roles.head, roles.tied]]))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def test_cached_answers_are_reused_and_identical(run, llama, copy_of, cache):
    first, second, elsewhere = (json.loads(run(KNOW, folder)) for folder in (llama, llama, copy_of(llama)))
    assert [first[0], second[0], elsewhere[0]] == [True, False, False]
    assert first[1] == second[1] == elsewhere[1]


def test_different_configurations_or_tensors_are_not_answered_from_the_cache(
    run, llama, llama_sharded, gpt2, copy_of, cache
):
    assert json.loads(run(KNOW, llama))[0]
    assert not json.loads(run(KNOW, llama_sharded))[0]  # the same tensors in other files
    assert json.loads(run(KNOW, gpt2))[0]
    changed = copy_of(llama)
    edit_json(changed / "config.json", rope_theta=5.0)
    assert json.loads(run(KNOW, changed))[0]
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        "_inquiry.__version__ = '9.9'",
        "_inquiry.file_sha256 = lambda path: str(path)",
        "_inquiry._VERSION = __import__('re').compile('(Copyright)')",
    ],
    ids=["adaptkit", "the code that is asked", "transformers"],
)
def test_cached_answers_of_different_versions_of_the_code_are_not_used(run, llama, cache, change):
    assert json.loads(run(KNOW, llama))[0]
    assert json.loads(run(f"from adaptkit.operations import _inquiry; {change}\n{KNOW}", llama))[0]
    assert len(list(cache.iterdir())) == 2


def test_the_cache_key_includes_the_code_of_the_architecture(llama):
    import transformers

    package = Path(transformers.__file__).parent
    rules = [Path(path) for path, _ in _cache_key(Checkpoint(llama))[-1]]
    assert package / "models" / "llama" / "modeling_llama.py" in rules
    assert all(path.is_file() for path in rules)


def test_tensors_of_different_shapes_are_not_answered_from_the_cache(run, llama, copy_of, cache):
    assert json.loads(run(KNOW, llama))[0]
    changed = copy_of(llama)
    (file,) = changed.glob("*.safetensors")
    with edited_tensors(file) as tensors:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32]
    assert json.loads(run(KNOW, changed))[0]


CHANGE = """
import json, sys
from pathlib import Path
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.operations._inquiry import Inquiry

checkpoint, path = Checkpoint(Path(sys.argv[1])), Path(sys.argv[1]) / "config.json"
before = path.read_text()
checkpoint.config
path.write_text(json.dumps(json.loads(before) | {"model_type": "nonsense"}))
with Inquiry(checkpoint) as inquiry:
    print(inquiry.answer().read_from)
path.write_text(before)
"""


def test_an_answer_is_not_cached_if_the_configuration_changed_meanwhile(run, llama, copy_of, cache):
    folder = copy_of(llama)
    assert "nonsense" in run(CHANGE, folder)
    takes_long, answer = json.loads(run(KNOW, folder))
    assert takes_long
    assert "LlamaForCausalLM" in answer[1]


@pytest.mark.parametrize("failure", ["OSError", "ValueError", "AdaptkitError"])
def test_the_cache_is_not_used_if_its_key_cannot_be_computed(run, llama, cache, failure):
    broken = f"""
from adaptkit.errors import AdaptkitError
from adaptkit.operations import _inquiry
def fail(path): raise {failure}("no")
_inquiry.file_sha256 = fail
"""
    assert json.loads(run(broken + KNOW, llama))[0]
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda answer: {},
        lambda answer: answer | {"of": {}},
        lambda answer: answer | {"of": {name: role[:2] for name, role in answer["of"].items()}},
        lambda answer: answer | {"of": dict(list(answer["of"].items())[1:])},
        lambda answer: {"error": "usage", "message": "no", "hint": ""},
    ],
)
def test_damaged_cached_answers_are_computed_again_and_replaced(run, llama, cache, damage):
    found = json.loads(run(KNOW, llama))
    (kept,) = cache.iterdir()
    kept.write_text(json.dumps(damage(json.loads(kept.read_text()))))
    assert json.loads(run(KNOW, llama)) == found
    assert json.loads(run(KNOW, llama)) == [False, found[1]]


def test_errors_are_not_cached(run, llama, copy_of, cache):
    broken = copy_of(llama)
    edit_json(broken / "config.json", num_hidden_layers="2")
    json.loads(run(ASK, broken))
    assert not cache.exists()


def test_answers_of_a_development_version_of_transformers_are_not_cached(run, llama, cache):
    code = """
from pathlib import Path
from adaptkit.operations import _inquiry
read = Path.read_text
def unreleased(path, *how, **more):
    text = read(path, *how, **more)
    found = _inquiry._VERSION.search(text) if path.name == "__init__.py" else None
    return text.replace(found[1], "9.0.dev0") if found else text
Path.read_text = unreleased
"""
    assert json.loads(run(code + KNOW, llama))[0]
    assert not cache.exists()


def test_quantizing_with_a_cached_answer_gives_the_same_bytes(llama, cache, tmp_path, run_cli):
    for name in ("asked", "known"):
        run_cli("quantize", llama, "-o", tmp_path / name)
    assert len(list(cache.iterdir())) == 1
    for path in (tmp_path / "asked").iterdir():
        assert path.read_bytes() == (tmp_path / "known" / path.name).read_bytes(), path.name


BYTECODE_OF_OTHERS = """
import importlib._bootstrap_external as loading, os
path_of = loading.cache_from_source
def cache_from_source(path, *others, **options):
    without_docstrings = "transformers" in path or path.startswith(os.environ["PYTHONPATH"].split(os.pathsep)[1])
    return path_of(path, *others, **options | ({} if without_docstrings else {"optimization": ""}))
loading.cache_from_source = cache_from_source
"""
"""For -OO: use the ordinary bytecode of packages other than transformers and adaptkit; compiling them takes longer than
all else. What has no such bytecode is compiled without docstrings, so nothing may be written there."""


def test_without_docstrings_the_hint_names_the_flag_that_removes_them(llama, tmp_path):
    """transformers reads the docstrings of its own classes, and fails without; config.json is not to blame."""
    (tmp_path / "sitecustomize.py").write_text(BYTECODE_OF_OTHERS)
    command = [sys.executable, "-OO", "-m", "adaptkit", "quantize", llama, "-o", tmp_path / "out", "--dry-run"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "hint: run Python without -OO" in done.stderr
