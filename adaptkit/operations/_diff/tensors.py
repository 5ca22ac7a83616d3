"""Compare two plain tensors, those in files piece by piece: norms in float64, and how low-rank the change is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.numerics.comparison import Tally, effective_rank_with_tail
from adaptkit.numerics.dtypes import Array, dtype_name, is_float
from adaptkit.numerics.randomized import Sketching, sketch_for_rank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.numerics.tensors import as_tensor
from adaptkit.operations._diff.modules import relative

DIRECTIONS = (8, 16, 32, 64)
"""Ranks for which the report gives the share of a change's squared norm that they hold."""
_SKETCHING = Sketching(oversampling=8, iterations=1)
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ChangeSpectrum:
    """How low-rank the change of a matrix is, by a randomized decomposition with one power iteration.

    Attributes:
        sigma: the (at most 64) largest singular values of W₁ − W₂, descending, each estimated from below.
        energy: maps the ranks 8, 16, 32 and 64 to the share of ‖W₁ − W₂‖² in as many of the largest singular values: a
            lower bound of what an adapter of that rank could hold.
        stable_rank: ‖W₁ − W₂‖² / σ₁².
        effective_rank: exp of the entropy of σ / Σσ, assuming that the part of ‖W₁ − W₂‖² outside the computed singular
            values is spread evenly over the others.
    """

    sigma: tuple[float, ...]
    energy: dict[str, float]
    stable_rank: float
    effective_rank: float


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of the same name that differ.

    Attributes:
        name: name of both.
        role: what the tensor is in an adapter: DoRA magnitude, bias, replaced tensor, ...; empty in a checkpoint.
        dtypes: safetensors dtype of each.
        shapes: shape of each.
        changed: number of elements whose bits differ, or whose values differ if the dtypes are not the same.
        compared: number of elements compared: fewer than all if only the first dimension differs, 0 if more does.
        norms: norm of each over the compared elements; None for integers, and if an element is NaN, infinite or too
            large to square in float64.
        difference: ‖W₁ − W₂‖; None as for ``norms``.
        relative: ‖W₁ − W₂‖ / max(‖W₁‖, ‖W₂‖); None as for ``norms``.
        change: how low-rank the difference is; None unless both are matrices of the same shape in a checkpoint, with a
            nonzero difference.
        remark: further note; usually empty.
    """

    name: str
    role: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    changed: int
    compared: int
    norms: tuple[float, float] | None
    difference: float | None
    relative: float | None
    change: ChangeSpectrum | None = None
    remark: str = ""


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in files, and its fingerprint if that is known."""

    files: TensorFiles
    key: str
    digest: str = ""

    @property
    def spec(self) -> TensorSpec:
        """Its name in the file, dtype and shape."""
        return self.files.spec(self.key)

    @property
    def content(self) -> tuple[str, str, tuple[int, ...]]:
        """What determines its values: fingerprint, dtype and shape."""
        return self.digest, self.spec.dtype, self.spec.shape


def differ_in_files(
    name: str, first: StoredTensor, second: StoredTensor, role: str = "", ranks: bool = False
) -> TensorDifference:
    """Compare two tensors that differ, reading one piece of each at a time.

    If only the first dimension differs, as of resized vocabularies, the rows of the shorter tensor are compared.

    Args:
        name: name for the report.
        first: first tensor.
        second: second tensor.
        role: role for the report.
        ranks: estimate how low-rank the change is, which reads the tensors two more times.
    """
    one, two = first.spec, second.spec
    shared = one.shape[1:] == two.shape[1:] and len(one.shape) == len(two.shape)
    count = min(one.count, two.count) if shared else 0
    starts = range(0, count, _PIECE_ELEMENTS)
    pairs = (_pair(first, second, start, min(_PIECE_ELEMENTS, count - start)) for start in starts)
    remark = ""
    if one.shape != two.shape:
        remark = f"first {min(one.shape[0], two.shape[0]):,} rows of each compared" if count else "shapes differ"
    found = _measured(name, role, (one, two), pairs, remark)
    wanted = ranks and one.shape == two.shape and len(one.shape) == 2 and bool(found.difference)
    return _with_spectrum(found, first, second) if wanted else found


def differ_in_memory(name: str, role: str, first: Array, second: Array, remark: str = "") -> TensorDifference:
    """Compare two small tensors that differ; if their shapes do, report only dtypes and shapes."""
    specs = [TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for t in (first, second)]
    pairs = [(first, second)] if first.shape == second.shape else []
    return _measured(name, role, (specs[0], specs[1]), pairs, remark if pairs else "shapes differ")


def _measured(
    name: str, role: str, specs: tuple[TensorSpec, TensorSpec], pairs: Iterable[tuple[Array, Array]], remark: str
) -> TensorDifference:
    tally = Tally()
    fractions = False
    for one, two in pairs:
        fractions = is_float(one) and is_float(two)
        tally.add(one, two)
    norms = tally.norms if fractions else None
    if fractions and norms is None:
        remark = "; ".join(filter(None, [remark, "NaN, infinite, or too large to measure"]))
    return TensorDifference(
        name=name,
        role=role,
        dtypes=(specs[0].dtype, specs[1].dtype),
        shapes=(specs[0].shape, specs[1].shape),
        changed=tally.changed,
        compared=tally.compared,
        norms=norms[:2] if norms else None,
        difference=norms[2] if norms else None,
        relative=relative(norms[2], norms[:2]) if norms else None,
        remark=remark,
    )


def _pair(first: StoredTensor, second: StoredTensor, start: int, count: int) -> tuple[Array, Array]:
    one, two = (source.files.read_flat(source.key, start, count) for source in (first, second))
    return one, two


def _with_spectrum(found: TensorDifference, first: StoredTensor, second: StoredTensor) -> TensorDifference:
    out, into = found.shapes[0]
    step = max(1, _PIECE_ELEMENTS // into)

    def blocks() -> Iterator[Tensor]:
        for row in range(0, out, step):
            start, count = row * into, min(step, out - row) * into
            one, two = (as_tensor(piece).double() for piece in _pair(first, second, start, count))
            yield one.sub_(two).reshape(-1, into)

    square = (found.difference or 0.0) ** 2
    sketch = sketch_for_rank(blocks, (out, into), square, DIRECTIONS[-1], _SKETCHING)
    sigma = sketch.spectrum.sigma
    spectrum = ChangeSpectrum(
        sigma=tuple(sigma[: DIRECTIONS[-1]].tolist()),
        energy={str(rank): sketch.energy_kept(rank) for rank in DIRECTIONS},
        stable_rank=square / float(sigma[0]) ** 2,
        effective_rank=effective_rank_with_tail(sigma, square, min(out, into)),
    )
    return replace(found, change=spectrum)
