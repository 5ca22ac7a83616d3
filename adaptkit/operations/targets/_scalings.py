"""By which factors programs scale what an adapter adds, where these are not the ones that it was trained with."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.checkpoint.adapter_config import Scalings, age_of_patterns
from adaptkit.errors import AdapterError
from adaptkit.numerics.scaling import scaling
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._rules import is_rank
from adaptkit.operations.targets._target import Finding, some

_LOW_RANK = ("A", "B", "embedding A", "embedding B", "wrapped weight")


def meant_otherwise(files: AdapterFiles, reader: str) -> Iterator[Finding]:
    """Patterns for rank and alpha by which an older release meant something else."""
    scalings = Scalings(files.root, files.config)
    pairs = [pair for pair in files.pairs if pair.scaling is not None] if age_of_patterns(files.config) else []
    try:
        found = [pair.module for pair in pairs if scalings.of(pair.module) != (pair.asked, pair.scaling)]
    except AdapterError:  # of numbers that are none, or patterns
        return
    if found:
        yield Finding(
            "error",
            f"rank or alpha of {some(found)}: rank_pattern and alpha_pattern follow the matching rule of peft up "
            "to 0.14",
            f"{reader} follows the current rule or none: it fails, or scales the module wrongly",
            files.merge(),
        )


def flat_change(files: AdapterFiles) -> str:
    """How to get rid of rsLoRA and patterns: another α where one number will do, else a merged model."""
    low_rank = all(key.role in _LOW_RANK for key in files.keys) and all(pair.rank for pair in files.pairs)
    if files.is_flat and low_rank:
        return f"run adaptkit resize {files.root} -o OUT --rank {files.pairs[0].rank}, which changes only lora_alpha"
    return files.merge()


def flat_scaling(alpha: Any, rank: Any, rslora: Any = False) -> float | None:
    """What a program multiplies by that knows one rank and one alpha; None if these are no numbers for that."""
    if not is_rank(rank) or not isinstance(alpha, int | float):
        return None
    try:
        return scaling(float(alpha), rank, bool(rslora))
    except OverflowError:  # a whole number that no float holds
        return None


def scaled_wrongly(files: AdapterFiles, used: Mapping[str, float | None]) -> list[tuple[str, float, float]]:
    """Modules that a program would scale by another factor than peft does.

    Args:
        files: of the adapter.
        used: the program's factor by module; None where it has none.

    Returns:
        (module, peft's factor, the program's).
    """
    found = []
    for pair in files.pairs:
        factor = used[pair.module]
        if pair.scaling is not None and factor is not None and not math.isclose(pair.scaling, factor, rel_tol=1e-6):
            found.append((pair.module, pair.scaling, factor))
    return found
