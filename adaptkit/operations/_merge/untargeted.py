"""What an adapter holds and its configuration does not ask for, so that peft itself would leave it out."""

from collections.abc import Iterator, Sequence

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.operations.targets import _peft_config
from adaptkit.operations.targets._target import some


def untargeted(adapters: Sequence[Adapter]) -> Iterator[str]:
    """A sentence for each adapter that has more than ``adapter_config.json`` names."""
    for adapter in adapters:
        config = adapter.config
        if config.get("target_modules") in (None, _peft_config.SHORTHAND) or adapter.ties_weights:
            continue  # peft asks the architecture, or adds what is tied
        found = _peft_config.untargeted(config, adapter.modules)
        if found:
            yield (
                f"{adapter.root}: adapter_config.json does not ask for {some(found)}, which peft would leave out; "
                "it is in the file, and merged"
            )
