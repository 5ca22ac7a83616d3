"""LoRA of convolutions, which programs that know linear layers alone have no place for."""

from collections.abc import Iterator

from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._target import Finding, some


def convolutions(files: AdapterFiles, program: str) -> Iterator[Finding]:
    """Modules whose A and B are those of a convolution."""
    found = [pair.module for pair in files.pairs if pair.is_convolution]
    if found:
        effect = f"{program} has it for matrices alone"
        yield Finding("error", f"LoRA of convolutions: {some(found)}", effect, files.merge_elsewhere())
