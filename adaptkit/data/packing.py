"""Packing: several samples in one sequence; ``network.probing`` checks that a model keeps them separate."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into rows by best-fit decreasing: each into the fullest row that has room for it.

    Args:
        lengths: tokens of each sample, at most ``capacity``; samples of equal length keep their order.
        capacity: tokens of a row.

    Returns:
        The indices of the samples in each row. The number of rows does not depend on the order of the samples.

    Source: best-fit packing (arXiv:2404.10830), for samples that are cut already.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: a row has room for exactly n
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
