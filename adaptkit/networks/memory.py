"""What a training run needs of memory, by part."""

from dataclasses import asdict, dataclass

LOGITS_CHUNK_BYTES = 32 << 20
"""Of logits that exist at a time, in the compute dtype; at least ``LEAST_ROWS`` rows."""

LEAST_ROWS = 32

_TILE = 128
"""Rows that a GPU multiplies at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device.

    Attributes:
        weights: frozen, as they are held; and buffers.
        trainable: what is trained, in float32.
        gradients: of it.
        optimizer: the moments that are resident.
        activations: what the layers keep, and need for a while, at the largest batch.
        logits: one chunk of them.
    """

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts: a little more than is ever alive at once."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def rows_at_a_time(vocabulary: int, itemsize: int, in_place: bool = False) -> int:
    """How many positions go through the output layer at a time.

    Args:
        vocabulary: number of tokens.
        itemsize: of a logit.
        in_place: whether a GPU makes their gradient where they lie; it gets more rows, since it reads the layer's whole
            weight for every chunk, and whole tiles of them.
    """
    rows = max(LEAST_ROWS, (4 if in_place else 1) * LOGITS_CHUNK_BYTES // (vocabulary * itemsize))
    return rows - rows % _TILE if in_place and rows > _TILE else rows


def logits_bytes(rows: int, vocabulary: int, itemsize: int, in_place: bool = False) -> int:
    """Of a chunk of logits, for a batch with so many positions that may carry loss."""
    return min(rows, rows_at_a_time(vocabulary, itemsize, in_place)) * vocabulary * itemsize
