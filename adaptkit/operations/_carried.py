"""What lies beside the changes in adapters' folders, and has to stay with whatever is made of the adapters.

That is a tokenizer or a chat template that they were trained with, the configuration of generation that names their end
token, and peft's copies of tensors of the base, which hold the rows of new words where the vocabulary grew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.hashing import fingerprint
from adaptkit.checkpoint.layout import GENERATION_NAME, read_small, side_files
from adaptkit.checkpoint.undo import as_bytes
from adaptkit.errors import AdapterError, UsageError
from adaptkit.text.tokenizer_files import is_of_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Carried:
    """What comes along.

    Attributes:
        files: of tokenizer, chat template and generation, by name.
        copies: by name of the base's tensor, the adapter that has one, and its key there.
    """

    files: Mapping[str, bytes]
    copies: Mapping[str, tuple[Adapter, str]]

    def identity(self) -> list[list[str]]:
        """What of it is not among the adapters' tensors."""
        return [[name, fingerprint(as_bytes(content))] for name, content in sorted(self.files.items())]

    def tensors(self) -> dict[str, Tensor]:
        """The copies."""
        return {name: adapter.files.read(key) for name, (adapter, key) in self.copies.items()}


def carried(adapters: Sequence[Adapter]) -> Carried:
    """Collect what comes along with adapters.

    Raises:
        UsageError: two bring different tokenizers.
        AdapterError: two have different copies of one tensor.
    """
    files = {name: content for name, (content, _) in tokenizer_files(adapters).items()}
    copies: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for name, key in sorted(adapter.begins.items()):
            other, other_key = copies.setdefault(name, (adapter, key))
            if other.digests[other_key] != adapter.digests[key]:
                raise AdapterError(
                    f"{other.root} and {adapter.root} contain different copies of the base's {name}",
                    hint="merge one adapter after the other",
                )
    return Carried(files, copies)


def tokenizer_files(adapters: Sequence[Adapter]) -> dict[str, tuple[bytes, Adapter]]:
    """The files of tokenizers, templates and generation in adapters' folders, by name, and where each was found first.

    Raises:
        UsageError: two bring different ones.
    """
    brought: dict[str, tuple[bytes, Adapter]] = {}
    for adapter in adapters:
        ours = {record.path for record in adapter.manifest.files} if adapter.manifest else set()
        # Where nobody says that it was made, a configuration of generation is a copy that trainers leave there.
        kept = {GENERATION_NAME} & ours
        beside = side_files(adapter.root)
        own = {name: read_small(path) for name, path in beside.items() if name in kept or is_of_tokenizer(name)}
        for name, content in own.items():
            other = brought.setdefault(name, (content, adapter))
            if other[0] != content:
                raise UsageError(
                    f"{other[1].root} and {adapter.root} contain different versions of {name}",
                    hint=f"remove {name} from a copy of one of them; of a tokenizer, remove all files",
                )
    return brought
