"""Fingerprints of a base's weights, and whether an adapter was trained on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.manifest import Target, TensorRecord, read_manifest, tensors_root
from adaptkit.checkpoint.quantization import is_released, packed_weights, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import is_embedding_name, is_head
from adaptkit.errors import BaseMismatchError
from adaptkit.models.addressing import OTHER_MODEL
from adaptkit.numerics.spec import FLOATS


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
            root = tensors_root(map(self._record, self._quantized[name].parts)) if expected.quantized_root else None
            plain = self._decoded if expected.base_xxh3_128 else None
            digest = fingerprint_in_pieces(plain, name) if plain else None
            return Target(module, expected.shape, digest, root) if root or digest else None
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
    def _decoded(self) -> DecodedCheckpoint | None:
        """The base's 16-bit values, if they are the ones that it was released with."""
        method = quantization_found(self._checkpoint)
        return DecodedCheckpoint(self._checkpoint) if is_released(method) else None

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
class Fit:
    """Result of comparing an adapter with a base.

    Attributes:
        compared: number of the adapter's targets that could be compared.
        differs: module of the first target that differs; empty if none does.
        is_packed: whether only the quantized parts of that target could be compared, not the 16-bit weight.
        is_same: whether the compared targets are quantized identically (or not at all), rather than only having the
            same 16-bit weights.
        is_whole: whether there are targets, and all of them were compared and do not differ.
    """

    compared: int
    differs: str
    is_packed: bool
    is_same: bool
    is_whole: bool


def check_base(adapter: Adapter, base: Weights) -> Fit:
    """Compare an adapter's vocabulary, and the targets in its manifest where both have fingerprints, with a base.

    An adapter that was trained on a quantized base also belongs to the 16-bit base with the same weights, and to any
    quantization of that base whose manifest says so, unless it compensates for the error of its own quantization.

    Raises:
        BaseMismatchError: a weight differs, or the size of the vocabulary; names it.
    """
    fit = fit_of(adapter, base)
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
    return fit


def fit_of(adapter: Adapter, base: Weights) -> Fit:
    """Compare the targets in an adapter's manifest with a base, the smallest first, until one differs."""
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
            return Fit(compared, expected.module, is_packed=None in weights, is_same=False, is_whole=False)
    is_whole = bool(targets) and compared == len(targets)
    return Fit(compared, "", is_packed=False, is_same=is_same, is_whole=is_whole)


def check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise a BaseMismatchError if the shape of an adapter's tensor is not that of the base's."""
    if list(found) != list(expected):
        resized = len(expected) == 2 and list(found[1:]) == list(expected[1:])
        raise BaseMismatchError(
            f"{name}: expected shape {list(expected)}, as in the base, found {list(found)}",
            hint="if its vocabulary was resized, merge it into its base instead" if resized else OTHER_MODEL,
        )
