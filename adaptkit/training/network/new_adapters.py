"""New adapters: which layers and stacks get one, its rank and scaling, and the initial values of A."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from adaptkit.checkpoint.patterns import FirstMatch, matches_end
from adaptkit.errors import AdapterError, UsageError
from adaptkit.models.architecture import language_part
from adaptkit.models.matching import matching, matching_targets
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.scaling import scaling
from adaptkit.training.network.adapt import put_stack, stack_shape
from adaptkit.training.network.model import Model


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scaling of a run's adapters.

    Attributes:
        rank: default rank.
        alpha: default alpha; scaling is alpha / rank.
        rslora: scaling is alpha / √rank instead (arXiv:2312.03732).
        rank_pattern: maps PEFT patterns to other ranks; see ``checkpoint.patterns``.
        alpha_pattern: maps PEFT patterns to other alphas.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, matrix: tuple[int, int]) -> tuple[int, float]:
        """Return rank and scaling of one module or parameter.

        Args:
            name: dotted path.
            matrix: its (out, in).

        Raises:
            UsageError: the rank is larger than the smaller dimension of the matrix.
            AdapterError: a pattern takes too long to match.
        """
        with _matching_of("rank_pattern"):
            rank = int(self._ranks.value(name, self.rank))
        with _matching_of("alpha_pattern"):
            alpha = float(self._alphas.value(name, self.alpha))
        if rank > min(matrix):
            raise UsageError(
                f"rank: must be at most {min(matrix)}, since {name} is {matrix[0]} x {matrix[1]}; found {rank}",
                hint=f"use a smaller --rank, or here alone: --rank-pattern {name.rpartition('.')[2]}={min(matrix)}",
            )
        return rank, scaling(alpha, rank, self.rslora)

    @cached_property
    def _ranks(self) -> FirstMatch:
        return FirstMatch(self.rank_pattern)

    @cached_property
    def _alphas(self) -> FirstMatch:
        return FirstMatch(self.alpha_pattern)

    def require_use(self, setting: str, names: Sequence[str]) -> None:
        """Check that every pattern of a setting matches something.

        Args:
            setting: rank_pattern or alpha_pattern.
            names: names of everything that has an adapter.

        Raises:
            UsageError: a pattern matches none of them.
            AdapterError: a pattern takes too long to match.
        """
        patterns: Mapping[str, float] = getattr(self, setting)
        first = FirstMatch({pattern: pattern for pattern in patterns})
        with _matching_of(setting):
            left = set(patterns).difference(first.value(name, None) for name in names)
            unused = [p for p in patterns if p in left and not any(matches_end(p, name) for name in names)]
        if unused:
            raise UsageError(
                f"{setting}: {unused[0]!r} matches no module with an adapter",
                hint="use the end of a module's path, such as q_proj or layers.0.mlp.up_proj",
            )


@contextmanager
def _matching_of(setting: str) -> Iterator[None]:
    """Turn a pattern's failure to match in time into an error that names the setting."""
    try:
        yield
    except re.error as error:
        raise AdapterError(f"{setting}: {error}", hint="use a simpler pattern, without nested repetition") from error


def new_adapter(
    model: Model,
    targets: Sequence[str],
    shape: AdapterShape,
    init: str,
    dropout: float,
    seed: int,
    exclude: Sequence[str] = (),
) -> None:
    """Attach a new adapter to every layer that matches a pattern: A random, B zero.

    Args:
        model: modified in place.
        targets: shell patterns of module paths, or of their last components; see ``matching_targets``.
        shape: rank and scaling.
        init: ``kaiming`` (uniform within ±1/√in, as PEFT) or ``normal`` (standard deviation 1 / rank).
        dropout: dropout probability of the adapters' input.
        seed: random seed of A.
        exclude: shell patterns of layers that get no adapter even if a target matches them.

    Raises:
        UsageError: a pattern matches no layer, no layer is left, or a rank is larger than a layer's smaller dimension.
    """
    chosen = matching_targets(targets, model.linears, language_part(model.network), model.network.config.model_type)
    chosen -= matching("exclude pattern", exclude, model.linears, "linear layer")
    if not chosen:
        if exclude:
            what = "every target is excluded or trained in full"
            raise UsageError(what, hint="use fewer patterns in --exclude or --modules-to-save")
        raise UsageError("no linear layer processes text, apart from routers", hint="name targets with --targets")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(chosen):
        layer = model.linears[name]
        out_features, in_features = layer.base.shape
        rank, factor = shape.of(name, (out_features, in_features))
        if init == "normal":
            lora_a = torch.randn(rank, in_features, generator=generator) / rank
        else:
            lora_a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
        layer.attach(LowRank.of_tensors(lora_a, torch.zeros(out_features, rank), factor), dropout)


def new_stack_adapters(model: Model, patterns: Sequence[str], shape: AdapterShape, seed: int) -> None:
    """Attach new adapters to stacked expert matrices: for every expert a random A and a zero B.

    Args:
        model: modified in place.
        patterns: shell patterns of the parameters' paths, or of their last components.
        shape: rank and scaling.
        seed: random seed of A.

    Raises:
        UsageError: a pattern matches no stack, or the rank is larger than a matrix's smaller dimension.
    """
    stacks = model.stacks()
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(matching("target parameter", patterns, stacks, "stacked expert matrix")):
        count, out_features, in_features = stack_shape(stacks[name], name)
        rank, factor = shape.of(name, (out_features, in_features))
        lora_a = (torch.rand(count, rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
        put_stack(model, name, lora_a, torch.zeros(count, out_features, rank), factor)
