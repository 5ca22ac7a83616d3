"""Quantize one tensor of a checkpoint, piece by piece: the jobs, and the assembly of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash

from adaptkit.checkpoint.hashing import bytes_of
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import NonFiniteError
from adaptkit.formats._format import EncodedPiece, Encoding
from adaptkit.numerics import finite
from adaptkit.numerics.arrays import AnyValues, Array, as_array, like
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._shards import Group, Piece, cut_pieces, read_jobs
from adaptkit.operations._threads import in_order


@dataclass(frozen=True)
class Encoded:
    """A piece of a tensor: its elements in the file, and the quantized ones; None if it is written as it is."""

    raw: Array
    packed: EncodedPiece | None = None


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is written.

    Attributes:
        spec: in the source.
        encoding: how it is quantized; None if it is not.
        transposed: whether the source stores it as (in, out).
    """

    spec: TensorSpec
    encoding: Encoding | None
    transposed: bool = False

    @property
    def linear(self) -> TensorSpec:
        """The spec of the weight as (out, in)."""
        return TensorSpec(
            self.spec.name, self.spec.dtype, self.spec.shape[::-1] if self.transposed else self.spec.shape
        )

    def group(self) -> Group:
        """Return the tensors that it becomes."""
        specs = [self.spec] if self.encoding is None else self.encoding.codec.specs(self.linear, self.encoding)
        return Group(self.spec.name, tuple(specs))

    def as_linear(self, raw: AnyValues) -> AnyValues:
        """Convert the source's tensor to the weight as (out, in)."""
        return like(raw, np.ascontiguousarray(as_array(raw).T)) if self.transposed else raw

    def jobs(self, checkpoint: Checkpoint) -> Sequence[Callable[[], Encoded]]:
        """Return the jobs that encode the tensor, in order.

        Raises:
            NonFiniteError: by a job: a weight is NaN or infinite; names its index.
        """
        if self.encoding is None:
            return [partial(_as_it_is, job) for job in read_jobs(checkpoint, self.spec, self.check)]
        if self.transposed:  # only in the GPT-2 family, whose matrices are small
            return [partial(self._encode, self.encoding, checkpoint, None)]
        pieces = cut_pieces(self.spec, self.encoding.block_size, checkpoint.unit(self.spec.name))
        return [partial(self._encode, self.encoding, checkpoint, piece) for piece in pieces]

    def assemble(self, results: Iterator[Encoded], writer: TensorWriter) -> dict[str, Any]:
        """Write the results of the jobs.

        Returns:
            fingerprint: of the source tensor.
            error: Σ(w − q)² and Σw² over the weights, if it is quantized.
        """
        if self.encoding is None:
            for result in results:
                writer.write(self.spec.name, result.raw)
            return {"fingerprint": writer.tensors[-1].xxh3_128}
        digest, codes = xxhash.xxh3_128(), self.group().specs[0].name
        gathering = self.encoding.codec.gather(self.linear, self.encoding)
        for result in results:
            digest.update(bytes_of(result.raw))
            if result.packed is not None:
                writer.write(codes, result.packed.codes)
                gathering.add(result.packed)
        parts, error = gathering.finish()
        for name, part in parts.items():
            writer.write(name, part)
        return {"fingerprint": digest.hexdigest(), "error": error}

    def _encode(self, encoding: Encoding, checkpoint: Checkpoint, piece: Piece | None) -> Encoded:
        if piece is None:
            raw = checkpoint.read_array(self.spec.name)
            values, start = self.as_linear(raw), 0
        else:
            raw = values = checkpoint.read_flat_array(self.spec.name, piece.start, piece.count)
            start = piece.start
        try:
            return Encoded(raw, encoding.codec.encode(values, encoding, measure=True))
        except NonFiniteError:
            self.check(raw.reshape(-1), start)
            raise

    def check(self, values: Array, start: int) -> None:
        """Refuse NaN and infinity, with the index in the file."""
        finite.check_finite(values, start, self.spec.shape, self.spec.name)


def check_finite(checkpoint: Checkpoint, plans: Iterable[TensorPlan], threads: int) -> None:
    """Read all tensors of a checkpoint once, and look for NaN and infinity.

    Raises:
        NonFiniteError: a weight is NaN or infinite; names tensor and index.
    """
    jobs = (job for plan in plans for job in read_jobs(checkpoint, plan.spec, plan.check))
    for _ in in_order(lambda job: job(), jobs, threads):
        pass


def _as_it_is(job: Callable[[], Array]) -> Encoded:
    return Encoded(job())
