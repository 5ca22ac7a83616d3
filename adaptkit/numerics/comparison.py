"""How two changes of one weight compare, in factored form; and how two plain tensors do, piece by piece.

For two low-rank changes Δᵢ = sᵢ Bᵢ Aᵢ, [B₁ B₂] = Q_b [C₁ C₂] and [A₁ᵀ A₂ᵀ] = Q_a [D₁ D₂]. Norms, angles and singular
values do not see Q_b and Q_a, so the cores Mᵢ = sᵢ Cᵢ Dᵢᵀ, which are at most (r₁ + r₂) square, say everything: neither
an (out, in) matrix nor Q is ever formed. Everything is float64.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.spectrum import effective_rank

SAMPLED_ROWS = 64
"""How many rows of Δ the agreement of signs is measured on."""
_SEED = 0
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NEGLIGIBLE = 1e-12  # share of ‖D‖² that sums of float64 cannot tell from zero


@dataclass(frozen=True)
class Overlap:
    """How far two subspaces of the same space lie in each other.

    Attributes:
        cosines: (min(dimensions),) float64, of the principal angles, descending; 1 is a common direction.
        dimensions: of both.
        space: dimension of the space that they are in.
    """

    cosines: Tensor
    dimensions: tuple[int, int]
    space: int

    @property
    def rms(self) -> float | None:
        """Root mean square of the cosines, ‖UᵀV‖ / √min(dimensions): 0 if orthogonal, 1 if one holds the other."""
        return float(self.cosines.square().mean().sqrt()) if self.cosines.numel() else None

    @property
    def random(self) -> float | None:
        """What ``rms`` would be for random subspaces of these dimensions: √(max(dimensions) / space).

        The mean of ‖UᵀV‖² over independent uniformly random subspaces is r₁ r₂ / m exactly; for r₁ = r₂ = r this is
        the √(r/m) of the literature. It is not the largest cosine to be expected, which is higher.
        """
        return math.sqrt(max(self.dimensions) / self.space) if self.cosines.numel() else None


@dataclass(frozen=True)
class Comparison:
    """How two changes of one weight compare.

    Attributes:
        sigmas: singular values of both, (min(rank, out, in),) float64, descending.
        difference_sigma: of Δ₁ − Δ₂.
        inner: ⟨Δ₁, Δ₂⟩.
        columns: of their column spaces, in the space of outputs.
        rows: of their row spaces, in the space of inputs.
        interference: ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of absolute values, with U = [U₁ U₂], V = [V₁ V₂] and Σ of the
            singular values of both: the singular task interference of Task Singular Vectors (arXiv:2412.00081), here of
            all singular vectors instead of a share of them. 0 for orthogonal changes.
        sign_agreement: share of elements with the same sign, among those that are zero in neither, of ``sampled_rows``;
            None where there are none.
    """

    sigmas: tuple[Tensor, Tensor]
    difference_sigma: Tensor
    inner: float
    columns: Overlap
    rows: Overlap
    interference: float
    sign_agreement: float | None

    @property
    def interference_share(self) -> float:
        """``interference`` over Σσ of both: 1 for a change and itself."""
        total = float(self.sigmas[0].sum() + self.sigmas[1].sum())
        return self.interference / total if total else 0.0


def compare(first: LowRank, second: LowRank) -> Comparison:
    """Compare two changes of a weight.

    Subspaces are those of the singular vectors whose values float64 can tell from zero, σ > σ₁ · max(out, in) · 2⁻⁵².

    Raises:
        ValueError: they are of different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"changes of shapes {first.shape} and {second.shape} cannot be compared")
    tolerance = max(first.shape) * torch.finfo(torch.float64).eps
    core_1, core_2 = _cores(first, second)
    u_1, sigma_1, v_1 = _decomposed(core_1, tolerance)
    u_2, sigma_2, v_2 = _decomposed(core_2, tolerance)
    left, right = u_1.T @ u_2, v_1.T @ v_2
    counts = (u_1.shape[1], u_2.shape[1])
    crossed = (left * sigma_2[: counts[1]]) @ right.T, (left.T * sigma_1[: counts[0]]) @ right
    limits = [min(term.rank, *term.shape) for term in (first, second)]
    return Comparison(
        sigmas=(sigma_1[: limits[0]], sigma_2[: limits[1]]),
        difference_sigma=torch.linalg.svdvals(core_1 - core_2),
        inner=float((core_1 * core_2).sum()),
        columns=Overlap(_cosines(left), counts, first.shape[0]),
        rows=Overlap(_cosines(right), counts, first.shape[1]),
        interference=float(crossed[0].abs().sum() + crossed[1].abs().sum()),  # the other two of four blocks are zero
        sign_agreement=_sign_agreement(first, second),
    )


def sampled_rows(count: int) -> Tensor:
    """Which rows of ``count`` the agreement of signs is measured on: all, or 64 of them, always the same ones."""
    if count <= SAMPLED_ROWS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))[:SAMPLED_ROWS].sort().values


def difference_norm(first: LowRank, second: LowRank) -> float:
    """‖Δ₁ − Δ₂‖. Expanding the square would lose all digits where the two are nearly equal."""
    core_1, core_2 = _cores(first, second)
    return float(torch.linalg.matrix_norm(core_1 - core_2))


def _cores(first: LowRank, second: LowRank) -> tuple[Tensor, Tensor]:
    """Both changes in a basis that they share: M₁ and M₂ of the module's docstring, of one shape."""
    if is_equal(first, second):  # else rounding would find a difference of a few times 1e-16
        core = first.scaling * _triangle(first.lora_b) @ _triangle(first.lora_a.T).T
        return core, core
    b = _triangle(torch.cat([first.lora_b.double(), second.lora_b.double()], dim=1))
    a = _triangle(torch.cat([first.lora_a.double(), second.lora_a.double()]).T)
    rank = first.rank
    return first.scaling * b[:, :rank] @ a[:, :rank].T, second.scaling * b[:, rank:] @ a[:, rank:].T


def _triangle(columns: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(columns.double(), mode="r")[1]
    return triangle


def _decomposed(core: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """U of the values above the tolerance, all singular values, and V of those above it."""
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)
    count = int((sigma > tolerance * sigma[0]).count_nonzero())
    return u[:, :count], sigma, vt[:count].T


def _cosines(products: Tensor) -> Tensor:
    found: Tensor = torch.linalg.svdvals(products)
    return found.clamp(max=1.0)


def _sign_agreement(first: LowRank, second: LowRank) -> float | None:
    rows = sampled_rows(first.shape[0])
    one, two = (term.lora_b[rows].double() @ term.lora_a.double() for term in (first, second))
    products = one.mul_(two).mul_(_sign(first.scaling) * _sign(second.scaling))
    known = int(products.count_nonzero())
    return int((products > 0).count_nonzero()) / known if known else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


@dataclass
class Tally:
    """What the pieces of two tensors add up to.

    Attributes:
        squares: Σ of the squares of both, and of their difference, in float64.
        changed: elements whose bits differ, or whose values do if the types are not the same.
        compared: elements.
    """

    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    changed: int = 0
    compared: int = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Count two pieces of the same shape; of types with a fraction, or whole numbers."""
        self.compared += first.numel()
        one, two = first.double().reshape(-1), second.double().reshape(-1)
        unlike = _bits(first) != _bits(second) if first.dtype == second.dtype else one != two
        self.changed += int(unlike.count_nonzero())
        for place, values in enumerate((one, two, one - two)):
            self.squares[place] += float(values.dot(values))

    @property
    def norms(self) -> tuple[float, float, float] | None:
        """Of both, and of their difference; None if there are NaN, infinities, or squares too large for float64."""
        first, second, difference = (math.sqrt(square) if square >= 0 else math.nan for square in self.squares)
        return (first, second, difference) if math.isfinite(first + second + difference) else None


def effective_rank_with_tail(sigma: Tensor, square_norm: float, count: int) -> float:
    """An upper estimate of ``spectrum.effective_rank`` where only the largest singular values are known.

    What the known ones lack of ‖D‖² is spread evenly over the others, which makes the entropy as large as it can be;
    right for the even noise of rounding.

    Args:
        sigma: (k,) descending.
        square_norm: ‖D‖².
        count: of all singular values.
    """
    rest, others = square_norm - float(sigma.square().sum()), count - sigma.numel()
    if others <= 0 or rest <= _NEGLIGIBLE * square_norm:
        return effective_rank(sigma)
    return effective_rank(torch.cat([sigma, torch.full((others,), math.sqrt(rest / others), dtype=sigma.dtype)]))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_WHOLE[values.itemsize])
