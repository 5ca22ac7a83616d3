"""A release folder with a tiny model and without training, quick enough to run many times."""

import shutil

import pytest

RECIPE = """\
name: tiny
sources:
  base: {path: model}
  lora: {path: lora}
steps:
  small: {quantize: base}
  plain: {dequantize: small}
  lighter: {resize: lora, rank: 2}
  merged: {merge: base, adapters: [lighter]}
  loads: {check: merged, target: [peft]}
"""


@pytest.fixture
def release(tmp_path, llama, adapter):
    """A folder that holds a recipe and its sources."""
    folder = tmp_path / "release"
    folder.mkdir()
    shutil.copytree(llama, folder / "model")
    shutil.copytree(adapter, folder / "lora")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def edit(release):
    """Change the recipe."""

    def edit(old, new):
        text = (release / "recipe.yaml").read_text()
        assert old in text
        (release / "recipe.yaml").write_text(text.replace(old, new, 1))

    return edit
