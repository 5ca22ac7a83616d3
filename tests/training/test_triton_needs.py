"""Triton is not used if it could not compile its launchers, and a run on a GPU reports what it lacks."""

import shutil
import sysconfig

import pytest
import torch

from adaptkit.training import triton_needs
from adaptkit.training.device import triton_warning
from adaptkit.training.triton_needs import has_triton, what_triton_lacks


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Pretend that all requirements are met; return a function that sets the programs that are found."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_needs, "find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})

    def has(*programs):
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        what_triton_lacks.cache_clear()

    has("gcc")
    yield has
    what_triton_lacks.cache_clear()


def test_triton_is_available_if_a_compiler_is_found(machine, monkeypatch):
    for programs in (["gcc"], ["clang"]):
        machine(*programs)
        assert has_triton("cuda")
    machine()
    assert not has_triton("cuda")
    monkeypatch.setenv("CC", "/opt/cc")
    machine("gcc")
    assert not has_triton("cuda")  # Triton runs only what CC names
    machine("/opt/cc")
    assert has_triton("cuda")
    assert not has_triton("cpu")
    assert triton_warning(torch.device("cuda")) == triton_warning(torch.device("cpu")) == ""


@pytest.mark.parametrize("lacking", ["a C compiler", "Python.h", "the package triton"])
def test_missing_requirements_are_reported(machine, monkeypatch, tmp_path, lacking):
    if lacking == "a C compiler":
        machine("cc")  # which Triton does not look for
    elif lacking == "Python.h":
        (tmp_path / "Python.h").unlink()
    else:
        monkeypatch.setattr(triton_needs, "find_spec", lambda name: None)
    what_triton_lacks.cache_clear()
    assert not has_triton("cuda")
    assert f"slower without {lacking}" in triton_warning(torch.device("cuda"))
    assert triton_warning(torch.device("cpu")) == ""
