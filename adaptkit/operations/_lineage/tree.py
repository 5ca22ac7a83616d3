"""What an artifact was made from, and what that was made from: walked by hashes, and compared."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.hashing import tensors_root
from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import Manifest, Parent, Target, TensorRecord
from adaptkit.checkpoint.progress import Progress, counted, no_progress
from adaptkit.errors import AdaptkitError, IntegrityError
from adaptkit.operations._lineage.parents import Candidate, Candidates

VERIFIED, AT_HAND, MISSING, NEVER_WRITTEN, WRONG = "verified", "found", "not found", "never written", "wrong"


@dataclass(frozen=True)
class Ancestor(Parent):
    """A parent, or a parent's parent, as its child names it and as it was found.

    Attributes:
        state: ``verified``, ``wrong``, or ``not at hand``; ``at hand`` if nothing but its hash was to be compared;
            ``never written`` for a merged model that was quantized in the same go.
        problem: what is wrong; empty if nothing is.
        path: its folder, if it is at hand.
        found_by: ``manifest``, or ``tensors``: the folder's manifest is another, or it has none.
        operation: that made it, if its manifest says so.
        targets: how many of its tensors the child's fingerprints were compared with.
        parents: its own.
    """

    state: str = MISSING
    problem: str = ""
    path: str | None = None
    found_by: str | None = None
    operation: str | None = None
    targets: int = 0
    parents: tuple["Ancestor", ...] = ()

    def all(self) -> Iterator["Ancestor"]:
        """Itself and everything before it."""
        yield self
        for parent in self.parents:
            yield from parent.all()

    @property
    def short(self) -> str:
        """Its name in a line for people: role and the beginning of a hash; the same for the same artifact."""
        return f"{self.role} {(self.manifest_sha256 or self.tensors_root)[:16]}"


class Walk:
    """Goes from an artifact to its ancestors.

    Args:
        candidates: among which they are looked for.
        check: read every byte of each that is found, and compare fingerprints.
        threads: files read at a time.
        progress: told of bytes read.
    """

    def __init__(self, candidates: Candidates, check: bool, threads: int = 1, progress: Progress = no_progress) -> None:
        self._candidates, self._check, self._threads, self._progress = candidates, check, threads, progress
        self._checked: dict[Path, str] = {}

    def ancestors(self, path: Path, manifest: Manifest) -> tuple[Ancestor, ...]:
        """The parents of an artifact, and theirs."""
        return self._parents(manifest, frozenset({path.resolve()}))

    def _parents(self, child: Manifest, line: frozenset[Path]) -> tuple[Ancestor, ...]:
        said = child.operation.get("options", {}).get("adapters")  # of a merge: the adapters' identities
        identities = iter(said if isinstance(said, list) else ())
        return tuple(
            self._parent(child, parent, line, next(identities, None) if parent.role == "adapter" else None)
            for parent in child.parents
        )

    def _parent(self, child: Manifest, parent: Parent, line: frozenset[Path], identity: object) -> Ancestor:
        told = Ancestor(**vars(parent))
        found = self._candidates.find(parent, line, identity)
        if found is None:
            return replace(told, state=NEVER_WRITTEN if _was_never_written(child, parent) else MISSING)
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
            # One that was named by its tensors alone has no line, even if a folder with these tensors has one.
            parents=self._parents(manifest, line | {found.path.resolve()})
            if manifest and parent.manifest_sha256
            else (),
        )

    def _problem(self, found: Candidate) -> str:
        """What is wrong with a folder; one without a manifest has the right tensors, or it would not be found."""
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
    """Compare what a quantized artifact says of its own weights with its tensors.

    Raises:
        IntegrityError: names the weight.
    """
    if manifest.kind == "adapter":  # speaks of its base's
        return
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    names = list(tensors)  # in order
    for target in manifest.targets:
        name = _weight_name(target, tensors)
        if target.quantized_root is None or name is None:
            continue
        below = names[bisect_left(names, f"{name}.") : bisect_left(names, f"{name}/")]  # "/" is what follows "."
        parts = [tensors[part] for part in (name, *below)]
        if tensors_root(parts) != target.quantized_root:
            raise IntegrityError(
                f"{path}: {name} does not match its quantized_root in the manifest",
                hint="restore the artifact from a good copy, or make it again",
            )


def compare_targets(child: Manifest, parent: Parent, found: Candidate) -> tuple[int, str]:
    """Compare what a child says of the tensors that it depends on with a parent.

    A quantized parent and an adapter name the 16-bit weights that they were made for, as the child does, and what a
    part was pulled from says the same as the part; what any other parent has are those weights. An adapter was trained
    on one quantization and belongs to all others of the same weights, unless it makes up for what that one lost.

    Returns:
        How many could be compared, and the first that differs; empty if none does.
    """
    between = any(other.role == "merged" for other in child.parents)  # quantized in the same go: of the merged weights
    mismatch = bool(child.operation.get("options", {}).get("allow_base_mismatch")) and parent.role == "adapter"
    if parent.role == "tuned" or (between and parent.role != "merged") or mismatch:
        return 0, ""
    manifest = found.manifest
    relays = parent.role == "whole" or (manifest is not None and manifest.kind in ("quantized", "adapter"))
    known = {target.module: target for target in manifest.targets} if manifest and relays else {}
    tensors = {tensor.name: tensor for tensor in found.tensors} if not relays else {}
    any_codes = manifest is not None and manifest.kind == "adapter" and not _compensates(manifest)
    compared = 0
    for target in child.targets:
        pairs = _pairs(target, known.get(target.module), tensors, any_codes)
        compared += bool(pairs)
        if any(one != other for one, other in pairs):
            return compared, target.module
    return compared, ""


def _compensates(manifest: Manifest) -> bool:
    return any(file.path == COMPENSATION_NAME for file in manifest.files)


def _pairs(
    target: Target, known: Target | None, tensors: Mapping[str, TensorRecord], any_codes: bool
) -> list[tuple[str, str]]:
    """What can be compared of a target; not how it was quantized, if it may be in any way."""
    if known is not None:
        both = [(target.base_xxh3_128, known.base_xxh3_128)]
        if not any_codes:
            both.append((target.quantized_root, known.quantized_root))
        return [(one, other) for one, other in both if one is not None and other is not None]
    name = _weight_name(target, tensors)
    if name is None or target.base_xxh3_128 is None:
        return []
    return [(f"{target.base_xxh3_128} {target.shape}", f"{tensors[name].xxh3_128} {tensors[name].shape}")]


def _weight_name(target: Target, tensors: Mapping[str, TensorRecord]) -> str | None:
    return next((name for name in (f"{target.module}.weight", target.module) if name in tensors), None)


def _was_never_written(child: Manifest, parent: Parent) -> bool:
    options = child.operation.get("options", {})
    return parent.role == "merged" and child.operation.get("name") == "merge" and "quantize" in options


def require_whole(path: Path, ancestors: Sequence[Ancestor], candidates: Candidates) -> None:
    """Refuse a lineage in which something is missing or wrong.

    Raises:
        IntegrityError: names everything that is.
    """
    everyone = [ancestor for parent in ancestors for ancestor in parent.all()]
    bad = list({ancestor.short: ancestor for ancestor in everyone if ancestor.state in (MISSING, WRONG)}.values())
    line = {ancestor.short: ancestor for ancestor in everyone}  # most are the ancestors of several
    if not bad:
        return
    told = [f"{a.short} {a.state}" + (f" ({a.problem})" if a.problem else "") for a in bad]
    named = {ancestor.short for ancestor in bad}
    told += [f"{a.short} {a.state} ({a.path})" for a in line.values() if a.short not in named]
    told += candidates.broken
    raise IntegrityError(
        f"{path}: {len(bad)} of {counted(len(line), 'ancestor')} cannot be verified: {'; '.join(told)}",
        hint=f"give the folders that hold them with --parents; adaptkit inspect {path} --lineage shows all hashes",
    )
