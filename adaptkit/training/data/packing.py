"""Packing: several samples in one sequence, which ``network.probing`` makes sure that a model keeps apart."""

from collections.abc import Sequence


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
