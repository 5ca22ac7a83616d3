"""The files of a checkpoint by the names that the model has for what is in them."""

import re
from typing import Any

from torch import Tensor

from adaptkit.checkpoint import quantized
from adaptkit.checkpoint.naming import Place, places
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.training.linear import FrozenWeight, NF4Weight, PlainWeight


class Source:
    """What a model is loaded from.

    Args:
        checkpoint: packed or plain.
        network: the model, empty, before any of its layers is replaced.

    Attributes:
        root: the checkpoint's folder.
        files: by the parameter's name, the name of the tensor that is used for it as it is.
        pieces: by the parameter's name, the tensors that it is put together from.
    """

    def __init__(self, checkpoint: Checkpoint, network: Any) -> None:
        self.root, self._checkpoint = checkpoint.root, checkpoint
        self._packed = set(quantized.quantized_names(checkpoint))
        self._parts = {name: quantized.part_names(checkpoint, name) for name in self._packed}
        parts = {part for name, found in self._parts.items() for part in found if part != name}
        self._used: set[str] = set()
        self.files: dict[str, str] = {}
        self.pieces: dict[str, dict[str, Place]] = {}
        for name, place in places(network, [name for name in checkpoint.tensors if name not in parts]).items():
            if place.pattern:
                self.pieces.setdefault(place.parameters[0], {})[name] = place
            else:
                self.files[place.parameters[0]] = name

    def is_packed(self, parameter: str) -> bool:
        """Whether a parameter of the model is one quantized weight in the files."""
        return self.files.get(parameter) in self._packed

    def read(self, name: str) -> Tensor:
        """Read a plain tensor by its name in the files."""
        self._used.add(name)
        return self._checkpoint.read(name)

    def weight(self, name: str, transposed: bool = False) -> FrozenWeight:
        """Read a weight by its name in the files, packed or plain.

        Args:
            name: of the tensor.
            transposed: whether a plain one is (in, out); packed ones never are.
        """
        if name in self._packed:
            self._used.update(self._parts[name])
            return NF4Weight(quantized.read_quantized(self._checkpoint, name))
        plain = self.read(name)
        return PlainWeight(plain.T.contiguous() if transposed else plain)

    def unused(self, network: Any) -> list[str]:
        """Names of tensors that nothing was done with, sorted.

        Left out are second copies of what the model ties, and what transformers too knows to be left over.
        """
        tied = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        tied_files = {file for parameter, file in self.files.items() if parameter in tied}
        left = sorted(set(self._checkpoint.tensors) - self._used - tied - tied_files)
        patterns = network._keys_to_ignore_on_load_unexpected or ()
        return [name for name in left if not any(re.search(pattern, name) for pattern in patterns)]
