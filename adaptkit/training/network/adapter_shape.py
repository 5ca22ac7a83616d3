"""Rank and scaling of fresh adapters, by patterns of the modules that get them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from adaptkit.checkpoint.patterns import FirstMatch, matches_whole
from adaptkit.errors import UsageError
from adaptkit.numerics.scaling import scaling


@dataclass(frozen=True)
class AdapterShape:
    """Of one run; see ``new_adapter``."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    def of(self, name: str, matrix: tuple[int, int]) -> tuple[int, float]:
        """Rank and scaling of one module or parameter.

        Args:
            name: dotted path.
            matrix: its (out, in).

        Raises:
            UsageError: the rank is above the matrix's size.
        """
        rank = int(self._ranks.value(name, self.rank))
        if rank > min(matrix):
            raise UsageError(
                f"rank {rank} is above that of {name}, which is {matrix[0]} x {matrix[1]}",
                hint=f"a smaller rank, or for this one alone: --rank-pattern {name.rpartition('.')[2]}={min(matrix)}",
            )
        return rank, scaling(float(self._alphas.value(name, self.alpha)), rank, self.rslora)

    @cached_property
    def _ranks(self) -> FirstMatch:
        return FirstMatch(self.rank_pattern)

    @cached_property
    def _alphas(self) -> FirstMatch:
        return FirstMatch(self.alpha_pattern)

    def require_use(self, setting: str, names: Sequence[str]) -> None:
        """Refuse a pattern that speaks of nothing.

        Args:
            setting: rank_pattern or alpha_pattern.
            names: of everything that has an adapter.

        Raises:
            UsageError: a pattern matches none of them.
        """
        patterns: Mapping[str, float] = getattr(self, setting)
        first = FirstMatch({pattern: pattern for pattern in patterns})
        left = set(patterns).difference(first.value(name, None) for name in names)
        unused = [p for p in patterns if p in left and not any(matches_whole(p, name, after=".") for name in names)]
        if unused:
            raise UsageError(
                f"{setting}: {unused[0]!r} matches nothing that has an adapter",
                hint="a key is the end of a module's path, such as q_proj or layers.0.mlp.up_proj",
            )
