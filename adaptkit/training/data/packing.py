"""Packing: several samples in one sequence, kept apart by their positions.

transformers tells the samples of a sequence by positions that begin again, and lets none attend to another, as long as
it gets no mask: ``sdpa`` and ``eager`` attention through a mask that it makes, in sequences of any number; flash
attention for one sequence at a time, by lengths. What does not attend (convolutions, states) sees other samples.
"""

from collections.abc import Sequence
from typing import Any

import torch

from adaptkit.errors import UsageError

_PROBE_TOKENS = 6
_TOLERANCE = 0.02
"""Of the deviation of the logits: other samples change the rounding of some layers, and no more."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as best-fit decreasing needs: each into the fullest row that has room for it.

    Args:
        lengths: of the samples, at most ``capacity`` each; equally long ones keep their order.
        capacity: tokens of a row.

    Returns:
        The samples' numbers in each row. How many rows there are does not depend on the order of the samples.

    Source: best-fit packing (arXiv:2404.10830), for samples that are cut already.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: there is a row with room for n
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sample]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        with_room[room - length].append(row)
        rooms |= 1 << room - length
    return rows


@torch.no_grad()
def check_packing(network: Any) -> None:
    """Make sure that a model keeps packed samples apart: nothing may change for one when another does.

    Args:
        network: transformers' model.

    Raises:
        UsageError: something does.
    """
    device = next(network.parameters()).device
    known = network.get_input_embeddings().weight.shape[0]
    first, other, second = (torch.arange(start, start + _PROBE_TOKENS) % known for start in (0, known // 2, known // 3))
    positions = torch.arange(_PROBE_TOKENS).repeat(2)[None].to(device)
    one, two = (
        network(
            input_ids=torch.cat([before, second])[None].to(device), position_ids=positions, use_cache=False
        ).logits[0, _PROBE_TOKENS:].float()
        for before in (first, other)
    )  # fmt: skip
    if float((one - two).abs().max()) > _TOLERANCE * float(one.std()):
        raise UsageError(
            f"{type(network).__name__} does not keep packed samples apart",
            hint="pack: false, group_by_length: true",
        )
