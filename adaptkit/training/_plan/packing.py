"""Which weights of a planned base are packed, and how many bytes the frozen weights take.

    packed       the codes; per block a constant of 1 byte, a float32 per 256 of these and a table of their levels, or
                 without double quantization a constant of 4 bytes
    groups       (integers, FP8, MXFP4, NVFP4) the codes, and per group 2 bytes, or 4 with zero points
    others       linear layers as stored, everything else in the compute dtype

A base that is quantized already is packed as its configuration says, any other as ``quantize`` does by default.
bitsandbytes' configuration does not tell the block size, which is planned as 64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from adaptkit.formats._blockwise import Blockwise
from adaptkit.formats._find import stated_encoding
from adaptkit.formats._format import Encoding, stated_quantization
from adaptkit.models.assembly import find_stack
from adaptkit.models.kinds import is_router
from adaptkit.numerics.spec import TensorSpec
from adaptkit.training._plan.network import Shape, expert_stacks


@dataclass(frozen=True)
class Packing:
    """The packed weights of a network.

    Attributes:
        names: of the weights, as parameters of the network.
        encoding: how they are quantized.
    """

    names: frozenset[str]
    encoding: Encoding

    @classmethod
    def of(cls, network: Any, shapes: Mapping[str, Shape], config: Mapping[str, Any], moe: str | None) -> Self:
        """Return what is packed of a quantized base.

        Args:
            network: on the meta device.
            shapes: by path of every linear layer but the output layer.
            config: content of ``config.json``.
            moe: whether experts are packed: ``quantize`` or ``keep``; None as the configuration says, or kept.
        """
        stated = stated_encoding(stated_quantization(config))
        encoding, kept = stated or (Encoding(), None)
        experts, head = set(expert_stacks(network)), network.get_output_embeddings()
        names = {f"{name}.weight" for name in shapes if not is_router(name)}
        if kept is not None:  # else the output layer is not packed
            names |= {f"{name}.weight" for name, module in network.named_modules() if module is head}
        if stated and moe is None:
            names |= experts
        names = {name for name in names if not any(f".{path}." in f".{name}." for path in kept or ())}
        return cls(frozenset(names | experts if moe == "quantize" else names), encoding)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a packed weight."""
        parts = self._parts(shape)
        if isinstance(self.encoding.codec, Blockwise):
            return sum(part.nbytes for part in parts if ".quant_" not in part.name)  # state and levels: in files alone
        groups = shape[0] * parts[-1].shape[1]  # scales of a block are held for each of its rows
        return parts[0].nbytes + groups * (4 if self.encoding.zero_points else 2)

    def codes_nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of its codes that are mapped, not held in memory."""
        return self._parts(shape)[0].nbytes if isinstance(self.encoding.codec, Blockwise) else 0

    def _parts(self, shape: Sequence[int]) -> list[TensorSpec]:
        return self.encoding.codec.specs(TensorSpec("weight", "BF16", tuple(shape)), self.encoding)

    def codes_of_layers(self, network: Any) -> list[list[int]]:
        """Return the bytes of the codes of every layer's packed weights."""
        path, layers = find_stack(network)
        return [
            [
                self.codes_nbytes(one.shape)
                for name, one in layer.named_parameters()
                if f"{path}.{index}.{name}" in self.names
            ]
            for index, layer in enumerate(layers)
        ]

    def frozen_nbytes(self, network: Any, shapes: Mapping[str, Shape], dtype: torch.dtype, stored: torch.dtype) -> int:
        """Return the bytes of all weights of a network whose every weight is frozen."""
        linear = {f"{name}.weight" for name in shapes} | {f"{name}.bias" for name in shapes}
        return sum(
            self.nbytes(parameter.shape)
            if name in self.names
            else parameter.numel() * (stored if name in linear else dtype).itemsize
            for name, parameter in network.named_parameters()
        )
