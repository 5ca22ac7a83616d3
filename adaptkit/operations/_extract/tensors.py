"""Compare two tensors piece by piece, and find the low-rank part of the difference without holding it whole."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import xxhash
from torch import Tensor

from adaptkit.checkpoint.hashing import bytes_of
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import NonFiniteError
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank, transposed
from adaptkit.numerics.randomized import sketch_for_energy, sketch_for_rank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations._extract.plan import LOW_RANK, ExtractPlan, Part
from adaptkit.operations._shards import cut_pieces
from adaptkit.operations.options import ExtractOptions

_EXPONENT_BITS = {  # integer type of the same width, mask of the exponent, number of fraction bits
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.bfloat16: (torch.int16, 0x7F80, 7),
    torch.float16: (torch.int16, 0x7C00, 10),
}
_ENERGY_ASKED = 0.99
_AT_ONCE = 1 << 18
"""Elements converted to float64 at a time: few enough for a processor's cache."""


@dataclass(frozen=True)
class ComparedTensor:
    """Comparison of one tensor of the two checkpoints.

    Attributes:
        part: the tensor.
        base_digest: fingerprint in the base.
        tuned_digest: fingerprint in the tuned checkpoint.
        differs: whether any element differs from the base's, rounded to the tuned dtype.
        square: ‖D‖², D being tuned − base; 0 if none differs, the shapes differ, or the tensor holds integers.
        base_square: ‖W‖² of the base's tensor; 0 as for ``square``.
        rounding: share of ‖D‖² due to rounding each tuned element once to its dtype, assuming that rounding errors are
            uniform over a step; at most 1.
        term: the low-rank change as an adapter stores it; None if there is none.
        energy_kept: share of ‖D‖² in ``term``.
        rank_99: smallest rank that keeps 99 % of ‖D‖²; None if the sketch is too small.
        reached: whether the requested energy is kept; True if a rank was requested instead.
    """

    part: Part
    base_digest: str
    tuned_digest: str
    differs: bool
    square: float = 0.0
    base_square: float = 0.0
    rounding: float = 0.0
    term: LowRank | None = None
    energy_kept: float = 0.0
    rank_99: int | None = None
    reached: bool = True

    @property
    def rank(self) -> int:
        """Rank of the low-rank change; 0 if there is none."""
        return self.term.rank if self.term else 0

    @property
    def relative_norm(self) -> float | None:
        """‖D‖ / ‖W‖; None if either is zero or was not computed."""
        return math.sqrt(self.square / self.base_square) if self.square and self.base_square else None


def examine(plan: ExtractPlan, part: Part, options: ExtractOptions) -> ComparedTensor:
    """Compare a tensor of the two checkpoints, and decompose the difference if its fate is low rank.

    Raises:
        NonFiniteError: an element of either is NaN or infinite; names the tensor.
        IntegrityError: a file can no longer be read.
    """
    digests = xxhash.xxh3_128(), xxhash.xxh3_128()
    differs, square, base_square, steps = part.resized, 0.0, 0.0, 0.0
    if part.resized:
        deque(_pieces(plan.base, part.spec, digests[0]), maxlen=0)
        deque(_pieces(plan.tuned, part.tuned, digests[1]), maxlen=0)
    else:
        both = _pieces(plan.base, part.spec, digests[0]), _pieces(plan.tuned, part.spec, digests[1])
        for ours, theirs in zip(*both, strict=True):
            differs = differs or not torch.equal(ours.to(theirs.dtype), theirs)
            if not ours.is_floating_point():
                continue
            for before, after in zip(torch.split(ours, _AT_ONCE), torch.split(theirs, _AT_ONCE), strict=True):
                wide = before.double()
                change = after.double().sub_(wide)
                square += float(change.dot(change))
                base_square += float(wide.dot(wide))
                steps += _square_steps(after)
    square = square if differs else 0.0
    rounding = min(1.0, steps / 12 / square) if square else 0.0
    before_digest, after_digest = (digest.hexdigest() for digest in digests)
    found = ComparedTensor(part, before_digest, after_digest, differs, square, base_square, rounding)
    return _decompose(plan, found, options) if differs and part.fate == LOW_RANK else found


def _pieces(checkpoint: Checkpoint, spec: TensorSpec, digest: xxhash.xxh3_128) -> Iterator[Tensor]:
    """Yield a tensor in pieces that are cut for a spec of as many elements; each is checked, and added to a digest."""
    for piece in cut_pieces(spec):
        values = checkpoint.read_flat(spec.name, piece.start, piece.count)
        if not all_finite(values):
            raise NonFiniteError(
                f"{checkpoint.root}: {spec.name} holds NaN or infinity", hint="train or download the checkpoint again"
            )
        digest.update(bytes_of(values))
        yield as_tensor(values)


def _square_steps(values: Tensor) -> float:
    """Return Σ step², step being the spacing of the dtype at each element; 0 for subnormals and for other dtypes."""
    if values.dtype not in _EXPONENT_BITS:
        return 0.0
    integers, mask, fraction = _EXPONENT_BITS[values.dtype]
    powers = (values.view(integers) & mask).view(values.dtype).double()
    return float(powers.dot(powers)) * 4.0**-fraction


def _decompose(plan: ExtractPlan, finding: ComparedTensor, options: ExtractOptions) -> ComparedTensor:
    part, (height, columns) = finding.part, finding.part.spec.shape

    def blocks() -> Iterator[Tensor]:
        for piece in cut_pieces(part.spec, columns):
            both = (one.read_flat(part.name, piece.start, piece.count) for one in (plan.base, plan.tuned))
            rows = (torch.split(as_tensor(flat).view(-1, columns), max(1, _AT_ONCE // columns)) for flat in both)
            for before, after in zip(*rows, strict=True):
                yield after.double().sub_(before.double())

    shape, how = (height, columns), options.sketching
    if options.energy is None:
        rank = min(options.rank or 1, *shape)
        sketch = sketch_for_rank(blocks, shape, finding.square, rank, how)
    else:
        sketch, rank = sketch_for_energy(blocks, shape, finding.square, options.energy, options.largest_rank, how)
    term = sketch.spectrum.truncated(rank)
    enough = sketch.rank_for(options.energy) if options.energy is not None else rank
    return replace(
        finding,
        term=transposed(term) if plan.transposed else term,
        energy_kept=sketch.energy_kept(rank),
        rank_99=sketch.rank_for(_ENERGY_ASKED),
        reached=enough is not None and enough <= rank,
    )
