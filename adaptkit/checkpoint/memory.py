"""What a training run needs of memory, by part."""

from dataclasses import asdict, dataclass

LOGITS_CHUNK_BYTES = 32 << 20
"""Of logits that exist at a time, in the compute dtype; at least ``LEAST_ROWS`` rows."""

LEAST_ROWS = 32


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


def rows_at_a_time(vocabulary: int, itemsize: int) -> int:
    """How many positions go through the output layer at a time."""
    return max(LEAST_ROWS, LOGITS_CHUNK_BYTES // (vocabulary * itemsize))


def logits_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """Of a chunk of logits, for a batch with so many positions that may carry loss."""
    return min(rows, rows_at_a_time(vocabulary, itemsize)) * vocabulary * itemsize
