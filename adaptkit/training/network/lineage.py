"""Provenance by manifests and fingerprints: check an adapter against a base, or find its base among several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.manifest import Manifest, read_manifest
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.base_weights import Weights, check_base, fit_of


def base_of(adapter: Adapter, bases: Sequence[Weights]) -> Weights:
    """Return which of several bases an adapter was trained on.

    That is the base that its manifest names; else the one with identical weights, quantized identically or not at all;
    else the one with the same 16-bit weights. A single base is only checked.

    Raises:
        BaseMismatchError: it was trained on none of them.
        UsageError: it has no manifest, or not exactly one base matches.
    """
    if len(bases) == 1:
        check_base(adapter, bases[0])
        return bases[0]
    if adapter.manifest is None:
        raise UsageError(
            f"{adapter.root}: has no manifest, so it is unknown which of the {len(bases)} bases it belongs to",
            hint="evaluate it with its base alone",
        )
    named = parent_among(adapter.manifest, bases)
    if named is not None:
        return named
    listed = ", ".join(str(base.root) for base in bases)
    fits = [(base, fit) for base in bases if not (fit := fit_of(adapter, base)).differs]
    if not fits:
        raise BaseMismatchError(f"{adapter.root}: belongs to none of {listed}", hint="add its base: --base BASE")
    same = [base for base, fit in fits if fit.compared and fit.is_same]
    chosen = same or [base for base, fit in fits if fit.compared]
    if len(chosen) != 1:
        raise UsageError(
            f"{adapter.root}: cannot tell which of {listed} it belongs to", hint="evaluate it with its base alone"
        )
    return chosen[0]


def parent_among(manifest: Manifest | None, bases: Sequence[Weights]) -> Weights | None:
    """Return the base that a manifest names as its artifact's parent; None if it is not among ``bases``."""
    parents = [parent for parent in (manifest.parents if manifest else ()) if parent.role == "base"]
    # Bases without a manifest last: their files have to be read.
    for base in sorted(bases, key=lambda base: base.manifest is None) if parents else ():
        sha256 = base.manifest.sha256 if base.manifest else ""
        if any(parent.manifest_sha256 == sha256 or parent.tensors_root == base.tensors_root for parent in parents):
            return base
    return None


def trained_parameters(base: Path, adapter: Adapter | None, total: int) -> int | None:
    """Return how many parameters were trained: an adapter's, or all of a fully fine-tuned checkpoint; None if unknown.

    Args:
        base: folder of the checkpoint.
        adapter: None for the checkpoint itself.
        total: number of the checkpoint's parameters.
    """
    if adapter is not None:
        return adapter.trained_parameters
    trained = _training_options(read_manifest(base))
    return total if trained is not None and trained.get("method") == "full" else None


def template_kwargs(base: Path, adapter: Adapter | None) -> dict[str, Any] | None:
    """Return the ``chat_template_kwargs`` that adapter or checkpoint was trained with; None if not by adaptkit."""
    trained = _training_options(adapter.manifest if adapter is not None else read_manifest(base))
    if trained is None:
        return None
    given = trained.get("chat_template_kwargs")
    return dict(given) if isinstance(given, Mapping) else {}


def _training_options(manifest: Manifest | None) -> Mapping[str, Any] | None:
    """Return the options of the training run that made an artifact; None if a training run did not make it."""
    if manifest is None or manifest.operation.get("name") != "train":
        return None
    options: Mapping[str, Any] = manifest.operation.get("options", {})
    return options
