"""Compare two adapters without ever forming their matrices."""

from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank


@dataclass(frozen=True)
class ModuleDifference:
    """How two changes of one weight compare.

    Attributes:
        module: dotted path.
        ranks: of both; 0 where an adapter does not change the module.
        norms: ‖Δ‖ of both.
        cosine: of the angle between them as vectors; 0 where one is zero.
        relative: ‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖); 0 where both are zero.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    relative: float


@dataclass(frozen=True)
class DiffReport:
    """How two adapters compare.

    Attributes:
        same: whether they hold the same tensors with the same scaling.
        tensors_roots: of both.
        norms: of all changes together.
        cosine: of all changes together.
        relative: ‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖) of all changes together.
        only_in_first: modules that only the first adapter changes.
        only_in_second: modules that only the second adapter changes.
        modules: one by one, those that differ most first.
    """

    same: bool
    tensors_roots: tuple[str, str]
    norms: tuple[float, float]
    cosine: float
    relative: float
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    modules: tuple[ModuleDifference, ...]


def diff(first: Path, second: Path) -> DiffReport:
    """Compare two adapters module by module, in factored form and float64.

    Args:
        first: folder of an adapter.
        second: folder of another.

    Raises:
        AdapterError: one of them is not a LoRA adapter that can be read.
    """
    one, two = read_adapter(first), read_adapter(second)
    modules, squares = [], [0.0, 0.0, 0.0, 0.0]
    for name in sorted({*one.modules, *two.modules}):
        module, inner, distance = _compare(name, one.modules.get(name), two.modules.get(name))
        modules.append(module)
        for position, value in enumerate((module.norms[0] ** 2, module.norms[1] ** 2, inner, distance**2)):
            squares[position] += value
    norms = (squares[0] ** 0.5, squares[1] ** 0.5)
    return DiffReport(
        same=_same(one, two),
        tensors_roots=(tensors_root(one.records), tensors_root(two.records)),
        norms=norms,
        cosine=_cosine(squares[2], norms),
        relative=squares[3] ** 0.5 / max(norms) if max(norms) else 0.0,
        only_in_first=tuple(sorted(set(one.modules) - set(two.modules))),
        only_in_second=tuple(sorted(set(two.modules) - set(one.modules))),
        modules=tuple(sorted(modules, key=lambda m: (-m.relative, m.module))),
    )


def _same(one: Adapter, two: Adapter) -> bool:
    scalings = [{name: term.scaling for name, term in adapter.modules.items()} for adapter in (one, two)]
    return tensors_root(one.records) == tensors_root(two.records) and scalings[0] == scalings[1]


def _compare(name: str, one: LowRank | None, two: LowRank | None) -> tuple[ModuleDifference, float, float]:
    """The module's difference, with ⟨Δ₁, Δ₂⟩ and ‖Δ₁ − Δ₂‖ for the totals."""
    norms = (lora.norm(one) if one else 0.0, lora.norm(two) if two else 0.0)
    if one and two and one.shape == two.shape:
        inner, distance = lora.inner_product(one, two), lora.difference_norm(one, two)
    else:
        inner, distance = 0.0, (norms[0] ** 2 + norms[1] ** 2) ** 0.5
    ranks = (one.rank if one else 0, two.rank if two else 0)
    relative = distance / max(norms) if max(norms) else 0.0
    return ModuleDifference(name, ranks, norms, _cosine(inner, norms), relative), inner, distance


def _cosine(inner: float, norms: tuple[float, float]) -> float:
    return max(-1.0, min(1.0, inner / (norms[0] * norms[1]))) if all(norms) else 0.0
