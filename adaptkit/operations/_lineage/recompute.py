"""Repeat the operation that made an artifact, from its parents and the options in its manifest, and compare.

Training and calibrated quantization cannot be repeated, since manifests name their data only by hash; nor can extract.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import adaptkit
from adaptkit.checkpoint import undo
from adaptkit.checkpoint.layout import CARD_NAME
from adaptkit.checkpoint.manifest import SIGNATURE_NAME, Manifest, read_manifest, require_manifest
from adaptkit.errors import AdaptkitError, IntegrityError, UsageError
from adaptkit.operations._lineage.tree import Ancestor, need_not_exist

SAME = "same bytes"
SAME_BUT_CARD = f"{SAME}, except for the model card, which publish adds"
_REPEATABLE = ("dequantize", "merge", "quantize", "resize", "stack", "unmerge")
_NO_OPTIONS = {
    "dequantize": ("method",),
    "merge": ("adapters", "begun", "small_files", "quantize", "values"),
    "stack": ("source",),
}
"""What manifests record among the options, though it follows from them and the inputs."""
_BUT_SIGNATURE = "; its base's signature differs"
_SIGNATURE = f"{undo.BASE_PREFIX}{SIGNATURE_NAME}"


def recompute(path: Path, manifest: Manifest, parents: Sequence[Ancestor], threads: int | None) -> str:
    """Repeat the operation that made an artifact in a temporary folder, and compare the manifests.

    Args:
        path: folder of the artifact.
        manifest: of the artifact.
        parents: verified.
        threads: pieces at a time; one per processor if None.

    Returns:
        ``SAME`` or ``SAME_BUT_CARD``, perhaps with a remark about a signature; or why the operation cannot be repeated.

    Raises:
        IntegrityError: the result differs; names the first file that does.
        DiskError: there is no space for the result, which is written below TMPDIR.
    """
    name, options = str(manifest.operation.get("name")), manifest.operation.get("options", {})
    if name not in _REPEATABLE:
        return f"{name} cannot be run again"
    if "calibration" in options:
        return "calibrated on text that is not in the manifest"
    for parent in (parent for parent in parents if parent.path and not need_not_exist(manifest, parent)):
        own = read_manifest(Path(str(parent.path)))
        if (own.sha256 if own else None) != parent.manifest_sha256:
            return f"the manifest of {parent.path} is not the one that was used"
    with TemporaryDirectory(prefix="adaptkit-again-") as folder:
        out = Path(folder) / path.resolve().name
        try:
            _run(name, out, options, parents, threads)
        except (UsageError, TypeError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{path}: {name} cannot be run again with the options of its manifest ({error})",
                hint="use the version of adaptkit that made it, which adaptkit-manifest.json names under tool",
            ) from error
        return _compared(path, manifest, require_manifest(out))


def _compared(path: Path, manifest: Manifest, again: Manifest) -> str:
    """Compare everything except the version of adaptkit and two files that the operation does not make.

    These are the model card that ``publish`` adds if there is none, and the signature of a merge's base.
    """
    made = replace(again, tool=manifest.tool)
    signatures = [{record for record in each.files if record.path == _SIGNATURE} for each in (manifest, again)]
    signed = "" if signatures[0] == signatures[1] else _BUT_SIGNATURE
    if _without(made, _SIGNATURE) == _without(manifest, _SIGNATURE):
        return SAME + signed
    if _without(made, _SIGNATURE) == _without(manifest, _SIGNATURE, CARD_NAME):
        return SAME_BUT_CARD + signed
    before, after = ({record.path: record for record in each.files} for each in (manifest, again))
    differing = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    what = f"{differing[0]} differs" if differing else "the files are the same, but the manifest differs"
    raise IntegrityError(
        f"{path}: running {manifest.operation.get('name')} again on the same parents gives a different result: {what}",
        hint="use the version of adaptkit that made it, and give the original folders of its parents with --parents; "
        "if it still differs, it was not made as its manifest says",
    )


def _without(manifest: Manifest, *names: str) -> bytes:
    return replace(manifest, files=tuple(r for r in manifest.files if r.path not in names)).to_bytes()


def _run(name: str, out: Path, options: Mapping[str, Any], parents: Sequence[Ancestor], threads: int | None) -> None:
    """Run one of ``_REPEATABLE``, by its public function and its class of options."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for parent in parents:
        folders[parent.role].append(Path(str(parent.path)))
    base, adapters = folders["release"] or folders["base"], folders["adapter"]
    run = getattr(adaptkit, name)
    if name == "unmerge":
        (merged,) = (parent for parent in parents if parent.role == "merged")
        adapters = [Path(parent.path) for parent in merged.parents if parent.role == "adapter" and parent.path]
        run(Path(str(merged.path)), adapters, out, threads=threads, **options)
        return
    chosen = {key: value for key, value in options.items() if key not in _NO_OPTIONS.get(name, ())}
    if name == "stack":  # which records the method's own options beside the others
        common = {key: chosen.pop(key) for key in ("method", "weights", "rank", "energy") if key in chosen}
        chosen = common | {"settings": chosen}
    several: dict[str, list[Any]] = {"merge": [*base, adapters], "stack": [adapters]}
    run(
        *several.get(name, base or adapters),
        out,
        getattr(adaptkit, f"{name.title()}Options")(**chosen, threads=threads),
    )


def recompute_all(
    path: Path, manifest: Manifest, parents: Sequence[Ancestor], threads: int | None
) -> tuple[tuple[str, str], ...]:
    """Repeat the operations that made an artifact and its ancestors, as far as possible, the oldest first.

    Returns:
        (folder, result of ``recompute``) pairs.
    """
    done: dict[str, str] = {}

    def again(path: Path, manifest: Manifest, parents: Sequence[Ancestor]) -> None:
        for parent in parents:
            # If no manifest was recorded, that of a folder with the same tensors may be unrelated.
            own = read_manifest(Path(parent.path)) if parent.path and parent.manifest_sha256 else None
            if parent.path and own is not None and parent.path not in done:
                again(Path(parent.path), own, parent.parents)
        try:
            done[str(path)] = recompute(path, manifest, parents, threads)
        except AdaptkitError as error:
            hint = error.hint.replace("choose another -o", "set TMPDIR to a folder on a disk with more space")
            raise type(error)(f"while recomputing {path}: {error.message}", hint) from error

    again(path, manifest, parents)
    return tuple(done.items())
