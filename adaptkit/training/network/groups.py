"""A frozen quantized matrix whose groups have scales: integers, FP8, MXFP4, NVFP4; decoded by plain torch anywhere."""

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.numerics.tensors import as_tensor

_AT_A_TIME = 1 << 20
"""Weights read, and on a CPU decoded, at a time, so that only few are in float32."""


class PackedGroups(nn.Module):
    """A matrix, (out, in), as its codes, two to a byte if they have 4 bits or fewer, and what its groups share.

    Args:
        weight: the weight.
        files: the checkpoint that it is in.
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None

    def __init__(self, weight: GroupedWeight, files: Checkpoint) -> None:
        super().__init__()
        rows, columns = self.shape = weight.shape
        step = max(1, _AT_A_TIME // columns)
        slabs = [weight.rows(files, first, min(step, rows - first)) for first in range(0, rows, step)]
        levels = slabs[0].values
        self.is_pairs = len(levels) <= 16 and columns % 2 == 0
        codes = torch.cat([_packed(slab, self.is_pairs) for slab in slabs])
        self.register_buffer("codes", codes)
        self.register_buffer("levels", as_tensor(levels))
        self.register_buffer("scales", _smallest(torch.cat([as_tensor(slab.scales) for slab in slabs])))
        zeros = [as_tensor(slab.zeros).to(torch.int16) for slab in slabs if slab.zeros is not None]
        self.register_buffer("zeros", torch.cat(zeros) if zeros else None)
        groups = slabs[0].groups
        self.register_buffer("groups", None if groups is None else as_tensor(groups).to(torch.int32))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return (level - zero point) times scale in float32, rounded once to ``dtype``: (out, in)."""
        rows, columns = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        step = max(1, _AT_A_TIME // columns) if out.is_cpu else rows
        for first in range(0, rows, step):
            here = slice(first, min(rows, first + step))
            values = self._levels_of(self.codes[here])
            shape = values.shape if self.groups is not None else (len(values), self.scales.shape[1], -1)
            if self.zeros is not None:
                values = values.view(shape) - self._spread(self.zeros[here].float())
            out[here] = (values.view(shape) * self._spread(self.scales[here].float())).view(-1, columns)
        return out

    def _levels_of(self, codes: Tensor) -> Tensor:
        if not self.is_pairs:
            return self.levels.index_select(0, codes.view(-1).int()).view(codes.shape)
        count, byte = len(self.levels), torch.arange(256, device=codes.device)
        pairs = torch.stack((self.levels[byte % 16 % count], self.levels[byte // 16 % count]), dim=1)
        return pairs.index_select(0, codes.view(-1).int()).view(len(codes), -1)

    def _spread(self, constants: Tensor) -> Tensor:
        return constants.unsqueeze(2) if self.groups is None else constants[:, self.groups]


def has_groups(network: nn.Module) -> bool:
    """Whether any weight of a network is such a matrix."""
    return any(isinstance(module, PackedGroups) for module in network.modules())


def _packed(slab: CodedRows, is_pairs: bool) -> Tensor:
    codes = as_tensor(slab.codes.copy())
    return codes[:, 0::2] | codes[:, 1::2] << 4 if is_pairs else codes


def _smallest(scales: Tensor) -> Tensor:
    """Return scales in 16 bits if these hold all of them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales
