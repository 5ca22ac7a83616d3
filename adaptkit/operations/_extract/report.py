"""Report of ``extract``: how the tuned checkpoint differs from its base, and how much of that the adapter holds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adaptkit.checkpoint.manifest import Manifest
from adaptkit.operations._extract.plan import LEFT_OUT, LOW_RANK, SAVED, ExtractPlan
from adaptkit.operations._extract.tensors import ComparedTensor
from adaptkit.wording import counted

_IGNORED_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
"""Keys of ``config.json`` that do not affect what the model computes, or that other fields of the report cover."""
_LOW_ENERGY = 0.9
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
    equal: int
    modules: tuple[ExtractedModule, ...] = field(repr=False)
    experts: int
    placeholder: str | None
    saved: tuple[OtherTensor, ...] = field(repr=False)
    left_out: tuple[OtherTensor, ...] = field(repr=False)
    resized: bool
    ranks: tuple[int, int]
    parameters: int
    energy_kept: float
    relative_error: float
    below_90: int
    unreached: int
    rounding: float
    left_out_energy: float
    tokenizer: tuple[str, ...]
    tensors_root: str | None
    manifest_sha256: str | None

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


def make_report(
    output: Path,
    plan: ExtractPlan,
    findings: Sequence[ComparedTensor] = (),
    placeholder: str | None = None,
    beside: Iterable[str] = (),
    manifest: Manifest | None = None,
) -> ExtractReport:
    """Return the report; of a dry run, which has read no weight, without findings and what follows from them."""
    low_rank = [finding for finding in findings if finding.term is not None]
    others = [finding for finding in findings if finding.differs and finding.term is None]
    saved, left_out = ([f for f in others if f.part.fate == fate] for fate in (SAVED, LEFT_OUT))
    ranks = [finding.rank for finding in low_rank] or [0]
    changed, total = (sum(finding.square for finding in some) for some in (low_rank, findings))
    kept = sum(f.square * f.energy_kept for f in low_rank) / changed if changed else float(not low_rank)
    before, after = plan.base.config, plan.tuned.config
    return ExtractReport(
        output=str(output),
        tensors=len(plan.parts),
        candidates=sum(part.fate == LOW_RANK for part in plan.parts),
        read_from=plan.roles.read_from,
        config_differs=tuple(
            key for key in sorted({*before, *after} - _IGNORED_KEYS) if before.get(key) != after.get(key)
        ),
        equal=sum(not finding.differs for finding in findings),
        modules=tuple(
            ExtractedModule(
                module=finding.part.module,
                shape=finding.part.spec.shape,
                rank=finding.rank,
                norm=math.sqrt(finding.square),
                relative_norm=finding.relative_norm or 0.0,
                energy_kept=finding.energy_kept,
                relative_error=math.sqrt(max(0.0, 1 - finding.energy_kept)),
                rank_99=finding.rank_99,
                rounding=finding.rounding,
            )
            for finding in low_rank
        ),
        experts=sum(finding.part.kind == "expert" for finding in low_rank),
        placeholder=placeholder,
        saved=tuple(map(_other, saved)),
        left_out=tuple(map(_other, left_out)),
        resized=any(part.resized for part in plan.parts),
        ranks=(min(ranks), max(ranks)),
        parameters=sum(f.rank * sum(f.part.spec.shape) for f in low_rank) + sum(f.part.tuned.count for f in saved),
        energy_kept=kept,
        relative_error=math.sqrt(max(0.0, 1 - kept)),
        below_90=sum(finding.energy_kept < _LOW_ENERGY for finding in low_rank),
        unreached=sum(not finding.reached for finding in low_rank),
        rounding=sum(f.square * f.rounding for f in low_rank) / changed if changed else 0.0,
        left_out_energy=sum(finding.square for finding in left_out) / total if total else 0.0,
        tokenizer=tuple(beside),
        tensors_root=manifest.tensors_root if manifest else None,
        manifest_sha256=manifest.sha256 if manifest else None,
    )


def _other(finding: ComparedTensor) -> OtherTensor:
    part = finding.part
    return OtherTensor(part.name, part.tuned.shape, part.spec.shape, part.why, finding.relative_norm)
