"""What ``extract`` found in a tuned checkpoint, and what of it the adapter holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptkit.operations._extract.plan import LOW_RANK, Plan
from adaptkit.operations._extract.tensors import Finding

LITTLE = 0.9
"""A module that keeps less of its change than this is counted as one that is not low-rank."""


@dataclass(frozen=True)
class ExtractedModule:
    """One linear layer whose weight differs. D is tuned − base, Δ what the adapter adds.

    Attributes:
        module: dotted path in the files.
        shape: of the weight as the files hold it.
        rank: of Δ.
        norm: ‖D‖.
        relative_norm: ‖D‖ / ‖W‖, W being the base's.
        energy_kept: ‖Δ‖² / ‖D‖².
        relative_error: ‖D − Δ‖ / ‖D‖.
        rank_99: the rank that would keep 99 % of ‖D‖²; None if it is larger than what was looked at.
        rounding: the share of ‖D‖² that rounding the tuned weights to their type accounts for, estimated.
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
    """A tensor that differs and is no low-rank change: it is in the adapter whole, or not at all.

    Attributes:
        name: in the files.
        shape: in the tuned checkpoint.
        base_shape: in the base; another one if the vocabulary was resized.
        why: its kind, or why it is left out.
        relative_norm: ‖D‖ / ‖W‖; None if the shapes differ, or W is zero.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    why: str
    relative_norm: float | None


@dataclass(frozen=True)
class ExtractReport:
    """What was done; of a dry run, what would be compared.

    Attributes:
        output: folder.
        tensors: in either checkpoint.
        candidates: weights of linear layers among them, which may become low-rank changes.
        equal: tensors that do not differ.
        read_from: how it was found out which weights are those of linear layers.
        modules: low-rank changes, one each.
        experts: how many of them are of single experts, whose names peft knows for some models only.
        placeholder: module with a change of nothing, if no other has one: peft loads no adapter without.
        saved: tensors that are in the adapter whole.
        left_out: tensors that differ and are not in the adapter.
        resized: whether the vocabulary has another size, so that readers must resize the base first.
        ranks: smallest and largest rank of a low-rank change; 0 if there is none.
        parameters: in A and B of all modules, and in the saved tensors.
        energy_kept: share of Σ ‖D‖² over the low-rank changes that they keep; 1 if there is none.
        relative_error: of all of them together.
        below_90: number of modules that keep less than 90 %.
        unreached: number of modules that keep less energy than was asked for, since the largest rank was reached.
        rounding: share of Σ ‖D‖² that rounding accounts for, estimated.
        left_out_energy: share of Σ ‖D‖² over everything that differs, but resized tensors, which is left out.
        config_differs: keys of ``config.json`` that differ and that an adapter cannot hold.
        tokenizer: files of the tuned checkpoint's tokenizer, and its generation config, that go along, since the base's
            differ.
        tensors_root: binds the result's tensors; None for a dry run.
        manifest_sha256: None for a dry run.
    """

    output: str
    tensors: int
    candidates: int
    read_from: str
    config_differs: tuple[str, ...]
    equal: int = 0
    modules: tuple[ExtractedModule, ...] = ()
    experts: int = 0
    placeholder: str | None = None
    saved: tuple[OtherTensor, ...] = ()
    left_out: tuple[OtherTensor, ...] = ()
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


def plan_report(output: Path, plan: Plan, config_differs: tuple[str, ...]) -> ExtractReport:
    """What is known before any weight is read."""
    return ExtractReport(
        output=str(output),
        tensors=len(plan.parts),
        candidates=sum(part.fate == LOW_RANK for part in plan.parts),
        read_from=plan.roles.read_from,
        config_differs=config_differs,
        resized=any(part.resized for part in plan.parts),
    )


def module_report(finding: Finding) -> ExtractedModule:
    """What is said of a low-rank change."""
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
    """What is said of any other tensor that differs."""
    part = finding.part
    return OtherTensor(part.name, part.tuned.shape, part.spec.shape, part.why, relative_norm(finding))


def relative_norm(finding: Finding) -> float | None:
    """‖D‖ / ‖W‖."""
    return math.sqrt(finding.square / finding.base_square) if finding.square and finding.base_square else None


def weighted(findings: Sequence[Finding], share: str) -> float:
    """The share of Σ ‖D‖² that an attribute of the findings, a share of each ‖D‖², amounts to."""
    total = sum(finding.square for finding in findings)
    return sum(finding.square * getattr(finding, share) for finding in findings) / total if total else 0.0
