"""Provenance by manifests and fingerprints: check an adapter against a base, or find its base among several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.manifest import Manifest, Target, TensorRecord, read_manifest, tensors_root
from adaptkit.checkpoint.quantization import packed_weights
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import is_embedding_name, is_head
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.numerics.spec import FLOATS
from adaptkit.training.network.adapt import check_shape


class Weights:
    """Fingerprints of a base's weights: from its manifest if it has one, otherwise computed from its files.

    Args:
        root: folder of the base.

    Attributes:
        root: folder of the base.
        manifest: None if it has none.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.manifest = root, read_manifest(root)
        self._checkpoint = Checkpoint(root)
        self._quantized = packed_weights(self._checkpoint)
        self._known = self.manifest.known_weights() if self.manifest else {}
        self._records = {record.name: record for record in (self.manifest.tensors if self.manifest else ())}

    def like(self, expected: Target) -> Target | None:
        """Return the base's weight with fingerprints that are comparable to an adapter's target; None if none are."""
        module = expected.module
        if module in self._known:
            return self._known[module]
        name = module if module in self._checkpoint.tensors else f"{module}.weight"
        if name in self._quantized:
            parts = self._quantized[name].parts if expected.quantized_root else ()
            return Target(module, expected.shape, None, tensors_root(map(self._record, parts))) if parts else None
        spec = self._checkpoint.spec(name) if name in self._checkpoint.tensors else None
        is_plain = spec is not None and spec.shape == expected.shape and spec.dtype in FLOATS
        if not is_plain or expected.base_xxh3_128 is None:  # a weight packed by another tool has another shape or type
            return None
        return Target(module, expected.shape, self._record(name).xxh3_128)

    def check_vocabulary(self, adapter: Adapter) -> None:
        """Refuse an adapter that has an embedding or output layer of another shape, before a model is loaded.

        Raises:
            BaseMismatchError: names it.
        """
        for name, key in {**adapter.replaced, **adapter.base_copies}.items():
            module = name.removesuffix(".weight")
            is_plain = name in self._checkpoint.tensors and name not in self._quantized
            if is_plain and (is_embedding_name(module) or is_head(module)):
                found, expected = adapter.files.spec(key).shape, self._checkpoint.spec(name).shape
                check_shape(f"{adapter.root}: {name}", found, expected)

    @cached_property
    def tensors_root(self) -> str:
        """Digest over the names, dtypes, shapes and fingerprints of all its tensors."""
        return (
            self.manifest.tensors_root if self.manifest else tensors_root(map(self._record, self._checkpoint.tensors))
        )

    def _record(self, name: str) -> TensorRecord:
        if name not in self._records:
            spec, digest = self._checkpoint.spec(name), fingerprint_in_pieces(self._checkpoint, name)
            self._records[name] = TensorRecord.of(spec, digest)
        return self._records[name]


@dataclass(frozen=True)
class _Fit:
    """Result of comparing an adapter with a base.

    Attributes:
        compared: number of the adapter's targets that could be compared.
        differs: module of the first target that differs; empty if none does.
        is_packed: whether only the quantized parts of that target could be compared, not the 16-bit weight.
        is_same: whether the compared targets are quantized identically (or not at all), rather than only having the
            same 16-bit weights.
    """

    compared: int
    differs: str
    is_packed: bool
    is_same: bool


def check_base(adapter: Adapter, base: Weights) -> None:
    """Compare an adapter's vocabulary, and the targets in its manifest where both have fingerprints, with a base.

    An adapter that was trained on a quantized base also belongs to the 16-bit base with the same weights, and to any
    quantization of that base whose manifest says so, unless it compensates for the error of its own quantization.

    Raises:
        BaseMismatchError: a weight differs, or the size of the vocabulary; names it.
    """
    fit = _fit(adapter, base)
    if fit.differs and fit.is_packed:
        raise BaseMismatchError(
            f"{adapter.root}: belongs to another base than {base.root}, or quantization of it: {fit.differs} differs",
            hint="use the base that it was trained on, or the 16-bit checkpoint that was quantized",
        )
    if fit.differs:
        raise BaseMismatchError(
            f"{adapter.root}: belongs to another base than {base.root}: {fit.differs} differs",
            hint="use the base that it was trained on",
        )
    base.check_vocabulary(adapter)


def _fit(adapter: Adapter, base: Weights) -> _Fit:
    targets = adapter.manifest.targets if adapter.manifest else ()
    compared, is_same = 0, True
    for expected in sorted(targets, key=lambda target: math.prod(target.shape)):  # small first: fail fast
        found = base.like(expected)
        if found is None:
            continue
        weights = expected.base_xxh3_128, found.base_xxh3_128
        parts = expected.quantized_root, found.quantized_root
        pairs = [weights] if None not in weights else [parts] if None not in parts else []
        pairs += [parts] if adapter.compensation else []
        compared += bool(pairs)
        is_same &= parts[0] == parts[1]
        if any(one != other for one, other in pairs):
            return _Fit(compared, expected.module, is_packed=None in weights, is_same=False)
    return _Fit(compared, "", is_packed=False, is_same=is_same)


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
    fits = [(base, fit) for base in bases if not (fit := _fit(adapter, base)).differs]
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
