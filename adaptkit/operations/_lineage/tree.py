"""The tree of an artifact's ancestors: found by their hashes, and compared."""

import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord, tensors_root
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import AdaptkitError, IntegrityError
from adaptkit.operations._lineage.parents import Candidate, find_candidates, find_parent
from adaptkit.wording import counted

VERIFIED, AT_HAND, MISSING, NEVER_WRITTEN, WRONG = "verified", "found", "not found", "never written", "wrong"


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


class Lineage:
    """Finds the ancestors of an artifact.

    Args:
        folders: folders to search; each is an artifact, or contains some.
        check: read every byte of each folder that is found, and compare fingerprints.
        threads: files read at a time.
        progress: called with bytes read.

    Raises:
        UsageError: a folder contains no artifact.
    """

    def __init__(
        self, folders: Sequence[Path], check: bool, threads: int = 1, progress: Progress = no_progress
    ) -> None:
        self._candidates, self._broken = find_candidates(folders, threads, progress)
        self._check, self._threads, self._progress = check, threads, progress
        self._problems: dict[Path, str] = {}

    def ancestors(self, path: Path, child: Manifest, line: frozenset[Path] = frozenset()) -> tuple[Ancestor, ...]:
        """Return the parents of an artifact, with their ancestors.

        Args:
            path: folder of the artifact.
            child: its manifest.
            line: real paths of its descendants, which cannot be its parents, as it cannot itself.
        """
        line |= {path.resolve()}
        recorded = child.operation.get("options", {}).get("adapters")  # of a merge: the adapters' identities
        identities = iter(recorded if isinstance(recorded, list) else ())
        return tuple(
            self._ancestor(child, parent, line, next(identities, None) if parent.role == "adapter" else None)
            for parent in child.parents
        )

    def _ancestor(self, child: Manifest, parent: Parent, line: frozenset[Path], identity: object) -> Ancestor:
        named = Ancestor(**vars(parent))
        others = [candidate for candidate in self._candidates if candidate.path.resolve() not in line]
        folder = find_parent(others, parent, identity)
        if folder is None:
            return replace(named, state=NEVER_WRITTEN if need_not_exist(child, parent) else MISSING)
        manifest = folder.manifest
        problem, compared = self._problem(folder) if self._check else "", 0
        if self._check and not problem:
            compared, differing = compare_targets(child, parent, folder)
            problem = f"{differing} is not the tensor that was used" if differing else ""
        # If the child names no manifest, the manifest of a folder with the same tensors may be unrelated to it.
        is_known = manifest is not None and parent.manifest_sha256 is not None
        return replace(
            named,
            state=WRONG if problem else VERIFIED if self._check else AT_HAND,
            problem=problem,
            path=str(folder.path),
            found_by="manifest" if manifest and manifest.sha256 == parent.manifest_sha256 else "tensors",
            operation=str(manifest.operation.get("name")) if manifest else None,
            targets=compared,
            parents=self.ancestors(folder.path, manifest, line) if manifest and is_known else (),
        )

    def _problem(self, folder: Candidate) -> str:
        """Return what is wrong with a folder; without a manifest it was found by its tensors, which are then right."""
        if folder.path not in self._problems:
            self._problems[folder.path] = ""
            try:
                if folder.manifest is not None:
                    check_artifact(folder.path, folder.manifest, self._threads, self._progress)
                    check_own_targets(folder.path, folder.manifest)
            except AdaptkitError as error:
                self._problems[folder.path] = error.message
        return self._problems[folder.path]

    def require_whole(self, path: Path, ancestors: Sequence[Ancestor]) -> None:
        """Refuse a lineage in which something is missing or wrong.

        Raises:
            IntegrityError: names everything that is, and then what is in order.
        """
        line = [ancestor for parent in ancestors for ancestor in parent.all()]
        # An ancestor of several artifacts may be wrong for only one of them.
        bad = {ancestor.short: ancestor for ancestor in line if ancestor.state in (MISSING, WRONG)}
        if not bad:
            return
        notes = [f"{name} {a.state}" + (f" ({a.problem})" if a.problem else "") for name, a in bad.items()]
        good = {ancestor.short: ancestor for ancestor in line if ancestor.short not in bad}
        notes += [f"{name} {a.state}" + (f" ({a.path})" if a.path else "") for name, a in good.items()]
        raise IntegrityError(
            f"{path}: {len(bad)} of {counted(len(bad) + len(good), 'ancestor')} cannot be verified: "
            + "; ".join([*notes, *self._broken]),
            hint=f"give the folders that hold them with --parents; adaptkit inspect {path} --lineage shows all hashes",
        )


def check_own_targets(path: Path, manifest: Manifest) -> None:
    """Compare each ``quantized_root`` in the manifest of a quantized artifact with the artifact's own tensors.

    Raises:
        IntegrityError: one differs; names the weight.
    """
    if manifest.kind in ("adapter", "merged"):  # their targets are tensors of the base
        return
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    names = list(tensors)  # sorted by ``Manifest``
    for target in manifest.targets:
        if target.quantized_root is None:
            continue
        name, ends = f"{target.module}.weight", "._"  # such as weight.absmax, weight_packed
        if not _starting_with(names, name):
            name, ends = target.module, "."
        parts = [part for part in _starting_with(names, name) if part[len(name) :][:1] in ends]
        if parts and tensors_root(tensors[part] for part in parts) != target.quantized_root:
            raise IntegrityError(
                f"{path}: {name} does not match its quantized_root in the manifest",
                hint="restore the artifact from a good copy, or make it again",
            )


def _starting_with(names: Sequence[str], prefix: str) -> Sequence[str]:
    """Return those of some sorted names that start with a prefix."""
    return names[bisect_left(names, prefix) : bisect_left(names, prefix + chr(sys.maxunicode))]


def compare_targets(child: Manifest, parent: Parent, folder: Candidate) -> tuple[int, str]:
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
    manifest, tensors = folder.manifest, {tensor.name: tensor for tensor in folder.tensors}
    has_targets = manifest is not None and (parent.role == "whole" or manifest.kind in ("quantized", "adapter"))
    known = {target.module: target for target in manifest.targets} if manifest is not None and has_targets else {}
    any_codes = manifest is not None and manifest.kind == "adapter"
    any_codes = any_codes and all(record.path != COMPENSATION_NAME for record in (manifest.files if manifest else ()))
    compared = 0
    for target in child.targets:
        pairs: list[tuple[object, object]] = []
        if (same := known.get(target.module)) is not None:
            pairs = [(target.base_xxh3_128, same.base_xxh3_128)]
            pairs += [] if any_codes else [(target.quantized_root, same.quantized_root)]
        elif not has_targets and target.base_xxh3_128 is not None and (name := _weight_name(target, tensors)):
            pairs = [((target.base_xxh3_128, target.shape), (tensors[name].xxh3_128, tensors[name].shape))]
        pairs = [pair for pair in pairs if None not in pair]
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
