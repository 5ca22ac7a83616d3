"""Factors by which programs scale an adapter's change, where they differ from those of training."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adaptkit.checkpoint.adapter_config import AS_MEANT, has_older_patterns
from adaptkit.numerics.scaling import scaling
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._rules import is_rank
from adaptkit.operations.targets._target import Finding

_LOW_RANK = ("A", "B", "embedding A", "embedding B", "wrapped weight")


def reinterpreted_patterns(files: AdapterFiles, reader: str) -> Iterator[Finding]:
    """Find rank and alpha patterns that meant something else in the peft release that wrote them."""
    if has_older_patterns(files.config):
        yield Finding(
            "error",
            "rank_pattern and alpha_pattern follow the matching rule of peft up to 0.14",
            f"{reader} follows the current rule or none: it fails, or scales modules wrongly",
            AS_MEANT,
        )


def flat_change(files: AdapterFiles) -> str:
    """Return the advice to get rid of rsLoRA and patterns: change α if one value suffices, otherwise merge."""
    low_rank = all(key.role in _LOW_RANK for key in files.keys) and all(pair.rank for pair in files.pairs)
    if files.is_flat and low_rank:
        return f"run adaptkit resize {files.root} -o OUT --rank {files.pairs[0].rank}, which changes only lora_alpha"
    return files.merge()


def flat_scaling(alpha: Any, rank: Any, rslora: Any = False) -> float | None:
    """Return the factor of a program that knows only one rank and one alpha; None if they are invalid."""
    if not is_rank(rank) or not isinstance(alpha, int | float):
        return None
    try:
        return scaling(float(alpha), rank, bool(rslora))
    except OverflowError:  # an integer too large for a float
        return None


def scaled_wrongly(files: AdapterFiles, used: Mapping[str, float | None]) -> list[tuple[str, float, float]]:
    """Return the modules that a program scales by a different factor than peft.

    Args:
        files: the adapter's files.
        used: maps modules to the program's factor; None if it has none.

    Returns:
        Tuples (module, peft's factor, the program's factor).
    """
    found = []
    for pair in files.pairs:
        factor = used[pair.module]
        if pair.scaling is not None and factor is not None and not math.isclose(pair.scaling, factor, rel_tol=1e-6):
            found.append((pair.module, pair.scaling, factor))
    return found
