"""The tree of an artifact's ancestors: found by their hashes, and compared."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import AdaptkitError, IntegrityError
from adaptkit.operations._lineage.parents import Candidate, Candidates
from adaptkit.wording import counted

VERIFIED, AT_HAND, MISSING, NEVER_WRITTEN, WRONG = "verified", "found", "not found", "never written", "wrong"

_MOST_ANCESTORS = 10_000
"""A few folders whose manifests name each other more than once would otherwise make a tree that never ends."""


@dataclass(frozen=True)
class Ancestor(Parent):
    """A parent, or a parent's parent, as its child names it and as it was found.

    Attributes:
        state: ``verified``, ``wrong`` or ``not found``; ``found`` if only hashes were compared; ``never written`` if it
            was not and is not at hand; see ``need_not_exist``.
        problem: what is wrong; empty if nothing is.
        path: its folder; None if not found.
        found_by: ``manifest`` if the folder has the recorded manifest; ``tensors`` if it has another or none.
        operation: name of the operation that made it, by its manifest.
        targets: number of the child's targets that were compared with it.
        parents: its own parents.
    """

    state: str = MISSING
    problem: str = ""
    path: str | None = None
    found_by: str | None = None
    operation: str | None = None
    targets: int = 0
    parents: tuple["Ancestor", ...] = ()

    def all(self) -> Iterator["Ancestor"]:
        """Yield this and all its ancestors."""
        yield self
        for parent in self.parents:
            yield from parent.all()

    @property
    def short(self) -> str:
        """Short name for messages: role and the beginning of a hash; the same for the same artifact."""
        return f"{self.role} {(self.manifest_sha256 or self.tensors_root)[:16]}"


class Walk:
    """Finds the ancestors of an artifact.

    Args:
        candidates: folders to search.
        check: read every byte of each folder that is found, and compare fingerprints.
        threads: files read at a time.
        progress: called with bytes read.
    """

    def __init__(self, candidates: Candidates, check: bool, threads: int = 1, progress: Progress = no_progress) -> None:
        self._candidates, self._check, self._threads, self._progress = candidates, check, threads, progress
        self._checked: dict[Path, str] = {}
        self._count = 0

    def ancestors(self, path: Path, manifest: Manifest) -> tuple[Ancestor, ...]:
        """Return the parents of an artifact, with their ancestors.

        Raises:
            IntegrityError: there are too many.
        """
        return self._parents(manifest, frozenset({path.resolve()}))

    def _parents(self, child: Manifest, line: frozenset[Path]) -> tuple[Ancestor, ...]:
        said = child.operation.get("options", {}).get("adapters")  # of a merge: the adapters' identities
        identities = iter(said if isinstance(said, list) else ())
        return tuple(
            self._parent(child, parent, line, next(identities, None) if parent.role == "adapter" else None)
            for parent in child.parents
        )

    def _parent(self, child: Manifest, parent: Parent, line: frozenset[Path], identity: object) -> Ancestor:
        self._count += 1
        if self._count > _MOST_ANCESTORS:
            raise IntegrityError(
                f"the lineage has more than {_MOST_ANCESTORS:,} ancestors", hint="check where its artifacts came from"
            )
        told = Ancestor(**vars(parent))
        found = self._candidates.find(parent, line, identity)
        if found is None:
            return replace(told, state=NEVER_WRITTEN if need_not_exist(child, parent) else MISSING)
        manifest = found.manifest
        same = manifest is not None and manifest.sha256 == parent.manifest_sha256
        problem, compared = self._problem(found) if self._check else "", 0
        if self._check and not problem:
            compared, differing = compare_targets(child, parent, found)
            problem = f"{differing} is not the tensor that was used" if differing else ""
        return replace(
            told,
            state=WRONG if problem else VERIFIED if self._check else AT_HAND,
            problem=problem,
            path=str(found.path),
            found_by="manifest" if same else "tensors",
            operation=str(manifest.operation.get("name")) if manifest else None,
            targets=compared,
            # If the child names no manifest, the manifest of a folder with the same tensors may be unrelated to it.
            parents=self._parents(manifest, line | {found.path.resolve()})
            if manifest and parent.manifest_sha256
            else (),
        )

    def _problem(self, found: Candidate) -> str:
        """Return what is wrong with a folder; without a manifest it was found by its tensors, which are then right."""
        if found.path not in self._checked:
            try:
                if found.manifest is not None:
                    check_artifact(found.path, found.manifest, self._threads, self._progress)
                    check_own_targets(found.path, found.manifest)
                self._checked[found.path] = ""
            except AdaptkitError as error:
                self._checked[found.path] = error.message
        return self._checked[found.path]


def check_own_targets(path: Path, manifest: Manifest) -> None:
    """Compare each ``quantized_root`` in the manifest of a quantized artifact with the artifact's own tensors.

    Raises:
        IntegrityError: one differs; names the weight.
    """
    if manifest.kind == "adapter":  # its targets are tensors of its base
        return
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    names = list(tensors)  # sorted by ``Manifest``
    for target in manifest.targets:
        name = _weight_name(target, tensors)
        if target.quantized_root is None or name is None:
            continue
        below = names[bisect_left(names, f"{name}.") : bisect_left(names, f"{name}/")]  # "/" is the character after "."
        parts = [tensors[part] for part in (name, *below)]
        if tensors_root(parts) != target.quantized_root:
            raise IntegrityError(
                f"{path}: {name} does not match its quantized_root in the manifest",
                hint="restore the artifact from a good copy, or make it again",
            )


def compare_targets(child: Manifest, parent: Parent, found: Candidate) -> tuple[int, str]:
    """Compare the targets in a child's manifest with a parent.

    A quantized parent, an adapter, and the whole of which the child is a part have targets themselves, which must be
    the same; any other parent has the target weights as its tensors. An adapter that was trained on one quantization
    fits every other of the same weights, so its ``quantized_root`` may differ, unless it compensates for the error of
    that one.

    Returns:
        Number of targets compared, and the first module that differs; empty if none does.
    """
    between = any(other.role == "merged" for other in child.parents)  # its targets are weights of the merged model
    mismatch = bool(child.operation.get("options", {}).get("allow_base_mismatch")) and parent.role == "adapter"
    if parent.role in ("tuned", "release") or (between and parent.role != "merged") or mismatch:
        return 0, ""
    manifest = found.manifest
    has_targets = parent.role == "whole" or (manifest is not None and manifest.kind in ("quantized", "adapter"))
    known = {target.module: target for target in manifest.targets} if manifest and has_targets else {}
    tensors = {tensor.name: tensor for tensor in found.tensors} if not has_targets else {}
    is_adapter = manifest is not None and manifest.kind == "adapter"
    any_codes = is_adapter and all(file.path != COMPENSATION_NAME for file in (manifest.files if manifest else ()))
    compared = 0
    for target in child.targets:
        same, name = known.get(target.module), _weight_name(target, tensors)
        pairs: list[tuple[str | None, str | None]] = []
        if same is not None:
            pairs.append((target.base_xxh3_128, same.base_xxh3_128))
            pairs += [] if any_codes else [(target.quantized_root, same.quantized_root)]
        elif name is not None and target.base_xxh3_128 is not None:
            record = tensors[name]
            pairs.append((f"{target.base_xxh3_128} {target.shape}", f"{record.xxh3_128} {record.shape}"))
        pairs = [(one, other) for one, other in pairs if one is not None and other is not None]
        compared += bool(pairs)
        if any(one != other for one, other in pairs):
            return compared, target.module
    return compared, ""


def _weight_name(target: Target, tensors: Mapping[str, TensorRecord]) -> str | None:
    return next((name for name in (f"{target.module}.weight", target.module) if name in tensors), None)


def need_not_exist(child: Manifest, parent: Parent) -> bool:
    """Whether a parent was only computed on the way: the merged model of a merge that quantizes, or a decoded release.

    Such a parent has no part in making the child again.
    """
    if parent.role == "base":
        return any(other.role == "release" for other in child.parents)
    options = child.operation.get("options", {})
    return parent.role == "merged" and child.operation.get("name") == "merge" and "quantize" in options


def require_whole(path: Path, ancestors: Sequence[Ancestor], candidates: Candidates) -> None:
    """Refuse a lineage in which something is missing or wrong.

    Raises:
        IntegrityError: names everything that is.
    """
    everyone = [ancestor for parent in ancestors for ancestor in parent.all()]
    bad = list({ancestor.short: ancestor for ancestor in everyone if ancestor.state in (MISSING, WRONG)}.values())
    line = {ancestor.short: ancestor for ancestor in everyone}  # one may be the ancestor of several
    if not bad:
        return
    told = [f"{a.short} {a.state}" + (f" ({a.problem})" if a.problem else "") for a in bad]
    named = {ancestor.short for ancestor in bad}
    told += [f"{a.short} {a.state}" + (f" ({a.path})" if a.path else "") for a in line.values() if a.short not in named]
    told += candidates.broken
    raise IntegrityError(
        f"{path}: {len(bad)} of {counted(len(line), 'ancestor')} cannot be verified: {'; '.join(told)}",
        hint=f"give the folders that hold them with --parents; adaptkit inspect {path} --lineage shows all hashes",
    )
