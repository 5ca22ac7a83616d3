"""The key of a step: a hash of everything that determines its outputs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import adaptkit
from adaptkit.checkpoint.layout import name_of
from adaptkit.pipeline.recipe import Step
from adaptkit.pipeline.sources import Material

_SCHEMA = 2


def step_key(step: Step, materials: Mapping[str, Material]) -> str | None:
    """Hash a step's kind and options, adaptkit's version, and the content of its inputs.

    Args:
        step: of a recipe.
        materials: maps names to materials, as far as they are known.

    Returns:
        64 hexadecimal digits; None if an input is not known yet.
    """
    inputs = []
    for taken, name in step.takes():
        material = materials.get(name)
        if material is None or material.digest is None or material.path is None:
            return None
        # A folder's name may be written into an artifact made from it; only the suffix of a file's name matters.
        called = name_of(material.path) if taken.takes != "file" else material.path.suffix
        inputs.append([taken.key, called, material.digest])
    counted = {name: value for name, value in asdict(step.options).items() if name not in step.how.not_in_key}
    document = {
        "schema": _SCHEMA,
        "adaptkit": adaptkit.__version__,
        "kind": step.kind,
        "options": counted,
        "inputs": inputs,
        "makes": list(step.makes),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
