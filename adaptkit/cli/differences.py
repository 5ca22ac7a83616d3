"""Summary rows of ``diff`` for two adapters or checkpoints, shared by the terminal and the HTML page."""

from typing import TYPE_CHECKING

from adaptkit.cli.output import Row, percent, size

if TYPE_CHECKING:
    from adaptkit.operations._diff.modules import GroupDifference
    from adaptkit.operations.diff import CheckpointDiffReport


def adapter_rows(total: "GroupDifference") -> list[Row]:
    """Return labels and values on how two adapters differ over all modules."""
    rows = [
        ("norms", f"{total.norms[0]:.6g} and {total.norms[1]:.6g}"),
        ("cosine", f"{total.cosine:+.6f}"),
        ("difference", f"{percent(total.relative)} of the larger norm"),
        ("effective ranks", f"{total.effective_ranks[0]:.3g} and {total.effective_ranks[1]:.3g}, mean of the modules"),
        ("stable ranks", f"{total.stable_ranks[0]:.3g} and {total.stable_ranks[1]:.3g}, mean of the modules"),
    ]
    for side, overlap, random in (
        ("outputs", total.columns, total.columns_random),
        ("inputs", total.rows, total.rows_random),
    ):
        if overlap is not None and random is not None:
            rows.append((f"overlap, {side}", f"{overlap:.3f}; random subspaces {random:.3f}"))
    if total.sign_agreement is not None:
        rows.append(("signs", f"{percent(total.sign_agreement)} agree, on 64 rows per module"))
    if total.interference_share is not None:
        rows.append(("interference", f"{percent(total.interference_share)} of the singular values"))
    return rows


def checkpoint_rows(report: "CheckpointDiffReport") -> list[Row]:
    """Return labels and values on how two checkpoints differ, and where their fingerprints come from."""
    rows = [
        ("tensors", f"{report.equal:,} equal ({size(report.equal_bytes)}), {len(report.tensors):,} differ"),
        ("fingerprints", _fingerprints(report.fingerprints)),
    ]
    if any(report.quantizations):
        found = " and ".join(name or "not quantized" for name in report.quantizations)
        rows.append(("quantized", f"{found}; compared as stored, not decoded"))
    if report.tensors:
        share = "unknown, since some tensors have no norm"
        if report.relative is not None:
            share = f"{percent(report.relative)} of the norm of the differing tensors"
        rows.append(("difference", share))
    if report.energy:
        shares = ", ".join(f"{percent(share)} in {rank}" for rank, share in report.energy.items())
        rows.append(("low rank", f"at least {shares} directions per matrix, of the change's squared norm"))
    return rows


def _fingerprints(basis: tuple[str, str]) -> str:
    words = {"manifest": "from its manifest, not read", "computed": "computed from its bytes"}
    if basis[0] == basis[1]:
        return {
            "manifest": "from both manifests; --recompute reads the tensors",
            "computed": "computed from all bytes",
        }[basis[0]]
    return f"first {words[basis[0]]}; second {words[basis[1]]}"
