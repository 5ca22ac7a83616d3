"""The memory that a training run needs, by part."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

LOGITS_CHUNK_BYTES = 32 << 20
"""Size of one chunk of logits in the compute dtype; a chunk has at least ``LEAST_ROWS`` rows."""

GRADIENT_BLOCK_BYTES = 32 << 20
"""Size of a block of the gradient of a trained output layer, in the compute dtype."""

LEAST_ROWS = 32

ATTENTION_ROWS = 128
"""Queries in a block of attention on a CPU."""

ATTENTION_SCORES = 1 << 20
"""Scores in a block of attention on a CPU: as many as fit its cache."""

KEPT_PRODUCTS = 64
"""Compiled products of matrices that oneDNN caches in a training run."""

_TILE = 128
"""Rows of a GPU's matrix multiplication tile."""


_PRODUCTS_BYTES = KEPT_PRODUCTS << 18
"""Memory of the plans that oneDNN caches, one for each product of bfloat16 matrices: 258 kB, whatever their shapes."""
_LIBRARIES_BYTES = 28 << 20
"""Measured: code of libraries that the steps are the first to run, buffers of the heap, and small gaps in it."""
_LAYER_BYTES = 1 << 19
"""Measured: Python's objects of a layer's modules."""
_GAPS = 12
"""Measured: layers that keep everything leave gaps of up to a tenth of that between tensors, on average a twelfth."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device.

    Attributes:
        weights: frozen weights in their storage format, and buffers; of a sharded base this process's part, and two
            whole layers; on a CPU, of the packed weights of checkpointed layers one at a time.
        trainable: trained parameters, in float32; on a CPU also the best ones so far, with ``eval_every``.
        gradients: their gradients.
        optimizer: the optimizer moments that are resident.
        activations: activations that the layers keep, and their workspace, for the largest batch.
        logits: one chunk of logits, and what the gradient of a trained output layer takes besides ``gradients``.
        overhead: on a CPU, what is not in tensors; see ``overhead_bytes``.
    """

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts, slightly more than is ever alive at once.

        On a CPU logits and the inside of a layer count, though never alive together: memory that a layer freed is in
        pieces, which a chunk of logits does not fit.
        """
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the parts by name."""
        return asdict(self)


def overhead_bytes(layers: int, kept: int, itemsize: int) -> int:
    """Return the memory of a CPU run that is not in its tensors.

    Args:
        layers: number of layers.
        kept: bytes that layers without checkpointing keep. The C library often cannot put a tensor into the gap that
            one of the same size left; inputs of checkpointed layers are in one block.
        itemsize: bytes of the compute dtype; oneDNN multiplies 16-bit matrices.
    """
    products = _PRODUCTS_BYTES if itemsize == 2 else 0
    return products + _LIBRARIES_BYTES + layers * _LAYER_BYTES + kept // _GAPS


def all_but_largest(parts: Sequence[int]) -> int:
    """Return by how much the sum of sizes exceeds the largest one, which is what is needed of one at a time."""
    return sum(parts) - max(parts, default=0)


def rows_at_a_time(vocabulary: int, itemsize: int, on_gpu: bool) -> int:
    """Return how many positions go through the output layer at a time.

    Args:
        vocabulary: number of tokens.
        itemsize: bytes per logit.
        on_gpu: chunks are larger there, since every one reads the layer's whole weight, and consist of whole tiles.
    """
    rows = max(LEAST_ROWS, (4 if on_gpu else 1) * LOGITS_CHUNK_BYTES // (vocabulary * itemsize))
    return rows - rows % _TILE if on_gpu and rows > _TILE else rows


def logits_bytes(rows: int, vocabulary: int, itemsize: int, on_gpu: bool) -> int:
    """Return the bytes of one chunk of logits, for a batch with ``rows`` positions that may have a loss."""
    return min(rows, rows_at_a_time(vocabulary, itemsize, on_gpu)) * vocabulary * itemsize


def head_gradient_bytes(parameters: int, itemsize: int) -> int:
    """Return what computing the gradient of a trained output layer takes at its peak, besides ``Memory.gradients``.

    These are a copy of its float32 weight in the compute dtype, and a block of the gradient.

    Args:
        parameters: trained parameters of the layer.
        itemsize: bytes of the compute dtype.
    """
    size = parameters * itemsize
    return min(size, GRADIENT_BLOCK_BYTES) + (size if itemsize < 4 else 0)
