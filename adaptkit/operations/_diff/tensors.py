"""Compare two plain tensors, of files piece by piece: norms in float64, and how low-rank the change is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from adaptkit.checkpoint.dtypes import dtype_name
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.numerics.comparison import Tally, effective_rank_with_tail
from adaptkit.numerics.randomized import Sketching, sketch_for_rank
from adaptkit.operations._diff.groups import relative

DIRECTIONS = (8, 16, 32, 64)
"""Ranks for which it is told how much of a change they hold."""
_SKETCHING = Sketching(oversampling=8, iterations=1)
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ChangeSpectrum:
    """How low-rank the change of a matrix is, by a randomized decomposition with one power iteration.

    Attributes:
        sigma: the largest singular values of W₁ − W₂, at most 64, descending; estimates from below.
        energy: share of ‖W₁ − W₂‖² in the 8, 16, 32 and 64 largest: what an adapter of that rank could hold, at least.
        stable_rank: ‖W₁ − W₂‖² / σ₁².
        effective_rank: exp of the entropy of σ / Σσ, what is not in the largest 64 counted as spread evenly.
    """

    sigma: tuple[float, ...]
    energy: dict[str, float]
    stable_rank: float
    effective_rank: float


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name that are not the same.

    Attributes:
        name: of both.
        role: what it is in an adapter: DoRA magnitude, bias, replaced tensor, ...; empty in a checkpoint.
        dtypes: of both, as safetensors calls them.
        shapes: of both.
        changed: elements whose bits differ, or whose values do where the types are not the same.
        compared: elements; fewer than there are where the shapes differ, none where they have nothing in common.
        norms: of both, as far as compared; None for whole numbers, and where there is NaN or infinity.
        difference: ‖W₁ − W₂‖; None as ``norms``.
        relative: ‖W₁ − W₂‖ / max(‖W₁‖, ‖W₂‖); None as ``norms``.
        change: how low-rank the difference is; None unless both are matrices of one shape.
        remark: what else there is to say; mostly empty.
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
class Source:
    """A tensor of a file."""

    files: TensorFiles
    key: str

    @property
    def spec(self) -> TensorSpec:
        """Its name in the file, type and shape."""
        return self.files.spec(self.key)


def differ_in_files(name: str, first: Source, second: Source, role: str = "", ranks: bool = False) -> TensorDifference:
    """Compare two tensors that are not the same, reading a piece of each at a time.

    Tensors whose first dimension alone differs, such as vocabularies, are compared as far as the shorter one goes.

    Args:
        name: what to call them.
        first: one.
        second: the other.
        role: for the report.
        ranks: estimate how low-rank the change is, which reads the tensors twice more.
    """
    one, two = first.spec, second.spec
    shared = one.shape[1:] == two.shape[1:] and len(one.shape) == len(two.shape)
    count = min(one.count, two.count) if shared else 0
    pairs = (_pair(first, second, start, count) for start in range(0, count, _PIECE_ELEMENTS))
    remark = ""
    if one.shape != two.shape:
        remark = f"first {min(one.shape[0], two.shape[0]):,} rows of each compared" if count else "shapes differ"
    found = _measured(name, role, (one, two), pairs, remark)
    wanted = ranks and one.shape == two.shape and len(one.shape) == 2 and bool(found.difference)
    return _with_spectrum(found, first, second) if wanted else found


def differ_in_memory(name: str, role: str, first: Tensor, second: Tensor, remark: str = "") -> TensorDifference:
    """Compare two small tensors of one shape that are not the same; of others only types and shapes are told."""
    specs = [TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for t in (first, second)]
    pairs = [(first, second)] if first.shape == second.shape else []
    return _measured(name, role, (specs[0], specs[1]), pairs, remark if pairs else "shapes differ")


def _measured(
    name: str, role: str, specs: tuple[TensorSpec, TensorSpec], pairs: Iterable[tuple[Tensor, Tensor]], remark: str
) -> TensorDifference:
    tally = Tally()
    fractions = False
    for one, two in pairs:
        fractions = one.is_floating_point() and two.is_floating_point()
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


def _pair(first: Source, second: Source, start: int, count: int) -> tuple[Tensor, Tensor]:
    size = min(_PIECE_ELEMENTS, count - start)
    return first.files.read_flat(first.key, start, size), second.files.read_flat(second.key, start, size)


def _with_spectrum(found: TensorDifference, first: Source, second: Source) -> TensorDifference:
    out, into = found.shapes[0]
    step = max(1, _PIECE_ELEMENTS // into)

    def blocks() -> Iterator[Tensor]:
        for row in range(0, out, step):
            start, count = row * into, min(step, out - row) * into
            one, two = (source.files.read_flat(source.key, start, count).double() for source in (first, second))
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
