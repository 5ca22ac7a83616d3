"""``adaptkit-manifest.json``: what an artifact consists of, how it was made, and from what.

Canonical JSON: UTF-8, sorted keys, no spaces, times, host names or absolute paths. Same inputs give the same bytes.

    schema      1
    kind        quantized | adapter | merged | checkpoint
    tool        {name, version}
    operation   {name, options}
    files       [{path, size, sha256}]                      every file except the manifest and its signature
    tensors     [{name, file, dtype, shape, xxh3_128}]
    tensors_root  sha256 over the sorted lines of name, dtype, shape and digest
    parents     [{role, kind, tensors_root, manifest_sha256?, weight?}]
    targets     [{module, shape, base_xxh3_128, quantized_root?}]
                the base tensors that this artifact quantizes, was trained on, or changes
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import adaptkit
from adaptkit.checkpoint.layout import read_small, resolve_inside
from adaptkit.documents import strict_json
from adaptkit.errors import CheckpointError, IntegrityError, UsageError
from adaptkit.numerics.spec import TensorSpec

MANIFEST_NAME = "adaptkit-manifest.json"
SIGNATURE_NAME = "adaptkit-manifest.sig"
"""The manifest's signature, the only other file that the manifest does not list; see ``signing``."""
SCHEMA = 1


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact; ``path`` is relative, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of an artifact."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @classmethod
    def of(cls, spec: TensorSpec, digest: str, file: str = "") -> Self:
        """Make the record of a tensor from its fingerprint; ``file`` may be empty for tensors of an input."""
        return cls(spec.name, file, spec.dtype, spec.shape, digest)

    @property
    def content(self) -> tuple[str, str, tuple[int, ...]]:
        """Fingerprint, type and shape: two tensors with the same value are equal."""
        return self.xxh3_128, self.dtype, self.shape


@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from.

    Attributes:
        role: base, adapter, merged, tuned, init (the adapter that training started from), release (in FP8 or MXFP4,
            whose weights decoded to 16 bits are the base), or whole (the artifact that a part was pulled from).
        kind: the parent's kind; for a parent without a manifest, ``adapter`` or ``checkpoint``.
        tensors_root: sha256 over the parent's tensors.
        manifest_sha256: of the parent's manifest, if it has one.
        weight: factor with which an adapter was merged or stacked.
    """

    role: str
    kind: str
    tensors_root: str
    manifest_sha256: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Target:
    """A base tensor that the artifact depends on.

    Attributes:
        module: the module's dotted path; its weight is ``<module>.weight``.
        shape: of the weight as stored in the base's file.
        base_xxh3_128: fingerprint of the original weight, if known.
        quantized_root: ``tensors_root`` over the weight's quantized parts, if it was quantized.
    """

    module: str
    shape: tuple[int, ...]
    base_xxh3_128: str | None = None
    quantized_root: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))


_RECORDS = (FileRecord, TensorRecord, Parent, Target)
_AGAIN = "download or copy the artifact again"


@dataclass(frozen=True)
class Manifest:
    """The whole document; see the module's docstring."""

    kind: str
    operation: dict[str, Any]
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...] = ()
    parents: tuple[Parent, ...] = ()
    targets: tuple[Target, ...] = ()
    tool: dict[str, str] = field(default_factory=lambda: {"name": "adaptkit", "version": adaptkit.__version__})
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda f: f.path)))
        object.__setattr__(self, "tensors", tuple(sorted(self.tensors, key=lambda t: t.name)))
        object.__setattr__(self, "targets", tuple(sorted(self.targets, key=lambda t: t.module)))
        _check_paths(self.files)  # also before writing, since such a manifest could not be read

    @cached_property
    def tensors_root(self) -> str:
        """sha256 over all tensors of the artifact; see ``tensors_root``."""
        return tensors_root(self.tensors)

    def known_weights(self) -> dict[str, Target]:
        """Return, by module, the targets that describe this artifact's own weights; empty unless it is quantized.

        The targets of a merged model describe the weights before the merge.
        """
        return {target.module: target for target in self.targets} if self.kind == "quantized" else {}

    def base_fingerprints(self) -> dict[str, str]:
        """Return the known fingerprints of the base's original tensors that ``targets`` names."""
        return {target.module: target.base_xxh3_128 for target in self.targets if target.base_xxh3_128 is not None}

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        document = {part.name: _plain(getattr(self, part.name)) for part in fields(self)}
        document["tensors_root"] = self.tensors_root
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @cached_property
    def sha256(self) -> str:
        """sha256 of the canonical form."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def require_sha256(self, expected: str | None, where: str | Path) -> None:
        """Check this manifest's sha256, unless ``expected`` is None."""
        if expected is not None and self.sha256 != expected:
            raise IntegrityError(
                f"{where}: the manifest's sha256 is {self.sha256}; expected {expected}",
                hint="this is not the artifact that you expect: check where it came from",
            )

    @classmethod
    def from_bytes(cls, text: bytes, where: str | Path = MANIFEST_NAME) -> Self:
        """Parse and check a manifest; ``where`` is its path, for messages.

        Raises:
            IntegrityError: not canonical, unknown fields or schema, or a ``tensors_root`` that does not match.
        """
        try:
            document = strict_json(text, MANIFEST_NAME)
            if document.get("schema") != SCHEMA:
                raise IntegrityError(
                    f"{where}: unknown schema {document.get('schema')!r}", hint="if a newer adaptkit made it, upgrade"
                )
            root = document.pop("tensors_root", None)
            parts: dict[str, Any] = {
                "files": FileRecord, "tensors": TensorRecord, "parents": Parent, "targets": Target
            }  # fmt: skip
            for name, record in parts.items():
                document[name] = tuple(typed(record(**entry)) for entry in document[name])
            manifest = cls(**document)
            _check_head(manifest)
            canonical = root == manifest.tensors_root and manifest.to_bytes() == text
        except (CheckpointError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            detail = reason(error).removeprefix(f"{MANIFEST_NAME}: ")
            raise IntegrityError(f"{where}: malformed ({detail})", hint=_AGAIN) from error
        if not canonical:
            raise IntegrityError(f"{where}: was changed after it was written", hint=_AGAIN)
        return manifest


def tensors_root(tensors: Iterable[TensorRecord]) -> str:
    """Return a sha256 over name, dtype, shape and digest of a set of tensors, whatever files they are in."""
    lines = sorted(f"{t.name} {t.dtype} {list(t.shape)} {t.xxh3_128}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(root: Path) -> Manifest | None:
    """Read a folder's manifest; None if it has none."""
    path = root / MANIFEST_NAME
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # not PermissionError: there may be a manifest
        return None
    return Manifest.from_bytes(read_small(path), path)


def check_sha256(text: str | None) -> None:
    """Check that the expected hash of a manifest is a sha256 at all, to not report a typo as another artifact."""
    if text is not None and re.fullmatch("[0-9a-f]{64}", text) is None:
        raise UsageError(
            f"manifest_sha256: {text!r} is not a sha256: 64 digits from 0 to 9 and a to f",
            hint="use the manifest sha256 that publish, or the command that made the artifact, printed",
        )


def require_manifest(root: Path) -> Manifest:
    """Read a folder's manifest; an IntegrityError if it is missing or malformed."""
    manifest = read_manifest(root)
    if manifest is None:
        raise IntegrityError(
            f"{root}: {MANIFEST_NAME} not found", hint=f"if another tool made this, run adaptkit adopt {root} -o OUT"
        )
    return manifest


def parent_of(
    role: str,
    manifest: Manifest | None,
    tensors: Sequence[TensorRecord],
    weight: float | None = None,
    *,
    root: Path | None = None,
) -> Parent:
    """Describe an input as a parent, by its manifest if it has one, otherwise by its tensors.

    The records of ``tensors``, which were read, must match the manifest; none to trust it. ``root`` is for errors.
    """
    if manifest is None:
        kind = "adapter" if role in ("adapter", "init") else "checkpoint"
        return Parent(role, kind, tensors_root(tensors), weight=weight)
    if tensors and tensors_root(tensors) != manifest.tensors_root:
        where = root or f"the {role}"
        raise IntegrityError(f"{where}: its tensors do not match its manifest", hint=f"run adaptkit verify {where}")
    return Parent(role, manifest.kind, manifest.tensors_root, manifest.sha256, weight)


def _check_head(manifest: Manifest) -> None:
    """Check the types of what is not in a record, and that texts are printable: they appear in tables and cards."""
    for name in ("operation", "tool"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is not an object")
    texts = {"kind": manifest.kind, "operation.name": manifest.operation["name"]}
    texts |= {f"tool.{name}": manifest.tool[name] for name in ("name", "version")}
    for record in (*manifest.tensors, *manifest.parents, *manifest.targets):
        texts |= {name: value for name, value in vars(record).items() if type(value) is str and not value.isprintable()}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.isprintable():
            raise TypeError(f"{name} is {value!r}")
    if not isinstance(manifest.operation.get("options", {}), dict):
        raise TypeError("operation.options is not an object")
    if type(manifest.schema) is not int:  # True and 1.0 equal 1
        raise TypeError(f"schema is {manifest.schema!r}")


def _check_paths(files: tuple[FileRecord, ...]) -> None:
    paths = [record.path for record in files]
    folded = {path.casefold() for path in paths}
    if len(folded) != len(paths) or folded & {MANIFEST_NAME, SIGNATURE_NAME}:
        raise ValueError("a path appears twice, or the manifest lists itself or its signature")
    for path in paths:
        resolve_inside(Path(MANIFEST_NAME), path)


def _plain(value: Any) -> Any:
    """Convert to JSON types, leaving out None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, _RECORDS):  # no recursion: records are flat, and there are many
        return {key: item for key, item in vars(value).items() if item is not None}
    return value


def reason(error: Exception) -> str:
    """Describe an error from building a record of a document's entries, without names from the Python code."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    unknown = re.search("unexpected keyword argument (.*)", str(error))
    missing = re.search("missing .* arguments?: (.*)", str(error))
    return f"unknown key {unknown[1]}" if unknown else f"missing: {missing[1]}" if missing else str(error)


def typed(record: Any) -> Any:
    """Return the record if its fields have their declared types, which parsed JSON does not guarantee."""
    for name, kind in _types(record.__class__):
        value = getattr(record, name)
        if kind == tuple[int, ...]:
            fits = isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)
        else:
            fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits:
            raise TypeError(f"{name} is {value!r}")
    return record


@cache
def _types(record: type) -> tuple[tuple[str, Any], ...]:
    return tuple((part.name, part.type) for part in fields(record))
