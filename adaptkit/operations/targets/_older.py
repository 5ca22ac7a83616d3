"""What an adapter's configuration meant to the release of peft that wrote it, and means no more."""

from collections.abc import Iterator

from adaptkit.checkpoint.adapter_config import Scalings, age_of_patterns
from adaptkit.errors import AdapterError
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._target import Finding, some


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
            f"rank or alpha of {some(found)}: rank_pattern and alpha_pattern as peft up to 0.14 matched them",
            f"{reader} goes by today's rule, or by none: it fails, or scales what was learned there otherwise",
            files.merge(),
        )
