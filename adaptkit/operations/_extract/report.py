"""Report of ``extract``: how the tuned checkpoint differs from its base, and how much of that the adapter holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adaptkit.checkpoint.progress import counted
from adaptkit.operations._extract.plan import LOW_RANK, Plan
from adaptkit.operations._extract.tensors import Finding

LOW_ENERGY = 0.9
"""A module whose low-rank change keeps a smaller share of ‖D‖² than this is counted in ``below_90``."""


@dataclass(frozen=True)
class ExtractedModule:
    """One linear layer whose weight differs. D is tuned − base, Δ is the low-rank change.

    Attributes:
        module: dotted path in the files.
        shape: shape of the weight in the files.
        rank: rank of Δ.
        norm: ‖D‖.
        relative_norm: ‖D‖ / ‖W‖, W being the base's weight.
        energy_kept: ‖Δ‖² / ‖D‖².
        relative_error: ‖D − Δ‖ / ‖D‖.
        rank_99: smallest rank that keeps 99 % of ‖D‖²; None if it is beyond the computed singular values.
        rounding: estimated share of ‖D‖² due to rounding the tuned weights to their dtype.
    """

    module: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    relative_norm: float
    energy_kept: float
    relative_error: float
    rank_99: int | None
    rounding: float


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that differs and is stored whole or left out.

    Attributes:
        name: its name in the files.
        shape: its shape in the tuned checkpoint.
        base_shape: its shape in the base; a different one if the vocabulary was resized.
        why: its kind, or why it is left out.
        relative_norm: ‖D‖ / ‖W‖; None if the shapes differ, if D or W is zero, or for integers.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    why: str
    relative_norm: float | None


@dataclass(frozen=True)
class ExtractReport:
    """Result of ``extract``; after a dry run, only what the headers tell.

    Attributes:
        output: folder of the adapter.
        tensors: number of tensors in each checkpoint.
        candidates: number of linear layers' weights, which may become low-rank changes.
        equal: number of tensors that do not differ.
        read_from: how the linear layers were identified.
        modules: the low-rank changes.
        experts: number of low-rank changes of single experts' matrices, whose module names peft has only in some
            models.
        placeholder: module that got a zero change because there is no other low-rank change: peft cannot load an
            adapter without one. None if not needed.
        saved: tensors that differ and are stored whole.
        left_out: tensors that differ and are not stored.
        resized: whether the vocabulary size differs, so that the base must be resized before loading the adapter.
        ranks: smallest and largest rank of a low-rank change; (0, 0) if there is none.
        parameters: number of elements in A and B of all ``modules`` and in the ``saved`` tensors.
        energy_kept: Σ‖Δ‖² / Σ‖D‖² over all low-rank changes; 1 if there is none.
        relative_error: √(1 − ``energy_kept``).
        below_90: number of low-rank changes that keep less than 90 % of ‖D‖².
        unreached: number of low-rank changes that keep less energy than requested because of ``max_rank``.
        rounding: estimated share of Σ‖D‖² over all low-rank changes that is due to rounding.
        left_out_energy: share of Σ‖D‖² that is left out, over all tensors that differ, without resized ones.
        config_differs: keys of ``config.json`` that differ, which an adapter cannot express.
        tokenizer: tokenizer files and generation config copied from the tuned checkpoint because the base's differ.
        tensors_root: ``tensors_root`` of the adapter; None for a dry run.
        manifest_sha256: sha256 of the adapter's manifest; None for a dry run.
    """

    output: str
    tensors: int
    candidates: int
    read_from: str
    config_differs: tuple[str, ...]
    equal: int = 0
    modules: tuple[ExtractedModule, ...] = field(default=(), repr=False)
    experts: int = 0
    placeholder: str | None = None
    saved: tuple[OtherTensor, ...] = field(default=(), repr=False)
    left_out: tuple[OtherTensor, ...] = field(default=(), repr=False)
    resized: bool = False
    ranks: tuple[int, int] = (0, 0)
    parameters: int = 0
    energy_kept: float = 1.0
    relative_error: float = 0.0
    below_90: int = 0
    unreached: int = 0
    rounding: float = 0.0
    left_out_energy: float = 0.0
    tokenizer: tuple[str, ...] = ()
    tensors_root: str | None = None
    manifest_sha256: str | None = None

    @property
    def remarks(self) -> dict[str, str]:
        """What users of the adapter must know; maps a label to a phrase."""
        found = {}
        if self.resized:
            found["vocabulary"] = "size differs: resize the base's embeddings before peft loads the adapter"
        if self.experts:
            matrices = counted(self.experts, "matrix")
            found["experts"] = f"{matrices} of single experts, which merge supports, but peft only for some models"
        if self.config_differs:
            keys = ", ".join(self.config_differs)
            found["not covered"] = f"config.json differs in {keys}, which an adapter cannot store"
        return found


def plan_report(output: Path, plan: Plan, config_differs: tuple[str, ...]) -> ExtractReport:
    """Return the part of the report that is known before any weight is read."""
    return ExtractReport(
        output=str(output),
        tensors=len(plan.parts),
        candidates=sum(part.fate == LOW_RANK for part in plan.parts),
        read_from=plan.roles.read_from,
        config_differs=config_differs,
        resized=any(part.resized for part in plan.parts),
    )


def module_report(finding: Finding) -> ExtractedModule:
    """Return the report of a low-rank change."""
    return ExtractedModule(
        module=finding.part.module,
        shape=finding.part.spec.shape,
        rank=finding.term.rank if finding.term else 0,
        norm=math.sqrt(finding.square),
        relative_norm=relative_norm(finding) or 0.0,
        energy_kept=finding.energy_kept,
        relative_error=math.sqrt(max(0.0, 1 - finding.energy_kept)),
        rank_99=finding.rank_99,
        rounding=finding.rounding,
    )


def other_report(finding: Finding) -> OtherTensor:
    """Return the report of any other tensor that differs."""
    part = finding.part
    return OtherTensor(part.name, part.tuned.shape, part.spec.shape, part.why, relative_norm(finding))


def relative_norm(finding: Finding) -> float | None:
    """Return ‖D‖ / ‖W‖; None if either is zero or was not computed."""
    return math.sqrt(finding.square / finding.base_square) if finding.square and finding.base_square else None


def weighted(findings: Sequence[Finding], share: str) -> float:
    """Return the mean of an attribute of the findings that is a share of ‖D‖², weighted by ‖D‖²."""
    total = sum(finding.square for finding in findings)
    return sum(finding.square * getattr(finding, share) for finding in findings) / total if total else 0.0
