"""Comparison of two adapters' modules: each module, by layer, by module type, and all together."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from adaptkit.numerics.comparison import Overlap, compare
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import effective_rank, singular_values, stable_rank

Pair = tuple[float, float]


@dataclass(frozen=True)
class ModuleDifference:
    """Comparison of two changes Δ₁ and Δ₂ of one weight. Pairs hold the first adapter's value, then the second's.

    Attributes:
        module: dotted path.
        shapes: (out, in) of each change; None if the adapter does not change the module.
        ranks: rank of each change; 0 if the adapter does not change the module.
        norms: ‖Δ‖ of each.
        inner: ⟨Δ₁, Δ₂⟩; 0 if the shapes differ.
        difference: ‖Δ₁ − Δ₂‖; if the shapes differ, that of orthogonal changes.
        cosine: ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖); 0 if one is zero or the shapes differ.
        relative: ‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖); 0 if both are zero.
        spectra: singular values of each, descending.
        difference_spectrum: singular values of Δ₁ − Δ₂; empty if one change is absent or the shapes differ.
        effective_ranks: exp of the entropy of σ / Σσ, of each.
        stable_ranks: ‖Δ‖² / σ₁² of each.
        columns: overlap of the column spaces (output side); None if a change is zero or absent, or the shapes differ.
        rows: overlap of the row spaces (input side); None likewise.
        sign_agreement: share of elements with the same sign, measured on at most 64 rows; None likewise, or if no
            element is nonzero in both.
        interference: ‖(UᵀU − I) Σ (VᵀV − I)‖₁; None as for ``columns``.
        interference_share: ``interference`` / Σσ of both; 0 for orthogonal changes, 1 for identical ones. None as for
            ``columns``.
    """

    module: str
    shapes: tuple[tuple[int, int] | None, tuple[int, int] | None]
    ranks: tuple[int, int]
    norms: Pair
    inner: float
    difference: float
    cosine: float
    relative: float
    spectra: tuple[tuple[float, ...], tuple[float, ...]]
    difference_spectrum: tuple[float, ...]
    effective_ranks: Pair
    stable_ranks: Pair
    columns: Overlap | None = None
    rows: Overlap | None = None
    sign_agreement: float | None = None
    interference: float | None = None
    interference_share: float | None = None


@dataclass(frozen=True)
class GroupDifference:
    """Comparison of the changes of several modules together. Pairs hold the first adapter's value, then the second's.

    Attributes:
        name: path of the layer, path of the module type with ``*`` for its numbers, or ``all``.
        modules: number of modules.
        norms: norm of each side, all its changes concatenated into one vector.
        difference: norm of the difference of these vectors.
        cosine: cosine of the angle between these vectors; 0 if one is zero.
        relative: ``difference`` / the larger norm; 0 if both are zero.
        effective_ranks: mean over the modules that the adapter changes, for each adapter.
        stable_ranks: likewise.
        columns: root mean square of the cosines of all principal angles of the column spaces; None if there are none.
        columns_random: expected value of ``columns`` for random subspaces.
        rows: likewise of the row spaces.
        rows_random: expected value of ``rows`` for random subspaces.
        sign_agreement: mean over the modules that have one, weighted by number of elements; None if no module has one.
        interference: sum over the modules that have one; None if no module has one.
        interference_share: ``interference`` / Σσ over these modules; None if no module has one.
    """

    name: str
    modules: int
    norms: Pair
    difference: float
    cosine: float
    relative: float
    effective_ranks: Pair
    stable_ranks: Pair
    columns: float | None
    columns_random: float | None
    rows: float | None
    rows_random: float | None
    sign_agreement: float | None
    interference: float | None
    interference_share: float | None


def differ_in_module(name: str, first: LowRank | None, second: LowRank | None) -> ModuleDifference:
    """Compare two changes of one module; None counts as zero, and changes of different shapes as orthogonal."""
    found = compare(first, second) if first and second and first.shape == second.shape else None
    none = torch.zeros(0, dtype=torch.float64)
    one, two = found.sigmas if found else (singular_values(term) if term else none for term in (first, second))
    norms = float(one.norm()), float(two.norm())
    inner = found.inner if found else 0.0
    distance = float(found.difference_sigma.norm()) if found else math.hypot(*norms)
    measured = found if found and found.columns else None
    return ModuleDifference(
        module=name,
        shapes=(first.shape if first else None, second.shape if second else None),
        ranks=(first.rank if first else 0, second.rank if second else 0),
        norms=norms,
        inner=inner,
        difference=distance,
        cosine=cosine(inner, norms),
        relative=relative(distance, norms),
        spectra=(tuple(one.tolist()), tuple(two.tolist())),
        difference_spectrum=tuple(found.difference_sigma.tolist()) if found else (),
        effective_ranks=(effective_rank(one), effective_rank(two)),
        stable_ranks=(stable_rank(one), stable_rank(two)),
        columns=measured.columns if measured else None,
        rows=measured.rows if measured else None,
        sign_agreement=measured.sign_agreement if measured else None,
        interference=measured.interference if measured else None,
        interference_share=measured.interference_share if measured else None,
    )


def by_layer(modules: Iterable[ModuleDifference]) -> tuple[GroupDifference, ...]:
    """Group modules by their path up to its first number, in the order of these numbers; modules without one last."""

    def key(name: str) -> tuple[str, int, str]:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal():
                return ".".join(parts[:position]), int(part), ".".join(parts[: position + 1])
        return "\uffff", 0, "no layer"

    return _grouped(modules, key)


def by_type(modules: Iterable[ModuleDifference]) -> tuple[GroupDifference, ...]:
    """Group modules whose paths differ only in their numbers."""

    def key(name: str) -> tuple[str, int, str]:
        starred = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        return starred, 0, starred

    return _grouped(modules, key)


def grouped_as(name: str, modules: Sequence[ModuleDifference]) -> GroupDifference:
    """Return the comparison of several modules together, under a name."""
    norms = _both(lambda side: math.hypot(*(m.norms[side] for m in modules)))
    difference = math.hypot(*(m.difference for m in modules))
    measured = [m for m in modules if m.interference is not None]
    interference = sum(m.interference or 0.0 for m in measured)
    sizes = [(m.sign_agreement, math.prod(m.shapes[0] or ())) for m in modules if m.sign_agreement is not None]
    (columns, columns_random), (rows, rows_random) = (
        _mean_overlap([m.columns for m in modules]),
        _mean_overlap([m.rows for m in modules]),
    )
    nuclear = sum(sum(spectrum) for m in measured for spectrum in m.spectra)
    return GroupDifference(
        name=name,
        modules=len(modules),
        norms=norms,
        difference=difference,
        cosine=cosine(sum(m.inner for m in modules), norms),
        relative=relative(difference, norms),
        effective_ranks=_both(lambda side: _mean([m.effective_ranks[side] for m in modules if m.ranks[side]])),
        stable_ranks=_both(lambda side: _mean([m.stable_ranks[side] for m in modules if m.ranks[side]])),
        columns=columns,
        columns_random=columns_random,
        rows=rows,
        rows_random=rows_random,
        sign_agreement=sum(share * size for share, size in sizes) / sum(s for _, s in sizes) if sizes else None,
        interference=interference if measured else None,
        interference_share=interference / nuclear if nuclear else None,
    )


def cosine(inner: float, norms: Pair) -> float:
    """Return ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖), clamped to [−1, 1]; 0 if one is zero."""
    return max(-1.0, min(1.0, inner / norms[0] / norms[1])) if all(norms) else 0.0


def relative(difference: float, norms: Pair) -> float:
    """Return ``difference`` / the larger norm; 0 if both are zero."""
    return difference / max(norms) if max(norms) else 0.0


def _grouped(
    modules: Iterable[ModuleDifference], key: Callable[[str], tuple[str, int, str]]
) -> tuple[GroupDifference, ...]:
    groups: dict[tuple[str, int, str], list[ModuleDifference]] = defaultdict(list)
    for module in modules:
        groups[key(module.module)].append(module)
    return tuple(grouped_as(place[2], found) for place, found in sorted(groups.items()))


def _mean_overlap(overlaps: Iterable[Overlap | None]) -> tuple[float | None, float | None]:
    """Return the root mean square of the cosines of all angles, and its expected value for random subspaces."""
    found = [(len(overlap.cosines), overlap) for overlap in overlaps if overlap is not None]
    angles = sum(count for count, _ in found)
    if not angles:
        return None, None
    rms = sum(count * overlap.rms**2 for count, overlap in found) / angles
    random = sum(count * overlap.random**2 for count, overlap in found) / angles
    return math.sqrt(rms), math.sqrt(random)


def _both(of_side: Callable[[int], float]) -> Pair:
    return of_side(0), of_side(1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
