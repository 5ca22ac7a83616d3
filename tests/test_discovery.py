"""The files of a folder are the entries of a registry; errors have documented classes and codes."""

import importlib
import inspect
import re
import sys
from types import ModuleType

import pytest

from adaptkit import discovery, errors, formats
from adaptkit.formats._stored import Format
from adaptkit.numerics import stacking
from adaptkit.numerics.stacking._method import Method

pytestmark = pytest.mark.quick


@pytest.fixture
def registry(tmp_path, monkeypatch) -> ModuleType:
    folder = tmp_path / "made_up_registry"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "second.py").write_text("ENTRY = 2\n")
    (folder / "first.py").write_text("ENTRY = 1\n")
    (folder / "broken.py").write_text("raise RuntimeError('imported')\n")
    (folder / "_private.py").write_text("ENTRY = 0\n")
    (folder / "notes.txt").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("made_up_registry")]:
        monkeypatch.delitem(sys.modules, name)
    import made_up_registry

    return made_up_registry


def test_entries_are_the_public_files_in_order_and_none_is_imported(registry):
    assert discovery.names(registry) == ["broken", "first", "second"]


def test_an_added_file_becomes_an_entry(registry, tmp_path):
    (tmp_path / "made_up_registry" / "third.py").write_text("ENTRY = 3\n")
    importlib.invalidate_caches()
    assert discovery.load(registry, "third", "ENTRY") == 3
    assert "third" in discovery.names(registry)


@pytest.mark.parametrize("name", ["nonsense", "_private", "", "first.x", "../first"])
def test_an_unknown_entry_is_refused_with_a_list_of_existing_ones(registry, name):
    with pytest.raises(errors.UsageError, match=re.escape(repr(name))) as caught:
        discovery.load(registry, name, "ENTRY")
    assert caught.value.hint == "choose one of: broken, first, second"


def test_the_error_of_an_entry_that_fails_to_import_is_raised_unchanged(registry):
    with pytest.raises(RuntimeError, match="imported"):
        discovery.load(registry, "broken", "ENTRY")


@pytest.mark.parametrize(("package", "attribute", "kind"), [(formats, "FORMAT", Format), (stacking, "METHOD", Method)])
def test_every_entry_defines_what_its_registry_promises(package, attribute, kind):
    assert discovery.names(package)
    for name in discovery.names(package):
        assert isinstance(discovery.load(package, name, attribute), kind)


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_exit_codes_are_the_designed_ones():
    codes = {
        code: {kind.__name__.removesuffix("Error") for kind in ERRORS if kind.exit_code == code} for code in range(10)
    }
    assert codes == {
        0: set(), 1: {"Adaptkit"}, 2: {"Usage", "Config"}, 3: {"Integrity", "Drift"}, 4: {"BaseMismatch"},
        5: {"UnsafeInput", "Checkpoint", "Adapter", "Data", "NonFinite"}, 6: {"Authentication"}, 7: {"Network"},
        8: {"Conflict", "OutputExists"}, 9: {"Gate"},
    }  # fmt: skip


def test_only_network_errors_are_retryable():
    assert [kind.__name__ for kind in ERRORS if kind.retryable] == ["NetworkError"]


def test_error_codes_are_unique_and_in_snake_case():
    codes = [kind("message").code for kind in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)
    assert errors.OutputExistsError("x").code == "output_exists"


def test_an_error_carries_message_and_hint():
    error = errors.IntegrityError("this differs", hint="get it again")
    assert (str(error), error.message, error.hint) == ("this differs", "this differs", "get it again")
